#!/usr/bin/env python3
"""Writes the figures of README.md, docs/figures.md and docs/testing.md from what was measured in this clone.

Measures the demo itself: from bare, converged, verify alone. The suites' figures come from what `make fleet`,
`make faults` and `make bench-fleet` left under results/; those of a suite that has not run here stay as they are.

A figure stands in a cell that ends in `<!-- NAME -->`, NAME being a function below.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
FILES = ("README.md", "docs/figures.md", "docs/testing.md")
TABLE = re.compile(r"(<!-- bench -->\n)(?:\|.*\n)*")

FIGURES: dict[str, Callable[[], str]] = {}


def figure(function: Callable[[], str]) -> Callable[[], str]:
    """The function's name is the one of the figure."""
    FIGURES[function.__name__.replace("_", "-")] = function
    return function


def run(*command: str, **env: str) -> tuple[float, str]:
    """Seconds that a command takes, which must succeed, and what it prints."""
    began = time.monotonic()
    print(f"figures: {' '.join(command)}", file=sys.stderr)
    env = {**os.environ, **env}
    said = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return time.monotonic() - began, said


def words(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def found(pattern: str) -> list[str]:
    """What the groups of a pattern match in the counts of `make fleet`."""
    match = re.search(pattern, (RESULTS / "fleet/load.txt").read_text())
    if not match:
        raise FileNotFoundError("make fleet did not get that far")
    return list(match.groups())


def bench() -> dict[str, dict[int, dict[str, Any]]]:
    """Rows of `make bench-fleet` by run and number of nodes."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in json.loads((RESULTS / "bench-fleet/bench.json").read_text())["rows"]:
        rows.setdefault(row["run"], {})[row["nodes"]] = row
    return rows


def of_bench(column: str, runs: tuple[str, ...] = ("bare", "converged", "upgrade")) -> tuple[str, str]:
    """A column for the largest fleet and for the smallest."""
    rows = bench()
    sizes = sorted(rows[runs[0]])
    large, small = (", ".join(f"{rows[run][size][column]:g}" for run in runs) for size in (sizes[-1], sizes[0]))
    return large, small


@figure
def demo() -> str:
    run("make", "demo-down")
    return words(run("make", "demo")[0])


@figure
def converged() -> str:
    counts = RESULTS / "figures-trips.json"
    env = {"ANSIBLE_CALLBACKS_ENABLED": "glm.fleet.freeze_heap,glm.fleet.round_trips", "ROUND_TRIPS_JSON": str(counts)}
    command = ("ansible-playbook", "site.yml", "-i", "inventory/demo", "-e", "glm_benchmark=none")
    seconds, said = min(run(*command, **env) for _ in range(3))
    trips = [host["round_trips"] for host in json.loads(counts.read_text()).values() if isinstance(host, dict)]
    tasks = sum(map(int, re.findall(r"(?:ok|skipped)=(\d+)", said)))
    return f"{max(trips)}, {tasks}, {seconds:.1f} s"


@figure
def verify() -> str:
    return f"{run('ansible-playbook', 'playbooks/verify.yml', '-i', 'inventory/demo')[0]:.1f} s"


@figure
def checks() -> str:
    (node,) = json.loads((RESULTS / "demo/report.json").read_text())["nodes"].values()
    return f"{sum(check['ok'] for check in node['checks'])} of {len(node['checks'])}"


@figure
def fleet() -> str:
    sent, failed = found(r"requests sent (\d+), failed (\d+)")
    streams, cut = found(r"streams (\d+), cut (\d+)")
    return f"{int(sent):,} requests, {int(streams):,} of them streams: {failed} failed, {cut} cut"


@figure
def rolling_upgrade() -> str:
    wall, own, ratio = found(r"rolling upgrade of 3 nodes: (\d+) s, .*starts (\d+) s: ([\d.]+)")
    return f"{wall} s against {own} s: {ratio} (allowed 1.15)"


@figure
def watchdog() -> str:
    kinds = ("accepts and never answers", "frozen")
    return ", ".join(found(rf"engine that {kind}: serves again after (\d+ s)")[0] for kind in kinds)


@figure
def faults() -> str:
    rows = [json.loads(path.read_text()) for path in (RESULTS / "faults/cases").glob("*.json")]
    if not rows:
        raise FileNotFoundError("make faults did not run")
    sent, lost = sum(row["requests"] for row in rows), sum(row["lost"] for row in rows)
    return f"{len(rows)}; {sent:,} requests, {lost} lost, all by what the fault itself had stopped or killed"


@figure
def overhead() -> str:
    walls = json.loads((RESULTS / "faults/overhead.json").read_text())
    ours, bare = min(walls["glm-fleet"]), min(walls["ansible-playbook"])
    return f"{ours:.1f} s beside {bare:.1f} s: {walls['ratio']:.2f}"


@figure
def bench_trips() -> str:
    large, small = of_bench("trips_per_node")
    return f"{large} ({small} at {min(bench()['bare'])})"


@figure
def bench_cpu() -> str:
    return " s beside ".join(of_bench("cpu_s_per_node")) + " s"


@figure
def bench_memory() -> str:
    rows = bench()
    size = max(rows["bare"])
    most = max(rows[run][size]["peak_mib"] for run in rows)
    return f"{most / 1024:.1f} GiB at most; {rows['status'][size]['wall_s']} s"


def bench_table() -> str:
    """The rows of docs/testing.md."""
    columns = ("wall_s", "cpu_s_per_node", "normalised_cpu_per_node", "peak_mib", "trips_per_node", "waits_per_node")
    lines = ["| run | nodes | wall s | controller CPU s a node | the same in pieces of fixed work | peak MiB "
             "| round trips a node | waits |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, sizes in bench().items():
        for size, row in sorted(sizes.items()):
            lines.append(f"| {name} | {size} | {' | '.join(str(row[column]) for column in columns)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    texts = {name: (ROOT / name).read_text() for name in FILES}
    marks = {name for text in texts.values() for name in re.findall(r"<!-- ([a-z-]+) --> *\|", text)}
    if unknown := sorted(marks - FIGURES.keys()) + sorted(FIGURES.keys() - marks):
        print(f"figures: on one side alone, here or in {', '.join(FILES)}: {', '.join(unknown)}", file=sys.stderr)
        return 2
    for mark, measure in FIGURES.items():
        try:
            value = measure()
        except FileNotFoundError as error:
            print(f"{mark}: stays as it is: {error.filename or error}")
            continue
        print(f"{mark}: {value}")
        for name, text in texts.items():
            texts[name] = re.sub(rf"\| [^|\n]* (<!-- {mark} -->) \|", rf"| {value} \1 |", text)
    try:
        table = bench_table()
        texts = {name: TABLE.sub(lambda match: match[1] + table, text) for name, text in texts.items()}
    except FileNotFoundError:
        pass  # said above
    for name, text in texts.items():
        (ROOT / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
