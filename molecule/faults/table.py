#!/usr/bin/env python3
"""Writes docs/faults.md from the results of the last `make faults`, which must hold every case that there is.

table.py node-life, weights or airgap writes the part of that suite alone, from the results of its last run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "results/faults/cases"
TARGET = ROOT / "docs/faults.md"
# The parts that other suites write: their titles, and what they hold.
PARTS = {
    "node-life": (
        "## A node on its own",
        "Written by `make node-life`: what the system, the network and the provider do to a node while no run is\n"
        "under way, or before the first one, and how it ends. Each was done for real to a node that serves, with\n"
        "nobody there to help, unless a run is named.",
    ),
    "airgap": (
        "## A site without a way out",
        "Written by `make airgap`: a bundle is made, carried to a site's mirror, and a bare node goes from there to\n"
        "serving with real vLLM. The kernel drops and counts what the node and the mirror send anywhere else.",
    ),
    "weights": (
        "## Nodes that share the download",
        "Written by `make weights`: four nodes bring the image and the weights together, with real systemd, nginx,\n"
        "Docker and the hub's own client. Hub and registry count how often they are asked for each file or layer.",
    ),
}
AREAS = ("Control", "Balancer", "Artifacts", "Engine", "Host", "Zz secrets")


def sections() -> dict[str, str]:
    """The page, by the titles of its parts; what is before the first one has none."""
    parts = re.split(r"(?m)^(?=## )", TARGET.read_text())
    return {part.partition("\n")[0] if part.startswith("## ") else "": part.rstrip() for part in parts}


def part(suite: str) -> int:
    """The part of another suite: what each test did, by its name, and how long it took."""
    title, words = PARTS[suite]
    cases = list(ET.parse(ROOT / f"results/test/{suite}.xml").getroot().iter("testcase"))
    bad = [str(case.get("name")) for case in cases if len(case)]
    if bad:
        print(f"table: {', '.join(bad)} did not pass: docs/faults.md was not written", file=sys.stderr)
        return 1
    lines = [title, "", words, "", "| what happened, and how it ended | seconds |", "|---|---|"]
    for case in cases:
        name, _, kind = str(case.get("name")).removesuffix("]").partition("[")
        words = name.removeprefix("test_").replace("_", " ")
        lines.append(f"| {words}{f' ({kind})' if kind else ''} | {float(case.get('time', 0)):.0f} |")
    TARGET.write_text("\n\n".join({**sections(), title: "\n".join(lines)}.values()) + "\n")
    print(f"{len(cases)} rows of {suite} in docs/faults.md")
    return 0


def main() -> int:
    if sys.argv[1:]:
        return part(sys.argv[1])
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
    titles = [title for title, _ in PARTS.values()]
    kept = [text for title, text in sections().items() if title in titles]
    TARGET.write_text("\n\n".join(["\n".join(lines).rstrip(), *kept]) + "\n")
    counts = Counter(row["area"] for row in rows)
    print(
        f"{len(rows)} faults in docs/faults.md: "
        + ", ".join(f"{area.removeprefix('Zz ').capitalize()} {counts[area]}" for area in AREAS)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
