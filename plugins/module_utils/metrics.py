"""An engine's metrics, in Prometheus' text format."""

from __future__ import annotations

import re
from typing import Any

from ansible.module_utils.endpoint import Server, Wrong, need


def samples(text: str) -> dict[str, float]:
    """Sum of each metric's samples; a family without a sample yet counts 0."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            sums.setdefault(line.split()[2], 0.0)
        elif line and not line.startswith("#"):
            name, _, value = re.sub(r"\{.*\}", "", line).partition(" ")
            sums[name] = sums.get(name, 0.0) + float(value.split()[0])
    return sums


def load(url: str, running: str, waiting: str, timeout: float = 10) -> dict[str, Any]:
    """Requests that the engine works on and that wait in it; null where it does not answer."""
    try:
        answer = Server(url, timeout).request("GET", "/metrics")
        need(answer, 200)
    except Wrong:
        return {"running": None, "waiting": None}
    sums = samples(answer.body.decode(errors="replace"))
    return {"running": int(sums.get(running, 0)), "waiting": int(sums.get(waiting, 0))}
