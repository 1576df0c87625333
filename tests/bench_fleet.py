#!/usr/bin/env python3
"""`make bench-fleet`: what runs over 4, 16 and 48 light nodes cost the controller and the nodes.

Of each number of nodes: from bare, converged, a rolling upgrade in waves, and status. Prints a table, writes
results/bench-fleet/bench.json and a plot of each figure, and fails where a node of the largest fleet costs over a
tenth more than one of the smallest. The nodes are containers on this machine, so wall time holds their work too, and
`waits`, the round trips that only follow a long step on; round trips, the controller's CPU time and its memory carry
over to real nodes.

The same work takes more CPU time while other machines use the caches, and a virtual machine is not as fast at any hour.
So the largest fleet is the first, its machines stay for the smaller ones, and only those that are used again are made
anew. And all through each run a fixed piece of work is timed, `calibration_s`; rows are compared by
`normalised_cpu_per_node`, the CPU time in such pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pygal

ROOT = Path(__file__).resolve().parent.parent
INVENTORY = "molecule/bench/inventory"
RESULTS = ROOT / "results" / "bench-fleet"
COLUMNS = (
    *("nodes", "run", "wall_s", "cpu_s", "cpu_s_per_node", "calibration_s", "normalised_cpu_per_node"),
    *("peak_mib", "trips_per_node", "waits_per_node"),
)
UPGRADE = json.dumps({"glm_rollout_waves": [1, "10%", "25%"], "light_release": "2"})
RUNS: dict[str, list[str]] = {
    "bare": ["site.yml"],
    "converged": ["site.yml"],
    "upgrade": ["site.yml", "-e", UPGRADE],
    "status": ["playbooks/status.yml"],
}
PLOTS = {
    "cpu_s_per_node": "Controller CPU per node (s)",
    "normalised_cpu_per_node": "Controller CPU per node (pieces of fixed work)",
    "trips_per_node": "Round trips per node",
    "peak_mib": "Controller's peak memory (MiB)",
    "wall_s": "Wall time (s)",
}
GROWTH = 1.1  # of the cost per node, from the smallest fleet to the largest
STATUS_SECONDS = 20
CALIBRATION = [sys.executable, "-c", "import ansible.playbook"]
CALIBRATION_PAUSE = 5.0  # seconds from one piece of fixed work to the next
MEMORY_PAUSE = 1.0


def calibration() -> float:
    """CPU seconds that a fixed piece of work takes."""
    _, status, usage = os.wait4(os.posix_spawn(CALIBRATION[0], CALIBRATION, os.environ), 0)
    if status:
        sys.exit(f"bench-fleet: {' '.join(CALIBRATION)} failed")
    return usage.ru_utime + usage.ru_stime


def tree_memory(root: int) -> int:
    """Bytes that a process and its descendants have to themselves; shared pages count once."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total * 1024


def samples(sample: Callable[[], float], pause: float, ended: threading.Event) -> list[float]:
    """What `sample` returns at once, then after each pause until the end."""
    taken = [sample()]
    while not ended.wait(pause):
        taken.append(sample())
    return taken


