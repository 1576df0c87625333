"""The edge of a host of the inventory, by its own settings: what another host has set for itself is no matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PORT = 8000  # glm_port where nobody sets it


def edge_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name, port, tls; address, by which other hosts reach it, and public, by which clients do."""
    names = settings.get("glm_acme_names") or []
    own = settings.get("ansible_host") or name
    return {
        "name": name,
        "address": settings.get("glm_node_address") or own,
        # The certificate is for its name.
        "public": str(names[0] if names else own),
        "port": int(settings.get("glm_port") or PORT),
        "tls": bool(settings.get("glm_tls_certificate_file") or names),
    }
