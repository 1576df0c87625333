"""What happened in a run, in order, one JSON object a line; and what can be read from it afterwards.

Each line has `at` (UTC, ISO 8601) and `what`:

    begin     command, inventory, limit, check, pid
    play      play, waves (whether it goes through the nodes in waves)
    wave      number (from 1), host             its turn begins
    phase     host, phase                      what is being done to a node
    approval  wave                             the answer to a pause is waited for
    result    host, outcome (changed, failed, unreachable), role, task, seconds, message, failure (id, host, text,
              fix, unit, nothing_changed)
    progress  host, text                       of a long step; of a download also done, total (bytes), rate (bytes/s),
              sources (bytes by where they came from)
    fact      host, name, value                verify, benchmark, weights, command or verdict
    entry     host, entry                      of the node in report.json
    stats     changed, failures, dark, rescued, processed   counts by host
    end       exit_code, messages, hosts

A line holds what Ansible shows, never arguments, variables or the environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from glm_fleet.errors import FULL, UsageProblem

Line = dict[str, Any]
KEPT = 50  # runs of an inventory
MEMORY = Path("/dev/shm")  # noqa: S108  only for directories of mkdtemp


@dataclass(frozen=True)
class Run:
    """The directory of a run, which nobody else can read."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def journal(self) -> Path:
        return self.directory / "journal.jsonl"

    @property
    def output(self) -> Path:
        """What ansible-playbook printed."""
        return self.directory / "output.log"

    @property
    def private(self) -> Path:
        """What the run needs while it lasts, settings among it. In memory, where it can be: a full disk ends no run."""
        return self.directory / "private"

    def make_private(self) -> None:
        parent = MEMORY if os.access(MEMORY, os.W_OK) else self.directory
        place = tempfile.mkdtemp(prefix="glm-fleet.", dir=parent)
        try:
            self.private.symlink_to(place)
        except OSError:
            shutil.rmtree(place)
            raise

    def remove_private(self) -> None:
        shutil.rmtree(self.private.resolve(), ignore_errors=True)
        with suppress(OSError):
            self.private.unlink()

    def lines(self) -> Iterator[Line]:
        """The lines that are whole: the last one of a run that was cut off, or met a full disk, may not be."""
        # Not splitlines(): what a node says may hold a line separator of Unicode.
        for text in self.journal.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                yield json.loads(text)

    def entries(self) -> dict[str, Any]:
        """What the report is made of: the last entry of each node, and when the run began and ended.

        Empty for a run that has deployed nothing, or only looked what it would.
        """
        lines = list(self.lines())
        if not lines or lines[0].get("check"):
            return {}
        found = {line["host"]: line["entry"] for line in lines if line["what"] == "entry"}
        return {"entries": found, "started": lines[0]["at"], "finished": lines[-1]["at"]} if found else {}

    def alive(self) -> bool:
        """Whether its process, of this machine, is still there."""
        pid = next(self.lines(), {}).get("pid", 0)
        return bool(pid) and Path(f"/proc/{pid}").exists()


def opened(path: Path) -> TextIO:
    """A file to append to that nobody else can read, whatever the locale."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")


class Writer:
    """Appends lines."""

    def __init__(self, run: Run) -> None:
        self.file = opened(run.journal)

    def write(self, what: str, **facts: Any) -> Line:
        line = {"at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "what": what, **facts}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()
        return line

    def close(self) -> None:
        self.file.close()


class Follower:
    """Reads the lines that were added since."""

    def __init__(self, run: Run) -> None:
        self.file = run.journal.open(encoding="utf-8", errors="replace", newline="\n")
        self.rest = ""

    def new(self) -> Iterator[Line]:
        *whole, self.rest = (self.rest + self.file.read()).split("\n")
        for text in whole:
            with suppress(ValueError):
                yield json.loads(text)

    def close(self) -> None:
        self.file.close()


class Copy:
    """Brings to the disk of the controller what was added since; what finds no room is left for the next time."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source = source.open("rb", buffering=0)
        self.target = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.rest = b""

    def go_on(self) -> None:
        self.rest += self.source.read()
        while self.rest:
            self.rest = self.rest[os.write(self.target, self.rest) :]

    def close(self) -> None:
        self.source.close()
        os.close(self.target)


def create(runs: Path, command: str) -> Run:
    """A new run; the oldest ones beyond KEPT go. Raises UsageProblem where the directory cannot be written."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for number in range(100):
            directory = runs / f"{stamp}-{command}{f'-{number}' if number else ''}"
            try:
                directory.mkdir(mode=0o700)
                break
            except FileExistsError:
                continue
    except OSError as problem:
        raise unwritable(runs, problem) from problem
    others = [run for run in known(runs) if run.directory != directory]
    for run in others:
        # What a run that was killed could not take away itself.
        if os.path.lexists(run.private) and not run.alive():
            run.remove_private()
    old = others[: -KEPT + 1]
    deployed = last_deployment(others) if old else None  # its report can be asked for
    for run in old:
        if run != deployed and not run.alive():
            shutil.rmtree(run.directory, ignore_errors=True)
    return Run(directory)


def unwritable(runs: Path, problem: OSError) -> UsageProblem:
    advice = "free some" if problem.errno in FULL else "mend it"
    return UsageProblem(
        f"{runs}: the directory of the runs cannot be written ({problem.strerror}): {advice}, or pass --runs DIR"
    )


def last_deployment(runs: list[Run]) -> Run | None:
    """The last of these that has deployed something."""
    return next((run for run in reversed(runs) if run.entries()), None)


def known(runs: Path) -> list[Run]:
    """Every run with a journal that can be read, the oldest first."""
    names = [path for path in runs.glob("*") if re.match(r"\d{8}T\d{6}-", path.name)] if runs.is_dir() else []
    found = [Run(path) for path in names if os.access(path, os.R_OK | os.X_OK)]
    return sorted((run for run in found if run.journal.exists()), key=lambda run: run.name)


def find(runs: Path, name: str) -> Run:
    """A run by its name, or the last one that has deployed something. Raises UsageProblem where there is none."""
    found = known(runs)
    if name:
        wanted = [run for run in found if run.name == name]
        if not wanted:
            some = ", ".join(run.name for run in found[-5:]) or "none yet"
            raise UsageProblem(f"{name}: there is no such run in {runs} (the last: {some})")
        return wanted[0]
    deployed = last_deployment(found)
    if not deployed:
        raise UsageProblem(f"{runs}: no run there has deployed anything yet: glm-fleet up")
    return deployed
