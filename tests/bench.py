#!/usr/bin/env python3
"""`make bench`: what a run of site.yml costs for 1, 4 and 16 light nodes, from bare and converged.

Prints a table and writes results/bench/bench.json. The nodes are containers on this machine, so wall time holds
their work too; round trips and the controller's CPU time are the figures that carry over to real nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INVENTORY = "molecule/bench/inventory"
RESULTS = ROOT / "results" / "bench"
COLUMNS = ("nodes", "from", "wall_s", "controller_cpu_s", "round_trips_per_node", "round_trips_max")


def playbook(*arguments: str, log: Path, count: int, measure: Path | None = None) -> None:
    """Runs ansible-playbook over `count` nodes, its output in `log`; stops the bench where it fails."""
    env = {**os.environ, "GLM_BENCH_NODES": str(count), "ANSIBLE_FORCE_COLOR": "0"}
    if measure:
        env |= {"ANSIBLE_CALLBACKS_ENABLED": "round_trips", "ROUND_TRIPS_JSON": str(measure)}
    with log.open("w") as out:
        code = subprocess.run(
            ["ansible-playbook", *arguments, "-i", INVENTORY], cwd=ROOT, env=env, stdout=out, stderr=out, check=False
        ).returncode
    if code:
        sys.exit(f"bench: {' '.join(arguments)} failed with exit code {code}: see {log}")


def measured(path: Path, count: int, start: str) -> dict[str, Any]:
    """One row of the table from what the round_trips callback wrote."""
    data = json.loads(path.read_text())
    trips = [host["round_trips"] for name, host in data.items() if name.startswith("bench-")]
    return {
        "nodes": count,
        "from": start,
        "wall_s": round(data["wall_s"], 1),
        "controller_cpu_s": round(data["controller_cpu_s"], 1),
        "round_trips_per_node": round(sum(trips) / len(trips), 1),
        "round_trips_max": max(trips),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("counts", nargs="*", type=int, default=[1, 4, 16], help="numbers of nodes (default: 1 4 16)")
    counts = parser.parse_args().counts
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in counts:
        playbook("molecule/shared/destroy.yml", log=RESULTS / "destroy.log", count=max(counts))
        playbook("molecule/shared/create.yml", log=RESULTS / f"create-{count}.log", count=count)
        for start in ("bare", "converged"):
            print(f"bench: {count} node(s), {start} ...", flush=True)
            measure = RESULTS / f"{start}-{count}.json"
            playbook("site.yml", log=RESULTS / f"{start}-{count}.log", count=count, measure=measure)
            rows.append(measured(measure, count, start))
    playbook("molecule/shared/destroy.yml", log=RESULTS / "destroy.log", count=max(counts))
    machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
    (RESULTS / "bench.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print("  ".join(f"{name:>20}" for name in COLUMNS))
    for row in rows:
        print("  ".join(f"{row[name]!s:>20}" for name in COLUMNS))
    print(f"bench: the same as JSON in {RESULTS.relative_to(ROOT)}/bench.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
