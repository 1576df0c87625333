"""Judges what a host does to itself while no run is under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.glm.fleet.plugins.plugin_utils.findings import Finding


def update_findings(node: Mapping[str, Any], automatic_reboot: str) -> list[dict[str, str]]:
    """Findings about a host that node_info has read; automatic_reboot is the user's setting."""
    if automatic_reboot != "refuse" or not node.get("automatic_reboot"):
        return []
    return [
        Finding(
            "automatic_reboot",
            "unattended-upgrades reboots the host by itself, whatever is in flight and many hosts at the same hour "
            "(found Unattended-Upgrade::Automatic-Reboot true, wanted false)",
            "set glm_automatic_reboot: disable to have it switched off, or keep to accept it",
        ).as_dict()
    ]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., list[dict[str, str]]]]:
        return {"update_findings": update_findings}
