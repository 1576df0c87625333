"""The node and the mirror that the tests break."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from machines import Machine, Mirror
from testbed import ROOT

INVENTORY = ROOT / "molecule/refusals/inventory"
NODE, MIRROR = "glm-refusal-1", "glm-refusals-mirror"
EDGE = "http://198.18.66.10:8000"


class Node(Machine):
    """The node with its mirror."""

    def __init__(self) -> None:
        super().__init__(NODE)
        mirror = Mirror(MIRROR)
        self.hub, self.no_registry = mirror.hub, mirror.no_registry

    def ask(self, path: str = "/v1/models", key: str | None = None, question: str = "") -> tuple[int, Any]:
        """Status and JSON of the edge's answer; `key` is the right one where it is None."""
        if key is None:
            key = (INVENTORY / "keys/api-keys.txt").read_text().splitlines()[-1].strip()
        body = {"model": "glm-5.2-fp8", "max_tokens": 64, "messages": [{"role": "user", "content": question}]}
        request = urllib.request.Request(
            EDGE + path,
            data=json.dumps(body).encode() if question else None,
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.loads(refused.read() or b"null")
