#!/usr/bin/env python3
"""Writes docs/faults.md from the results of the last `make faults`, which must hold every case that there is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "results/faults/cases"
TARGET = ROOT / "docs/faults.md"
AREAS = ("Control", "Balancer", "Artifacts", "Engine", "Host", "Zz secrets")


def main() -> int:
    rows = [json.loads(path.read_text()) for path in sorted(CASES.glob("*.json"))]
    collect = ["pytest", "molecule/faults", "-m", "not command_line", "--collect-only", "-qq"]
    wanted = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    count = sum(int(line.rpartition(":")[2]) for line in wanted.splitlines() if line.startswith("molecule/"))
    if len(rows) != count:
        print(f"table: {len(rows)} of {count} faults have a result: docs/faults.md was not written", file=sys.stderr)
        return 1
    sent, lost = sum(row["requests"] for row in rows), sum(row["lost"] for row in rows)
    lines = [
        "# Faults",
        "",
        "Written by `make faults` from its results: two gateways, two nodes with the light engine, clients with",
        "sessions and streams all through. Each fault was injected for real, and the end state asserted: every node in",
        "rotation on a release that was verified, at least one node offered at any time, no request lost but by an",
        "engine or a gateway that the fault itself takes.",
        "",
        f"**{len(rows)} faults, all survived; {sent:,} requests, {lost} lost.** Healthy after: seconds from the fault,",
        "or the start of the run that meets it, until both nodes were in rotation again; 0: neither ever left it.",
        "",
    ]
    for area in AREAS:
        lines += [
            f"## {area.removeprefix('Zz ').capitalize()}",
            "",
            "| fault | what happened | requests | lost | healthy after |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            if row["area"] == area:
                lost_words = f"{row['lost']}{' (' + row['spared'] + ')' if row['spared'] else ''}"
                what = row["what"].replace("|", "\\|")
                lines.append(f"| {row['fault']} | {what} | {row['requests']} | {lost_words} | {row['healthy_s']} s |")
        lines.append("")
    TARGET.write_text("\n".join(lines).rstrip() + "\n")
    counts = Counter(row["area"] for row in rows)
    print(
        f"{len(rows)} faults in docs/faults.md: "
        + ", ".join(f"{area.removeprefix('Zz ').capitalize()} {counts[area]}" for area in AREAS)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
