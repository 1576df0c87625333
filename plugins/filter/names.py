"""Checks of the inventory that need nothing but names."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.glm.fleet.plugins.plugin_utils.edges import edge_of

DEFAULT_SSH_PORT = 22
PEERS_PORT = 8003  # glm_peers_port where nobody sets it
RENAMED = {
    "glm_weights_share": "glm_share",
    "glm_weights_share_port": "glm_share_port",
    "glm_weights_share_rate": "glm_share_rate",
}


def unknown_variables(names: Iterable[str], known: Iterable[str], prefix: str = "glm_") -> list[str]:
    """One line for each name with the prefix that nobody reads, with the nearest right one."""
    right = sorted(set(known))
    unknown = sorted({str(name) for name in names if str(name).startswith(prefix)} - set(right))
    return [f"{name}: there is no such setting: {_advice(name, right)}" for name in unknown]


def variables_of_roles(directory: str) -> dict[str, Any]:
    """Of the roles in a directory: their options, and which variables are set by the role glm, each with the user's
    settings that it comes from, or are facts of a role."""
    roles = Path(directory)
    mapping: dict[str, Any] = yaml.safe_load((roles / "glm/vars/main.yml").read_text(encoding="utf-8"))
    files = roles.glob("*/defaults/main.yml")
    options = {name for file in files for name in yaml.safe_load(file.read_text(encoding="utf-8"))}
    ours = [name for name in mapping if not name.startswith(("__", "ansible_"))]
    mapped = {name: sorted(_settings(name, mapping, set())) for name in ours}
    for file in roles.glob("*/meta/facts.yml"):
        mapped |= {name: [] for name in yaml.safe_load(file.read_text(encoding="utf-8"))}
    return {"options": sorted(options), "mapped": mapped}


def _settings(name: str, mapping: Mapping[str, Any], seen: set[str]) -> set[str]:
    """The user's settings that a variable comes from, through those that it is made of."""
    seen.add(name)
    words = set(re.findall(r"\b_*[a-z]\w*", str(mapping[name])))
    found = {word for word in words if word.startswith("glm_")}
    return found.union(*(_settings(word, mapping, seen) for word in (words & set(mapping)) - seen))


def role_variables(names: Iterable[str], known: Mapping[str, Any]) -> list[str]:
    """One line for each variable of a role that the inventory sets in vain, by what `variables_of_roles` found.

    What the role glm sets outranks an inventory. A name that no role has is told where it is nearly one of an option:
    the roles' names are common words, which others may use.
    """
    right = sorted({*known["options"], *known["mapped"]})
    prefixes = tuple({name.partition("_")[0] + "_" for name in right} - {"glm_"})
    lines = []
    for name in sorted(map(str, names)):
        if name in known["mapped"]:
            settings = _nearest_settings(name, known["mapped"])
            advice = f"set {' and '.join(settings)} instead" if settings else "the project sets it itself, remove it"
            lines.append(f"{name}: an inventory cannot set this: {advice}")
        elif name.startswith(prefixes) and name not in right:
            nearest = difflib.get_close_matches(name, right, n=1, cutoff=0.9)
            meant = [setting for found in nearest for setting in _nearest_settings(found, known["mapped"]) or [found]]
            lines += [f"{name}: there is no such setting: did you mean {' or '.join(meant)}?"] if meant else []
    return lines


def _nearest_settings(name: str, mapped: Mapping[str, list[str]]) -> list[str]:
    """The settings that a variable comes from; of several only those that end as it does, if there are any."""
    settings = mapped.get(name, [])
    last = name.rpartition("_")[2]
    return [setting for setting in settings if setting.rpartition("_")[2] == last] or settings


def _advice(name: str, right: list[str]) -> str:
    if name in RENAMED:
        return f"it is {RENAMED[name]} now"
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


def is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def gateway_problems(gateways: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each mistake that keeps several gateways from telling each other where sessions are."""

    edges = [edge_of(name, hostvars[name]) for name in gateways] if len(gateways) > 1 else []
    return [
        f"inventory: the other gateways know {edge['name']} by its address, and {edge['address']} is a name: set "
        "glm_node_address for it, to the IP address from which they see it"
        for edge in edges
        if not is_ip(str(edge["address"]))
    ] + [
        f"glm_port: {edge['name']} needs port {edge['port']} for the other gateways: set glm_port or glm_peers_port to "
        "another port"
        for edge in edges
        if edge["port"] == int(hostvars[edge["name"]].get("glm_peers_port") or PEERS_PORT)
    ]


def share_problems(nodes: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each mistake that keeps the nodes from giving each other what they have."""
    sharing = [name for name in nodes if len(nodes) > 1 and boolean(hostvars[name].get("glm_share"), strict=False)]
    edges = [edge_of(name, hostvars[name]) for name in sharing]
    return [
        f"glm_share: the other nodes know {edge['name']} by its address, and {edge['address']} is a name: set "
        "glm_node_address for it, to the IP address that it has on their network"
        for edge in edges
        if not is_ip(str(edge["address"]))
    ]


def metrics_problems(
    settings: Mapping[str, Any], monitoring: Iterable[Mapping[str, Any]], taken: Mapping[str, int]
) -> list[str]:
    """One line for each mistake that keeps metrics from being read, or lets more than they do.

    settings: the host's, without their prefix glm_; monitoring: the edges of who reads; taken: ports, by what they are.
    """
    image = str(settings["dcgm_exporter_image"])
    found = []
    if image and not re.search(r"@sha256:[0-9a-f]{64}$", image):
        found.append(
            f"glm_dcgm_exporter_image: {image} names no digest, and what it names may become another image: write "
            "NAME@sha256:DIGEST"
        )
    if not settings["metrics"]:
        return found
    port = int(settings["metrics_port"])
    found += [
        f"glm_metrics_port: {port} is {what} too: set it to another port"
        for what, other in taken.items()
        if other == port
    ]
    found += [
        f"glm_metrics_sources: {source} is no IP address and no network: write such as 10.0.0.5 or 10.0.0.0/24"
        for source in settings["metrics_sources"]
        if not is_network(str(source))
    ]
    found += [
        f"inventory: the hosts let {host['name']} read metrics by its address, and {host['address']} is a name: set "
        "glm_node_address for it, to the IP address from which they see it"
        for host in monitoring
        if not is_ip(str(host["address"]))
    ]
    if not [*settings["metrics_sources"], *monitoring]:
        found.append(
            "glm_metrics: nobody may read them: set glm_metrics_sources, or add the group monitoring to the inventory"
        )
    return found


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


def results_problems(directory: str) -> list[str]:
    """Why reports cannot be written there, in a line; before hours of work and not after them."""
    place = Path(directory)
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return []
    return [
        f"glm_results_dir: {directory} cannot be written: call from a directory of your own, or set glm_results_dir"
    ]


def inventory_directory(sources: Sequence[str]) -> str:
    """Of the first source, which is a file or a directory; that of the call where there is none."""
    first = Path(sources[0] if sources else ".").expanduser().absolute()
    return str(first if first.is_dir() else first.parent)


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "unknown_variables": unknown_variables,
            "role_variables": role_variables,
            "variables_of_roles": variables_of_roles,
            "duplicate_addresses": duplicate_addresses,
            "gateway_problems": gateway_problems,
            "share_problems": share_problems,
            "metrics_problems": metrics_problems,
            "differing_settings": differing_settings,
            "results_problems": results_problems,
            "inventory_directory": inventory_directory,
        }
