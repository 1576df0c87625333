"""What the report says of a node, how runs are merged, and the geometry of its plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.systemd import called, duration, human
from ansible_collections.glm.fleet.plugins.plugin_utils.edges import edge_of
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure, words

SCHEMA = 1
WORKLOAD = ("input_len", "output_len", "num_prompts", "max_concurrency")
SETTINGS = ("engine", "profile", "image", "image_digest", "model", "model_revision", "driver", "release", "state")
LISTED = 4  # nodes of which the terminal tells each

# What is plotted: the figure's name, its title, and its unit. A figure that
# has a mean and a P99 is drawn as a bar and a whisker.
PLOTS = (
    ("output_tok_s", "Output throughput", "tok/s", "more is better"),
    ("total_tok_s", "Total throughput, input and output", "tok/s", "more is better"),
    ("ttft_ms", "Time to first token, mean and P99", "ms", "less is better"),
    ("tpot_ms", "Time per output token, mean and P99", "ms", "less is better"),
)
# The figures of the table: name, statistic, title.
FIGURES = (
    ("output_tok_s", "", "Output"),
    ("per_user_tok_s", "", "Output per user"),
    ("total_tok_s", "", "Input and output"),
    ("ttft_ms", "mean", "Time to first token, mean"),
    ("ttft_ms", "p99", "Time to first token, P99"),
    ("tpot_ms", "mean", "Time per output token, mean"),
    ("tpot_ms", "p99", "Time per output token, P99"),
    ("itl_ms", "mean", "Inter-token latency, mean"),
    ("itl_ms", "p99", "Inter-token latency, P99"),
    ("e2el_ms", "mean", "Whole request, mean"),
    ("e2el_ms", "p99", "Whole request, P99"),
)


def report_node(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A node's entry. It is ok only where checks were made, each is ok, and nothing else failed."""
    checks: list[dict[str, Any]] = [
        {
            "name": str(check["name"]),
            "ok": bool(check["ok"]),
            "detail": str(check.get("detail", "")),
            "seconds": round(float(check.get("seconds") or 0), 3),
        }
        for check in settings.get("checks") or []
    ]
    benchmark = dict(settings.get("benchmark") or {}) or None
    wrong = [check["name"] for check in checks if not check["ok"]]
    found = dict(settings.get("failure") or {})
    if not found and wrong:
        found = failure("verify", f"{len(wrong)} of {len(checks)} checks failed: {', '.join(wrong)}")
    if not found and not checks:
        found = failure("not_verified", "the node was not verified")
    if not found and benchmark and benchmark["completed"] < benchmark["workload"]["num_prompts"]:
        found = failure("benchmark", f"the benchmark had {benchmark['failed']} failed requests")
    reason = words(found) if found else ""
    entry: dict[str, Any] = {"ok": not reason}
    entry.update({name: str(settings.get(name) or "") for name in SETTINGS})
    outage = settings.get("outage")
    if settings.get("down"):
        entry["down"] = True
    entry["outage_s"] = None if outage in (None, "") else round(float(outage), 1)
    entry.update(reason=reason, failure=found or None, notes=[str(note) for note in settings.get("notes") or []])
    entry.update(checks=checks, benchmark=benchmark)
    if settings.get("weights"):
        entry["weights"] = dict(settings["weights"])
    return entry


def report_collect(
    hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], started: str = ""
) -> dict[str, Any]:
    """The entries of the nodes of this run, and when it began (UTC, ISO 8601).

    A node without one did not come as far as verification. Where no node has one, this run only renders a report.
    """
    seen = {host: dict(hostvars[host]["report_entry"]) for host in hosts if "report_entry" in hostvars[host]}
    lost = report_node(
        {"failure": failure("ended", "the run ended for this node before it was verified", fix="its output says why")}
    )
    return {
        "entries": {host: seen.get(host, lost) for host in hosts} if seen else {},
        "started": started if seen else "",
    }


