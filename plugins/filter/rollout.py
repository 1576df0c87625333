"""What a rollout must know of the whole fleet before it changes anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from statistics import median
from typing import Any

from ansible_collections.glm.fleet.plugins.plugin_utils.edges import edge_of
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure_of, words

SHARE = re.compile(r"(\d+)%")
SIZES = ("input_len", "output_len", "num_prompts", "max_concurrency")


def wave_problems(waves: Any) -> list[str]:
    """One line for each wave that makes no sense."""
    if not isinstance(waves, Sequence) or isinstance(waves, str) or not waves:
        return ['glm_rollout_waves: wanted a list such as [1, "10%", "25%"]']
    return [
        f"glm_rollout_waves: {wave!r} is no wave: write a count from 1 on, or a share from 1% to 100%"
        for wave in waves
        if size_of(wave, 100) is None
    ]


def size_of(wave: Any, total: int) -> int | None:
    """Nodes of a wave, as Ansible reckons `serial`; None where it is neither a count nor a share."""
    text = str(wave).strip()
    share = SHARE.fullmatch(text)
    if isinstance(wave, bool) or not (share or text.isdigit()):
        return None
    if share:
        return max(1, int(int(share[1]) / 100 * total)) if 1 <= int(share[1]) <= 100 else None
    return int(text) if int(text) >= 1 else None


def batches(hosts: Sequence[str], waves: Iterable[Any]) -> list[list[str]]:
    """The nodes of each wave; the last wave's size is that of all that follow."""
    sizes = [size_of(wave, len(hosts)) or 1 for wave in waves]
    result: list[list[str]] = []
    rest = list(hosts)
    while rest:
        size = sizes[min(len(result), len(sizes) - 1)]
        result.append(rest[:size])
        rest = rest[size:]
    return result


def availability_violation(hosts: Sequence[str], waves: Iterable[Any], fleet: Mapping[str, Any]) -> str:
    """Why the waves would leave too few nodes, in one line; empty where they do not.

    `fleet` holds serving (names of the nodes that serve now), stopped (those that the run would stop),
    min_available (a count or a share of total, rounded up), total, accept_downtime, and for_good where they do not
    come back by themselves.
    """
    serving, stopped, total = set(fleet["serving"]), set(fleet["stopped"]), int(fleet["total"])
    minimum = str(fleet["min_available"]).strip()
    share = SHARE.fullmatch(minimum)
    if isinstance(fleet["min_available"], bool) or not (share or minimum.isdigit()) or (share and int(share[1]) > 100):
        return f"glm_rollout_min_available: {fleet['min_available']!r} is neither a count nor a share such as 75%"
    least = ceil(int(share[1]) * total / 100) if share else int(minimum)
    if fleet["accept_downtime"] or not serving & stopped:
        return ""
    for number, batch in enumerate(batches(hosts, waves)):
        taken = serving & stopped & set(batch)
        left = len(serving) - len(taken)
        # A wave ends with its nodes in service, or is the last.
        serving |= set() if fleet.get("for_good") else set(batch)
        if taken and left < least:
            who, advice = (
                ("this", "name fewer nodes with --limit")
                if fleet.get("for_good")
                else (f"wave {number}", "set smaller glm_rollout_waves")
            )
            return (
                f"{who} stops {', '.join(sorted(taken))} and leaves {left} of {left + len(taken)} serving nodes "
                f"(wanted at least {least}): {advice}, or a lower glm_rollout_min_available, or "
                "glm_accept_downtime: true"
            )
    return ""


def serving_nodes(
    nodes: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]], edges: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The nodes that take requests: those that every gateway offers and calls up.

    Without gateways, those whose engine runs a release that was verified; a node that was not asked is taken for one.
    """
    if edges:
        return [
            node
            for node in nodes
            if all(
                (server := servers.get(node)) and server["rotation"] == "in" and server["up"]
                for servers in edges.values()
            )
        ]
    return [
        node
        for node in nodes
        if not (seen := hostvars[node].get("preflight_node") or {})
        or (
            (seen.get("state") or {}).get("phase") == "serving"
            and ((seen.get("units") or {}).get("glm-engine.service") or {}).get("active") == "active"
        )
    ]


def interrupted_nodes(hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The nodes whose engine the run stops: by the plan of the driver, where there is one, else of the release."""
    return [
        host
        for host in hosts
        for seen in [hostvars[host]]
        if seen.get("rollout_interrupts", (seen.get("inference_service_plan") or {}).get("action", "none") != "none")
    ]


def unknown_backends(edges: Mapping[str, Mapping[str, Any]], nodes: Iterable[str]) -> list[str]:
    """One line for each node that a gateway offers and the inventory no longer has."""
    known = set(nodes)
    return [
        f"{edge} offers the node {name}, which is not in the inventory: put it back, drain it "
        f"(playbooks/drain.yml --limit {name}), then take it out"
        for edge, servers in edges.items()
        for name, server in servers.items()
        if name not in known and server["rotation"] == "in"
    ]