def start(*arguments: str, log: Path, count: int, **env: str) -> subprocess.Popen[bytes]:
    """Starts ansible-playbook over `count` nodes, its output in `log`."""
    env = {**os.environ, "GLM_BENCH_NODES": str(count), "ANSIBLE_FORCE_COLOR": "0", **env}
    with log.open("w") as out:
        return subprocess.Popen(
            ["ansible-playbook", *arguments, "-i", INVENTORY], cwd=ROOT, env=env, stdout=out, stderr=out
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a playbook; ends the bench where it fails."""
    if process.wait():
        sys.exit(f"bench-fleet: {process.args!r} failed with exit code {process.returncode}: see {log}")


def measure(*arguments: str, log: Path, count: int, trips: Path) -> tuple[float, float]:
    """Runs a playbook, with what the round_trips callback counts in `trips`.

    Returns the most memory that it had, in bytes, and the median time of the calibration beside it, in seconds.
    """
    ended = threading.Event()
    callbacks = "glm.fleet.freeze_heap,glm.fleet.round_trips"
    process = start(*arguments, log=log, count=count, ANSIBLE_CALLBACKS_ENABLED=callbacks, ROUND_TRIPS_JSON=str(trips))
    with ThreadPoolExecutor() as pool:
        memory = pool.submit(samples, lambda: tree_memory(process.pid), MEMORY_PAUSE, ended)
        loops = pool.submit(samples, calibration, CALIBRATION_PAUSE, ended)
        try:
            finish(process, log)
        finally:
            ended.set()
    return max(memory.result()), statistics.median(loops.result())


def prepare(playbook: str, count: int, log: Path) -> None:
    """Makes or removes the machines, unmeasured."""
    finish(start(f"molecule/shared/{playbook}.yml", log=log, count=count), log)


def remove(count: int) -> None:
    """Removes the machines of the first `count` nodes, so that they are made anew."""
    names = [f"glm-bench-{number:02}" for number in range(1, count + 1)]
    subprocess.run(["docker", "rm", "--force", "--volumes", *names], check=True, stdout=subprocess.DEVNULL)


def row_of(path: Path, count: int, run: str, memory: float, loop: float) -> dict[str, Any]:
    """One row of the table from what the round_trips callback wrote."""
    data = json.loads(path.read_text())
    hosts = [host for name, host in data.items() if name.startswith("bench-")]
    return {
        "nodes": count,
        "run": run,
        "wall_s": round(data["wall_s"], 1),
        "cpu_s": round(data["controller_cpu_s"], 1),
        "cpu_s_per_node": round(data["controller_cpu_s"] / count, 2),
        "calibration_s": round(loop, 3),
        "normalised_cpu_per_node": round(data["controller_cpu_s"] / loop / count, 1),
        "peak_mib": round(memory / 2**20),
        "trips_per_node": round(sum(host["round_trips"] - host["waits"] for host in hosts) / count, 1),
        "waits_per_node": round(sum(host["waits"] for host in hosts) / count, 1),
    }


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    widths = {name: max(len(name), len("1234.5")) for name in COLUMNS} | {"run": max(map(len, RUNS))}
    return "  ".join(f"{row[name]!s:>{widths[name]}}" for name in COLUMNS)


def plot(rows: list[dict[str, Any]], column: str, title: str, path: Path) -> None:
    """One figure over the number of nodes, a line for each run."""
    counts = sorted({row["nodes"] for row in rows})
    chart = pygal.Line(title=title, x_title="nodes", range_min=0, width=640, height=400, js=(), legend_at_bottom=True)
    chart.x_labels = [str(count) for count in counts]
    for run in RUNS:
        values = {row["nodes"]: row[column] for row in rows if row["run"] == run}
        chart.add(run, [values.get(count) for count in counts])
    chart.render_to_file(str(path))


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """What is over the budgets."""
    found = []
    for run in RUNS:
        of_run = sorted((row for row in rows if row["run"] == run), key=lambda row: int(row["nodes"]))
        small, large = of_run[0], of_run[-1]
        for name in ("normalised_cpu_per_node", "trips_per_node"):
            if large[name] > GROWTH * small[name]:
                found.append(
                    f"{run}: {name} is {large[name]} at {large['nodes']} nodes, {small[name]} at {small['nodes']}"
                )
        if run == "status" and (large["trips_per_node"] > 1 or large["wall_s"] > STATUS_SECONDS):
            found.append(
                f"status: {large['wall_s']} s and {large['trips_per_node']} round trips at {large['nodes']} nodes"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("counts", nargs="*", type=int, default=[4, 16, 48], help="numbers of nodes (default: 4 16 48)")
    counts = sorted(parser.parse_args().counts, reverse=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    prepare("destroy", max(counts), RESULTS / "destroy.log")
    for count in counts:
        if count < max(counts):
            remove(count)
        prepare("create", count, RESULTS / f"create-{count}.log")
        for run, arguments in RUNS.items():
            print(f"bench-fleet: {count} nodes, {run} ...", flush=True)
            trips = RESULTS / f"{run}-{count}.json"
            memory, loop = measure(*arguments, log=RESULTS / f"{run}-{count}.log", count=count, trips=trips)
            rows.append(row_of(trips, count, run, memory, loop))
            print(line(rows[-1]), flush=True)
    prepare("destroy", max(counts), RESULTS / "destroy.log")
    over = findings(rows)
    machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
    (RESULTS / "bench.json").write_text(json.dumps({"machine": machine, "rows": rows, "over": over}, indent=2) + "\n")
    for column, title in PLOTS.items():
        plot(rows, column, title, RESULTS / f"{column}.svg")
    print(line({name: name for name in COLUMNS}))
    for row in sorted(rows, key=lambda row: int(row["nodes"])):
        print(line(row))
    print(f"bench-fleet: the same as JSON and as plots in {RESULTS.relative_to(ROOT)}/")
    for finding in over:
        print(f"bench-fleet: over the budget: {finding}", file=sys.stderr)
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
