"""Runs a playbook through ansible-runner: what it says becomes lines of the journal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_fleet import journal
from glm_fleet.errors import Exit
from glm_fleet.events import Translator

ROOT = Path(__file__).resolve().parent.parent
# What ansible-playbook may see of the environment: a token that happens to be in it stays out of the run.
KEPT = re.compile(
    r"^(PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_.*|TERM|TMPDIR|TZ|SSH_AUTH_SOCK|VIRTUAL_ENV|COLUMNS|GLM_CACHE"
    r"|GLM_BENCH_NODES|(?i:https?|no)_(?i:proxy)|ANSIBLE_(?!.*(PASSWORD|TOKEN|SECRET)$).*)$"
)


@dataclass
class Order:
    """What to run: a playbook of this project and how it is called."""

    command: str
    playbook: str
    inventory: Path
    limit: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)  # others, for ansible-playbook
    keep: tuple[str, ...] = ()  # further variables of the environment
    waves: bool = False  # whether it can end after a wave


@dataclass
class Outcome:
    """How it ended."""

    code: Exit
    messages: list[str]
    hosts: dict[str, str]  # of each host: ok, changed, failed, unreachable


class Playbook:
    """One run. A signal is taken note of, and acted on by the run itself."""

    def __init__(self, order: Order, run: journal.Run, listen: Callable[[journal.Line], None]) -> None:
        self.order, self.run, self.listen = order, run, listen
        self.translator = Translator()
        self.writer = journal.Writer(run)
        self.results: list[journal.Line] = []
        self.said: list[str] = []  # what Ansible prints beside its events
        self.asked, self.now = False, False  # to end after the wave in hand; to stop at once
        # It holds the settings and the artifacts of ansible-runner, and goes with the run.
        self.private = run.private
        self.private.mkdir(mode=0o700)
        self.stop_file, self.approval_file = self.private / "stop", self.private / "approval"

    def tell(self, what: str, **facts: Any) -> None:
        line = self.writer.write(what, **facts)
        if what == "result":
            self.results.append(line)
        self.listen(line)

    def interrupt(self, *_: Any) -> None:
        """The first time: end after the wave in hand, where there are waves. Then: stop at once."""
        self.now = self.asked or not self.order.waves
        self.asked = True
        self.stop_file.touch()
        self.listen({"what": "interrupt", "now": self.now})

    def execute(self) -> Outcome:
        """Never raises for what happens on the nodes: that is in what it returns."""
        handlers = {
            signal.SIGINT: signal.signal(signal.SIGINT, self.interrupt),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._stop_now),
            signal.SIGHUP: signal.signal(signal.SIGHUP, self._hang_up),
        }
        try:
            return self._execute()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            shutil.rmtree(self.private, ignore_errors=True)
            self.writer.close()

    def _stop_now(self, *_: Any) -> None:
        self.asked = self.now = True
        self.listen({"what": "interrupt", "now": True})

    def _hang_up(self, *_: Any) -> None:
        """The terminal is gone: the run goes on, in the journal alone."""
        self.listen({"what": "hangup"})

    def _execute(self) -> Outcome:
        import ansible_runner  # --help and completion do without

        order = self.order
        self.tell("begin", command=order.command, inventory=str(order.inventory), limit=order.limit, pid=os.getpid())
        settings = self.private / "settings.json"
        descriptor = os.open(settings, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({**self.order.settings, **self._control()}, file)
        command = ["-i", str(self.order.inventory), "-e", f"@{settings}", *self.order.arguments]
        if self.order.limit:
            command += ["--limit", self.order.limit]
        for name in list(os.environ):
            if not KEPT.match(name) and name not in self.order.keep:
                del os.environ[name]
        output = os.open(self.run.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(output, "w") as self.output:
            config = ansible_runner.RunnerConfig(
                private_data_dir=str(self.private),
                project_dir=str(ROOT),
                playbook=str(ROOT / self.order.playbook),
                cmdline=shlex.join(command),
                quiet=True,
                settings={"pexpect_timeout": 1, "suppress_output_file": True},
            )
            config.prepare()
            runner = ansible_runner.Runner(
                config, cancel_callback=lambda: self.now, event_handler=self._event, remove_partials=True
            )
            runner.run()
        outcome = self._outcome(runner.rc if runner.rc is not None else 1)
        self.tell("end", exit_code=int(outcome.code), messages=outcome.messages, hosts=outcome.hosts)
        return outcome

    def _control(self) -> dict[str, Any]:
        """How the run is ended, and how a wave is approved, where it has waves."""
        if not self.order.waves:
            return {}
        return {"glm_stop_file": str(self.stop_file), "glm_approval_file": str(self.approval_file)}

    def _event(self, event: dict[str, Any]) -> bool:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(event.get("stdout") or ""))
        if text:
            self.output.write(text.replace("\r\n", "\n") + "\n")
            if event["event"] == "verbose":
                self.said += text.splitlines()
        for what, facts in self.translator.translate(event):
            self.tell(what, **facts)
        return False  # ansible-runner need not keep it

    def _outcome(self, rc: int) -> Outcome:
        seen = self.translator
        if self.asked and (self.now or rc):
            ended = judge(rc, seen.stats, self.results, self.said, seen.wave)
            return Outcome(Exit.INTERRUPTED, [] if self.now else ended.messages, ended.hosts)
        return judge(rc, seen.stats, self.results, self.said, seen.wave)


def judge(
    rc: int, stats: dict[str, dict[str, int]], results: list[journal.Line], said: list[str], wave: int
) -> Outcome:
    """The exit code and the words for a run.

    rc: that of ansible-playbook
    stats: its counts by name and host; empty where it did not come as far as a play
    results: the journal's lines of that kind
    said: what it printed beside its events
    wave: the last wave that began, from 1; 0 for none
    """
    hosts = {}
    for host in stats.get("processed", {}):
        marks = (("unreachable", "dark"), ("failed", "failures"), ("changed", "changed"))
        hosts[host] = next((mark for mark, name in marks if stats[name].get(host)), "ok")
    bad = [line for line in results if line["outcome"] in ("failed", "unreachable")]
    last = [line["message"] for line in last_of_each(bad) if hosts.get(line["host"]) in ("failed", "unreachable")]
    locked = [line["message"] for line in bad if line.get("locked")]
    if rc == 0:
        return Outcome(Exit.OK, [], hosts)
    if not stats:
        wrong = [line for line in said if re.match(r"\[?ERROR", line)] or said[-1:]
        cause = re.sub(r"^\[?ERROR\]?[:!]*\s*", "", " ".join(wrong[:1]))
        return Outcome(Exit.USAGE, [cause or f"ansible-playbook ended with {rc}"], hosts)
    if locked:
        return Outcome(Exit.LOCKED, unique(locked), hosts)
    if stats["dark"]:
        return Outcome(Exit.UNREACHABLE, unique(last), hosts)
    code = Exit.FAILED if stats["changed"] or wave else Exit.REFUSED
    return Outcome(code, unique(last), hosts)


def last_of_each(lines: list[journal.Line]) -> list[journal.Line]:
    """Of each host the last line, in the order in which these came."""
    last = {line["host"]: line for line in lines}
    return [line for line in lines if last[line["host"]] is line]


def unique(messages: list[str]) -> list[str]:
    return list(dict.fromkeys(messages))


def approve(playbook: Playbook, answer: bool) -> None:
    """Lets the rollout go on to its next wave, or halt."""
    with suppress(OSError):
        partial = playbook.approval_file.with_suffix(".new")
        partial.write_text("yes\n" if answer else "no\n")
        partial.replace(playbook.approval_file)