def offering(backends: Mapping[str, Mapping[str, Any]], node: str) -> list[str]:
    """The gateways that know the node, whether or not they offer it just now."""
    return [gateway for gateway, servers in backends.items() if node in servers]


def edge_servers(hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, address, port and tls of each host's edge, as other hosts reach it."""
    wanted = ("name", "address", "port", "tls")
    return [{key: edge_of(host, hostvars[host])[key] for key in wanted} for host in hosts]


def share_addresses(hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each host's address, as the others know it."""
    return {host: str(edge_of(host, hostvars[host])["address"]) for host in hosts}


def changed_backends(
    edges: Mapping[str, Mapping[str, Any]], servers: Iterable[Mapping[str, Any]], serving: Iterable[str]
) -> list[str]:
    """One line for each serving node that a gateway would lose at once, by another port or scheme.

    The gateways are configured before the nodes, so from then on until its own turn such a node is not reached.
    """

    def way(server: Mapping[str, Any]) -> str:
        return f"port {server['port']} {'with' if server['tls'] else 'without'} TLS"

    wanted = set(serving)
    return [
        f"{edge} reaches {server['name']} by {way(known)}, and would by {way(server)} before that node has changed: "
        "this is an outage of the fleet: set glm_accept_downtime: true"
        for edge, known_servers in edges.items()
        for server in servers
        if server["name"] in wanted and (known := known_servers.get(server["name"]))
        if (known["port"], known["tls"]) != (server["port"], server["tls"])
    ]


def failure_line(result: Mapping[str, Any]) -> str:
    """What a failed task says, in one line."""
    return "; ".join(words(failure_of(result)).splitlines())


def fleet_baseline(
    measured: Mapping[str, Mapping[str, Any]], report: str, node: str, wanted: Mapping[str, Any]
) -> float | None:
    """Median tokens a second of the other nodes of this run, else of the fleet's last report; None without any.

    `measured` are this run's benchmarks by node, `report` the text of the last report.json. `wanted` holds engine,
    profile, model and workload: only what was measured alike is compared.
    """
    results = [result for name, result in measured.items() if name != node and result]
    if not results:
        try:
            nodes = json.loads(report or "{}").get("nodes", {})
        except ValueError:
            nodes = {}
        results = [
            entry["benchmark"]
            for entry in nodes.values()
            if entry.get("ok")
            and entry.get("benchmark")
            and all(entry.get(name) == wanted[name] for name in ("engine", "profile", "model"))
        ]
    rates = [
        result["output_tok_s"]
        for result in results
        if result.get("output_tok_s")
        and all(result["workload"][size] == wanted["workload"].get(size) for size in SIZES)
    ]
    return median(rates) if rates else None


def fleet_status(
    nodes: Iterable[str],
    hostvars: Mapping[str, Mapping[str, Any]],
    gateways: Sequence[str],
    backends: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """What is known of each node, with `rotation`: in, out, or what its edges say where they disagree.

    `backends` holds what each gateway that was reached offers.
    """
    result = {}
    for node in nodes:
        seen = dict((hostvars[node].get("rollout_status") or {}).get("status") or {"phase": "not reached"})
        own = seen.pop("edge", None)
        words = []
        for servers in [backends.get(gateway) for gateway in gateways] if gateways else [own]:
            server = (servers or {}).get(node)
            # What is out is not checked.
            down = server is not None and server["rotation"] == "in" and not server["up"]
            words.append("unknown" if server is None else "down" if down else server["rotation"])
        seen["rotation"] = words[0] if len(set(words)) == 1 else ", ".join(words)
        result[node] = seen
    return result


COLUMNS = {
    "node": "",
    "rotation": "rotation",
    "phase": "phase",
    "release": "release",
    "engine": "engine",
    "image": "image_digest",
    "weights": "model_revision",
    "driver": "driver",
    "in flight": "in_flight",
    "stalls": "stalls",
    "verified": "verified",
}


def status_table(status: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a node, then the reason of each that has one."""
    rows = [list(COLUMNS)]
    for node, seen in status.items():
        rows.append([node] + [_cell(name, seen.get(name)) for name in list(COLUMNS.values())[1:]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + [f"{node}: {seen['reason']}" for node, seen in status.items() if seen.get("reason")])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "verified":
        return str(value["time"]) if value["ok"] else f"{value['time']} FAILED {', '.join(value['failed'])}"
    if name == "stalls":
        return str(value["restarts"])
    return str(value).removeprefix("sha256:")[:12] if name in ("image_digest", "model_revision") else str(value)


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "wave_problems": wave_problems,
            "availability_violation": availability_violation,
            "serving_nodes": serving_nodes,
            "unknown_backends": unknown_backends,
            "offering": offering,
            "interrupted_nodes": interrupted_nodes,
            "changed_backends": changed_backends,
            "edge_servers": edge_servers,
            "share_addresses": share_addresses,
            "failure_of": failure_of,
            "failure_line": failure_line,
            "fleet_baseline": fleet_baseline,
            "fleet_status": fleet_status,
            "status_table": status_table,
        }
