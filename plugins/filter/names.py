"""Checks of the inventory that need nothing but names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DEFAULT_SSH_PORT = 22


def unknown_variables(names: Iterable[str], known: Iterable[str], prefix: str = "glm_") -> list[str]:
    """One line for each name with the prefix that nobody reads, with the nearest right one."""
    right = sorted(set(known))
    unknown = sorted({str(name) for name in names if str(name).startswith(prefix)} - set(right))
    return [f"{name}: there is no such setting: {_advice(name, right)}" for name in unknown]


def _advice(name: str, right: list[str]) -> str:
    nearest = difflib.get_close_matches(name, right, n=1, cutoff=0.7)
    return f"did you mean {nearest[0]}?" if nearest else "remove it, or see the list of settings"


def duplicate_addresses(hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each address that several hosts share."""
    holders: dict[tuple[str, str], list[str]] = {}
    for host in hosts:
        variables = hostvars[host]
        address = str(variables.get("ansible_host") or host)
        port = str(variables.get("ansible_port") or DEFAULT_SSH_PORT)
        holders.setdefault((address, port), []).append(host)
    return [
        f"inventory: {' and '.join(names)} have one address (found {address} port {port} {len(names)} times, "
        "wanted one node an address): give each its own ansible_host, or remove the extra name"
        for (address, port), names in holders.items()
        if len(names) > 1
    ]


def differing_settings(
    hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]], names: Iterable[str]
) -> list[str]:
    """One line for each setting of the whole fleet that the inventory sets differently for some hosts."""
    values: dict[str, set[str]] = {name: set() for name in names}
    for host in hosts:
        variables = hostvars[host]  # costly: once a host
        for name, seen in values.items():
            seen.add(str(variables.get(name, "")))
    return [
        f"{name}: differs between the nodes, but one value serves the whole fleet: set it once, in group_vars/all"
        for name, seen in values.items()
        if len(seen) > 1
    ]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "unknown_variables": unknown_variables,
            "duplicate_addresses": duplicate_addresses,
            "differing_settings": differing_settings,
        }
