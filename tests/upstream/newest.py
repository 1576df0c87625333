#!/usr/bin/env python3
"""Reads the newest release of each engine, and the pinned ones, and writes docs/upstream.md: `make upstream`.

Exit code 1 if the newest of an engine lacks what the project believes of it, or cannot be read.
"""

from __future__ import annotations

import datetime
import sys

import archives
import beliefs

PAGE = beliefs.ROOT / "docs/upstream.md"
HEAD = """<!-- Made by `make upstream` (tests/upstream/newest.py): run that. -->
# The engines' releases, and what this project believes of them

Flags, variables, metrics, log lines, paths, parser names and the benchmark clients' options and figures, as engines/,
the profiles, roles and plugins name them, looked up in the engines' own source. The packages are read as files; none is
installed or run. `make test` looks into the pinned releases, `make upstream` into the newest as well.
"""


def main() -> int:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    beside = [archives.pinned(*pin) for pin in archives.pins() if pin[0] not in beliefs.ENGINES]
    pins = [pin for pin in archives.pins() if pin[0] in beliefs.ENGINES]
    rows, wrong, notes = [], [], []
    for engine in beliefs.ENGINES:
        fetched = archives.newest(engine)
        newest = (engine, str(fetched.version))
        all_judged = []
        for pin in [*(pin for pin in pins if pin[0] == engine and pin != newest), newest]:
            print(f"upstream · reading {' '.join(pin)}", flush=True)
            judged = beliefs.judge(fetched if pin == newest else archives.pinned(*pin), beside)
            all_judged.append(judged)
            bad = [answer for answer in judged.answers if answer.outcome in ("missing", "unread")]
            notes += [f"- {answer} ({answer.belief.origin})" for answer in bad]
            if pin == newest:
                wrong += [str(answer) for answer in bad]
            count = {
                kind: sum(a.outcome == kind for a in judged.answers)
                for kind in ("found", "explained", "missing", "unread")
            }
            name = f"{judged.release}, the newest" if pin == newest else judged.release
            rows.append(f"| {name} | {len(judged.answers)} | " + " | ".join(map(str, count.values())) + " |")
        notes += [
            f"- {engine}: no release writes the line of `{part}`" for part in beliefs.never_logged(engine, all_judged)
        ]
    table = ["| release | beliefs | found | explained | missing | not readable |", "|---|---|---|---|---|---|", *rows]
    reasons = [f"- {_name(entry)}: {entry['why']}" for entry in beliefs.EXTRA["explained"]]
    parts = [HEAD, f"Read on {today}:\n", *table, "\n## Missing\n", *(notes or ["Nothing."])]
    PAGE.write_text("\n".join([*parts, "\n## Explained\n", *reasons]) + "\n", encoding="utf-8")
    print("\n".join([*table, *notes, f"written to {PAGE.relative_to(beliefs.ROOT)}"]))
    return int(bool(wrong))


def _name(entry: dict[str, str]) -> str:
    where = " ".join(f"{word} {entry[key]}" for key, word in (("since", "from"), ("until", "up to")) if key in entry)
    return f"{entry.get('engine', '')} {entry['kind']} `{entry['name']}` {where}".strip()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except archives.NotFetched as problem:
        sys.exit(f"upstream · error: {problem}")
