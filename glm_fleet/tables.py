"""What a command prints once it has run."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from glm_fleet import journal
from glm_fleet.errors import Exit
from glm_fleet.playbook import Outcome
from glm_fleet.view import Screen, State

WRAPS, BREAKS = 20, 40  # columns from which a cell may go on in the next line, and from which a word may
WARNED = 14  # days before its end from which on a key is marked


@dataclass
class Shown:
    """What a run has left: what was seen of its nodes, and its journal where that stays."""

    state: State
    run: journal.Run | None


class Grid:
    """A table without lines that leaves nothing out: columns that do not fit beside the others follow below them."""

    def __init__(self, *columns: str, keys: int = 1, numbers: bool = False) -> None:
        """The first `keys` columns say what a row is about; the others may be `numbers`."""
        self.columns, self.keys, self.numbers = columns, keys, numbers
        self.rows: list[list[Text]] = []

    def row(self, *cells: str | Text) -> None:
        texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self.rows.append([Text(text.plain.replace("\n", " "), text.style) for text in texts])

    def show(self, console: Screen) -> None:
        if not self.rows:
            return
        needs = [self._needs(column) for column in range(len(self.columns))]
        for number, part in enumerate(self._parts(needs, console.width)):
            if number:
                console.print()
            table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False, header_style="dim")
            fits = self._room(part, needs) <= console.width
            for column in part:
                least = needs[column] if fits else None
                side: JustifyMethod = "right" if self.numbers and column >= self.keys else "left"
                table.add_column(self.columns[column], min_width=least, overflow="fold", justify=side)
            for row in self.rows:
                table.add_row(*(row[column] for column in part))
            console.print(table)

    def _needs(self, column: int) -> int:
        """The least width that a column reads well in."""
        texts = [Text(self.columns[column]), *(row[column] for row in self.rows)]
        longest = max(text.cell_len for text in texts)
        word = max(cell_len(word) for text in texts for word in ["", *text.plain.split()])
        return min(longest, max(WRAPS, min(word, BREAKS)))

    def _parts(self, needs: list[int], width: int) -> list[list[int]]:
        """Columns by table: each table has the keys and as many others as fit."""
        keys = list(range(self.keys))
        parts = [keys]
        for column in range(self.keys, len(self.columns)):
            if self._room([*parts[-1], column], needs) > width and parts[-1] != keys:
                parts.append(keys)
            parts[-1] = [*parts[-1], column]
        return parts

    @staticmethod
    def _room(part: list[int], needs: list[int]) -> int:
        return sum(needs[column] + 2 for column in part) - 2


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def short(value: Any) -> str:
    """A digest or a commit as people tell them apart."""
    return str(value or "-").removeprefix("sha256:")[:12]


def status_of(shown: Shown) -> dict[str, Any]:
    """By node, as playbooks/status.yml hands it over."""
    return {node: facts["status"] for node, facts in shown.state.facts.items() if "status" in facts}


def status(shown: Shown, console: Screen) -> None:
    found = status_of(shown)
    if not found:
        return
    table = Grid("NODE", "ROTATION", "PHASE", "RELEASE", "IMAGE", "WEIGHTS", "DRIVER", "IN FLIGHT", "VERIFIED")
    for node, seen in found.items():
        rotation = str(seen.get("rotation") or "-")
        phase = str(seen.get("phase") or "-")
        verified = seen.get("verified") or {}
        said = Text("-", "dim")
        if verified:
            said = (
                Text(str(verified["time"]))
                if verified["ok"]
                else Text("FAILED " + ", ".join(verified["failed"]), "red")
            )
        flight = seen.get("in_flight")
        table.row(
            node,
            Text(rotation, "green" if rotation == "in" else "yellow"),
            Text(phase, "green" if phase == "serving" else "yellow"),
            short(seen.get("release")),
            short(seen.get("image_digest")),
            short(seen.get("model_revision")),
            str(seen.get("driver") or "-"),
            "-" if flight is None else str(flight),
            said,
        )
    table.show(console)
    for node, seen in found.items():
        if seen.get("reason"):
            console.print(f"{node}: {seen['reason']}", style="yellow", soft_wrap=True)


def launched(shown: Shown, console: Screen) -> None:
    """The instances that are there, as playbooks/launch.yml hands them over."""
    table = Grid("NODE", "ADDRESS", "REGION", "TYPE", "HOST KEY")
    for entry in shown.state.facts.get("localhost", {}).get("launch", {}).get("instances", []):
        key = Text("known", "green") if entry["host_key"] else Text("compare it", "yellow")
        table.row(entry["name"], entry.get("ip", "-"), entry["region"], entry["type"], key)
    table.show(console)


def checks(shown: Shown, console: Screen) -> None:
    table = Grid("NODE", "CHECK", "", "DETAIL", keys=2)
    for node, facts in shown.state.facts.items():
        for check in facts.get("verify", {}).get("checks", []):
            mark = Text("ok", "green") if check["ok"] else Text("FAILED", "bold red")
            table.row(node, check["name"], mark, Text(str(check.get("detail", "")), "dim"))
            node = ""  # noqa: PLW2901 (named once)
    table.show(console)


def benchmarks(shown: Shown, console: Screen) -> None:
    table = Grid("NODE", "OUTPUT tok/s", "TOTAL tok/s", "TTFT mean ms", "TPOT mean ms", "FAILED")
    for node, facts in shown.state.facts.items():
        found = facts.get("benchmark")
        if found:
            figures = (found["output_tok_s"], found["total_tok_s"], found["ttft_ms"]["mean"], found["tpot_ms"]["mean"])
            table.row(node, *(f"{figure:,.1f}" for figure in figures), str(found["failed"]))
    table.show(console)


def commands(shown: Shown, console: Screen) -> None:
    for facts in shown.state.facts.values():
        if "command" in facts:
            console.print(facts["command"], soft_wrap=True)


def keys_of(shown: Shown) -> dict[str, Any]:
    """The path of the file of keys, and what it holds; nothing where the run did not come so far."""
    return next((facts["keys"] for facts in shown.state.facts.values() if "keys" in facts), {})


def edges_of(shown: Shown) -> dict[str, Any]:
    """Of each edge that was asked, how it stands."""
    return {host: facts["edge"] for host, facts in shown.state.facts.items() if "edge" in facts}


def days_left(expires_at: int) -> int | None:
    return int((expires_at - time.time()) // 86400) if expires_at else None


def keys(shown: Shown, console: Screen) -> None:
    table = Grid("NAME", "DIGEST", "PER MINUTE", "AT ONCE", "EXPIRES", "DAYS LEFT")
    for key in keys_of(shown).get("keys", []):
        days = days_left(key["expires_at"])
        left = Text("-" if days is None else "expired" if days < 0 else str(days))
        if days is not None and days < WARNED:
            left.style = "red" if days < 0 else "yellow"
        counts = (str(key[limit] or "-") for limit in ("requests_per_minute", "concurrent"))
        table.row(key["name"], key["digest"], *counts, key["expires"] or "-", left)
    table.show(console)
    other_edges(shown, console, listed=True)


def other_edges(shown: Shown, console: Screen, *, listed: bool = False) -> None:
    """Of a list, which edges have other keys than the file; of another verb, which had."""
    lacks, has = ("lacks", "has besides") if listed else ("took", "gave up")
    for edge, seen in edges_of(shown).items():
        if not seen["asks_for_keys"]:
            console.print(f"{edge}: no edge that asks for keys yet", style="yellow", soft_wrap=True)
            continue
        changes = set(seen["added"]) & set(seen["removed"])
        lists = {
            lacks: set(seen["added"]) - changes, has: set(seen["removed"]) - changes, "other limits of": changes
        }  # fmt: skip
        parts = [f"{words} {', '.join(sorted(names))}" for words, names in lists.items() if names]
        if parts:
            console.print(f"{edge}: {'; '.join(parts)}", style="yellow" if listed else None, soft_wrap=True)


def new_key(shown: Shown, console: Screen) -> None:
    """The key alone, once: the run itself never says it."""
    key = key_of(shown)
    if key:
        console.print(key, soft_wrap=True)


def key_of(shown: Shown) -> str:
    """The key that the run has made, from its file."""
    found = keys_of(shown)
    if not found.get("new"):
        return ""
    lines = (line.split() for line in Path(found["path"]).read_text().splitlines())
    return next((words[0] for words in lines if words[1:2] == [found["new"]]), "")


def usage_of(shown: Shown) -> list[dict[str, Any]]:
    """A row for each node, day and key."""
    return [
        {"node": node, **row}
        for node, facts in shown.state.facts.items()
        for row in facts.get("usage", {}).get("rows", [])
    ]


def usage(shown: Shown, console: Screen, *, by: tuple[str, ...]) -> None:
    """Summed up for each key, node or day; `by` is which of them make a row."""
    names = ("requests", "refused", "failed", "broken_off", "unmeasured", "input", "cached", "output")
    sums: dict[tuple[str, ...], Counter[str]] = {}
    for row in usage_of(shown):
        sums.setdefault(tuple(row[part] for part in by), Counter()).update({name: row[name] for name in names})
    if sums:
        columns = [*(part.upper() for part in by), *(name.upper().replace("_", " ") for name in names)]
        table = Grid(*columns, keys=len(by), numbers=True)
        for parts, row in sorted(sums.items()):
            table.row(*parts, *(f"{row[name]:,}" for name in names))
        table.show(console)
    elif any("usage" in facts for facts in shown.state.facts.values()):
        console.print("No request in this time.")
    for node, facts in shown.state.facts.items():
        if lost := facts.get("usage", {}).get("lost_lines"):
            console.print(f"{node}: HAProxy could not log {lost} requests: they are not counted", style="yellow")


def runs(found: list[journal.Run], as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for run in found:
        lines = list(run.lines())
        code = lines[-1]["exit_code"] if lines and lines[-1]["what"] == "end" else None
        ended = "runs" if code is None and run.alive() else "cut off" if code is None else "ended"
        rows.append({"run": run.name, "began": lines[0]["at"] if lines else "", "state": ended, "exit_code": code})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Grid("RUN", "BEGAN", "EXIT CODE")
    for row in rows:
        table.row(row["run"], row["began"], str(row["exit_code"]) if row["state"] == "ended" else row["state"])
    table.show(Screen())


def report(path: Path, as_json: bool) -> None:
    found = read_json(path)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = Screen()
    table = Grid("NODE", "", "RELEASE", "IMAGE", "REASON")
    for node, entry in found["nodes"].items():
        mark = Text("ok", "green") if entry["ok"] else Text("not ok", "bold red")
        table.row(node, mark, short(entry["release"]), short(entry["image_digest"]), entry["reason"] or "")
    table.show(console)
    console.print(f"Report: {path.with_suffix('.html')}", style="dim", soft_wrap=True)


def summary(command: str, outcome: Outcome, shown: Shown) -> dict[str, Any]:
    """The result of a command as JSON."""
    found: dict[str, Any] = {
        "command": command,
        "exit_code": int(outcome.code),
        "messages": outcome.messages,
        "hosts": outcome.hosts,
    }
    if shown.run:
        found |= {"run": shown.run.name, "journal": str(shown.run.journal)}
    if command == "status":
        found["status"] = status_of(shown)
    elif command == "keys":
        found["keys"] = [{**key, "days_left": days_left(key["expires_at"])} for key in keys_of(shown).get("keys", [])]
        found["edges"] = edges_of(shown)
        found |= {"key": key_of(shown)} if key_of(shown) else {}
    elif shown.state.facts:
        found["nodes"] = {
            node: {name: value for name, value in facts.items() if name != "verdict"}
            for node, facts in shown.state.facts.items()
        }
    return found


HINTS = {
    Exit.FAILED: "a node failed",
    Exit.UNREACHABLE: "a node could not be reached",
    Exit.REFUSED: "refused, and nothing was changed",
    Exit.LOCKED: "another rollout holds the lock",
    Exit.USAGE: "it did not begin",
}


def epilogue(console: Screen, again: str, outcome: Outcome, shown: Shown, *, deploys: bool) -> None:
    """The last lines: how it ended, and where to look or what to run."""
    errors = Screen(stderr=True)
    for message in outcome.messages:
        for line in message.splitlines():
            errors.print(f"glm-fleet: {line}", soft_wrap=True)
    if outcome.code is Exit.INTERRUPTED:
        at = [
            f"{node} ({seen['phase']})"
            for node, seen in shown.state.nodes.items()
            if seen["phase"] not in ("waiting", "prepared", "done")
        ]
        where = f" in the middle of {', '.join(at)}" if at and not outcome.messages else ""
        errors.print(f"glm-fleet: ended{where}; to go on from here: {again}", soft_wrap=True)
    elif outcome.code is not Exit.OK:
        said = f"; what Ansible said: {shown.run.output}" if shown.run else ""
        line = f"glm-fleet: {HINTS[outcome.code]} (exit code {int(outcome.code)}){said}"
        errors.print(line, soft_wrap=True)
    elif deploys:
        for facts in shown.state.facts.values():
            if "verdict" in facts:
                console.print(facts["verdict"].rstrip(), soft_wrap=True)