def report_merge(
    nodes: Mapping[str, Mapping[str, Any]],
    previous: str,
    inventory: Sequence[str],
    started: str,
    finished: str,
) -> dict[str, Any]:
    """The report of a run, with the earlier entries of those nodes of the inventory that it left out.

    Without `nodes` it is the previous one, rendered again: of the time of that run.
    """
    try:
        earlier = json.loads(previous)
        kept = dict(earlier["nodes"]) if earlier["schema"] == SCHEMA else {}
        if kept and not nodes:
            started, finished = earlier["started"], earlier["finished"]
    except (ValueError, KeyError, TypeError):
        kept = {}
    unseen = report_node({"reason": "the node has not been rolled out yet"})
    merged = {name: nodes.get(name) or kept.get(name) or unseen for name in inventory}
    weights = report_weights(merged, merged)
    return {
        "schema": SCHEMA,
        "started": started or finished,
        "finished": finished,
        **({"weights": weights} if weights else {}),
        "nodes": merged,
    }


def report_weights(nodes: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """What has come to those of these nodes that fetched weights, all together; empty where none did."""
    fetched = [nodes[name]["weights"] for name in names if nodes.get(name, {}).get("weights")]
    if not fetched:
        return {}
    sources: Counter[str] = Counter()
    for one in fetched:
        sources.update(one["sources"])
    total = sum(sources.values())
    percent = {source: round(100 * size / total, 1) for source, size in sources.items()}
    return {"nodes": len(fetched), "bytes": total, "sources": dict(sources), "percent": percent}


def weights_words(weights: Mapping[str, Any]) -> str:
    """Of a node 755.6 GB in 14 min, 12.5 % from the hub, 87.5 % from peers; of all 6.04 TB to 8 nodes, ..."""
    total = weights["bytes"]
    parts = [f"{100 * size / total:.1f} % from {called(source)}" for source, size in weights["sources"].items()]
    if "nodes" in weights:
        more = f"to {weights['nodes']} {'node' if weights['nodes'] == 1 else 'nodes'}"
    else:
        more = f"in {duration(weights['seconds'])}"
    return ", ".join([f"{human(total)} {more}", *parts])


def report_verdict(report: Mapping[str, Any]) -> str:
    """All nodes in a few words."""
    nodes = list(report["nodes"].values())
    return f"{sum(node['ok'] for node in nodes)} of {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} ok"


def quantity(value: float | None, unit: str) -> str:
    """A figure as a person reads it: 1,454 tok/s, 5.40 s, 19.4 ms."""
    if value is None:
        return "–"  # noqa: RUF001  (a dash, for no figure)
    if unit == "ms" and value >= 1000:
        return f"{value / 1000:,.2f} s"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:,.1f} {unit}"


def report_outage(node: Mapping[str, Any]) -> str:
    """How long the engine that served before the run did not during it."""
    seconds = node.get("outage_s")
    if node.get("down"):
        return "since its stop, and it is still down"
    return "no engine served before" if seconds is None else f"{seconds:,.1f} s" if seconds else "none"


def report_interrupted(nodes: Mapping[str, Mapping[str, Any]], hosts: Iterable[str]) -> list[str]:
    """The nodes of a run whose engine served before it, and not all through it."""
    return [name for name in hosts if name in nodes and (nodes[name].get("outage_s") or nodes[name].get("down"))]


