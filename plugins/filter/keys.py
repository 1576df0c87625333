"""What a file of API keys is to the edges, and to those who use a key of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.glm.fleet.plugins.plugin_utils.key_file import parse
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused


def edge_keys(text: str, shares: int) -> list[dict[str, Any]]:
    """What an edge knows of each key: never the key itself.

    shares: among how many edges the limits are divided, rounded up; 0 for an edge that does not count
    """
    try:
        entries = parse(text, "the file of API keys") if text.strip() else []
    except Refused as problem:
        raise AnsibleFilterError(str(problem)) from None

    def share(limit: int) -> int:
        return -(-limit // shares) if shares else 0

    return [
        {
            "sha256": entry.sha256,
            "name": entry.name,
            "requests_per_minute": share(entry.requests_per_minute),
            "concurrent": share(entry.concurrent),
            "expires_at": entry.expires_at,
        }
        for entry in entries
    ]


def first_key(text: str) -> str:
    """The first key that has not expired; empty where there is none, which glm.fleet.api_keys refuses."""
    return next((entry.key for entry in parse(text, "the file of API keys") if not entry.expired()), "")


class FilterModule:
    """Names the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"edge_keys": edge_keys, "first_key": first_key}