def report_outages(nodes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """What clients of these nodes noticed, in lines for a terminal: of each node, or of many together."""
    down = [name for name in names if nodes[name].get("down")]
    lines = [f"{name} does not serve since its stop" for name in down]
    others = [name for name in names if name not in down]
    if len(others) > LISTED:
        seconds = [nodes[name]["outage_s"] for name in others]
        return [*lines, f"{len(others)} nodes did not serve for {min(seconds):,.1f} to {max(seconds):,.1f} s each"]
    return lines + [f"{name} did not serve for {report_outage(nodes[name])}" for name in others]


def report_notes(nodes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The notes of these nodes, in lines for a terminal: each once, with the nodes that have it."""
    having: dict[str, list[str]] = {}
    for name in names:
        for note in nodes.get(name, {}).get("notes") or []:  # none in older reports
            having.setdefault(note, []).append(name)
    return [
        f"{', '.join(some) if len(some) <= LISTED else f'{len(some)} nodes'}: {note}" for note, some in having.items()
    ]


def report_first(urls: Sequence[str]) -> str:
    """The first addresses, and how many more there are."""
    more = len(urls) - LISTED
    return ", ".join(urls[:LISTED]) + (f" and {more} more" if more > 0 else "")


def report_figures(benchmark: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a benchmark's table: its own figure, then that of each reference table."""
    rows = []
    for name, statistic, title in FIGURES:
        unit = "ms" if statistic else "tok/s"
        values = [_value(source, name, statistic) for source in (benchmark, *benchmark["reference"])]
        rows.append({"title": title, "values": [quantity(value, unit) for value in values]})
    return rows


def report_plots(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plots, grouped by workload, since figures of different ones do not compare.

    Lengths are per cent of the plot's width, so that text keeps its size on a phone.
    """
    groups: dict[tuple[int, ...], dict[str, Mapping[str, Any]]] = {}
    for name, node in report["nodes"].items():
        if node["benchmark"]:
            key = tuple(int(node["benchmark"]["workload"][part]) for part in WORKLOAD)
            groups.setdefault(key, {})[name] = node["benchmark"]
    result = []
    for key, benchmarks in groups.items():
        references = {table["name"]: table for one in benchmarks.values() for table in one["reference"]}
        words = workload_words(dict(zip(WORKLOAD, key)))
        plots = [_plot(benchmarks, references, plot) for plot in PLOTS]
        result.append({"workload": words, "plots": plots, "reference": bool(references)})
    return result


def workload_words(workload: Mapping[str, Any]) -> str:
    return (
        f"{workload['input_len']:,} tokens in, {workload['output_len']:,} out, "
        f"{workload['num_prompts']:,} prompts, {workload['max_concurrency']:,} at a time"
    )


def _value(source: Mapping[str, Any], name: str, statistic: str) -> float | None:
    value = source.get(name)
    if isinstance(value, Mapping):
        value = value.get(statistic)
    return None if value is None else float(value)


def _plot(
    benchmarks: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, Mapping[str, Any]],
    plot: tuple[str, str, str, str],
) -> dict[str, Any]:
    name, title, unit, hint = plot
    sources = {**benchmarks, **references}
    means = {label: _value(source, name, "mean") for label, source in sources.items()}
    p99s = {label: _value(source, name, "p99") if unit == "ms" else None for label, source in sources.items()}
    most = max((figure for figure in [*means.values(), *p99s.values()] if figure), default=1.0)
    rows = []
    for label in sources:
        mean, p99 = means[label], p99s[label]
        rows.append(
            {
                "label": label,
                "reference": label in references,
                "width": round(100 * (mean or 0) / most, 2),
                "p99_width": round(100 * (p99 or 0) / most, 2),
                "words": quantity(mean, unit) + (f" · P99 {quantity(p99, unit)}" if unit == "ms" else ""),
            }
        )
    return {"title": title, "hint": hint, "rows": rows}


def report_finding(report: Mapping[str, Any], hosts: Sequence[str], path: str) -> str:
    """Which of these nodes are not ok, in one line; empty where all are."""
    wrong = [f"{name}: {node['reason']}" for name, node in report["nodes"].items() if name in hosts and not node["ok"]]
    return f"not ok: {'; '.join(wrong)}. See {path}" if wrong else ""


def report_endpoints(hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What clients put before /v1, for each host."""
    edges = [edge_of(host, hostvars[host]) for host in hosts]
    places = [f"[{edge['public']}]" if ":" in edge["public"] else edge["public"] for edge in edges]
    return [
        f"http{'s' if edge['tls'] else ''}://{place}:{edge['port']}" for edge, place in zip(edges, places, strict=True)
    ]


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        return {
            "report_collect": report_collect,
            "report_endpoints": report_endpoints,
            "report_first": report_first,
            "report_figures": report_figures,
            "report_finding": report_finding,
            "report_merge": report_merge,
            "report_node": report_node,
            "report_notes": report_notes,
            "report_outage": report_outage,
            "report_outages": report_outages,
            "report_interrupted": report_interrupted,
            "report_plots": report_plots,
            "report_verdict": report_verdict,
            "report_weights": report_weights,
            "weights_words": weights_words,
            "workload_words": workload_words,
        }
