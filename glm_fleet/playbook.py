"""Runs a playbook through ansible-runner: what it says becomes lines of the journal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_fleet import journal
from glm_fleet.errors import Exit

ROOT = Path(__file__).resolve().parent.parent
# What ansible-playbook may see of the environment: a token that happens to be in it stays out of the run. The key of
# Lambda Cloud is for the inventory plugin of this project.
KEPT = re.compile(
    r"^(PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_.*|TERM|TMPDIR|TZ|SSH_AUTH_SOCK|VIRTUAL_ENV|COLUMNS|GLM_CACHE"
    r"|GLM_BENCH_NODES|LAMBDA_API_(KEY|URL)|(?i:https?|no)_(?i:proxy)|ANSIBLE_(?!.*(PASSWORD|TOKEN|SECRET)$).*)$"
)
GRACE = 5.0  # seconds that a stopped ansible-playbook has to end its workers
# The failures that follow from the stop file, and from --pause.
ENDINGS = {"stopped_by_user", "not_approved"}


@dataclass
class Order:
    """What to run: a playbook of this project and how it is called."""

    command: str
    playbook: str
    inventory: Path
    limit: str = ""
    extra: list[dict[str, Any] | Path] = field(default_factory=list)  # settings in order: the later one wins
    arguments: list[str] = field(default_factory=list)  # others, for ansible-playbook
    keep: tuple[str, ...] = ()  # further variables of the environment
    waves: bool = False  # whether it can end after a wave
    changes: bool = False  # whether it is for changing nodes, and so may refuse to
    check: bool = False  # whether it only looks what it would change


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
        # It holds the settings and the artifacts of ansible-runner, and goes with the run. The journal is written there
        # and copied, so that nothing which is shown or judged is lost on a full disk.
        run.make_private()
        self.private = run.private
        live = journal.Run(self.private)
        self.live = live.journal
        self.writer, self.follower = journal.Writer(live), journal.Follower(live)
        self.copy = journal.Copy(self.live, run.journal)
        self.gaps = False  # whether something could not be kept
        self.results: list[journal.Line] = []
        self.stats: dict[str, dict[str, int]] = {}
        self.begun = False  # whether a play has
        self.said: list[str] = []  # what Ansible prints beside the results of tasks
        self.asked, self.now = False, False  # to end after the wave in hand; to stop at once
        self.stopping = 0.0  # since when
        self.writer.write(
            "begin", command=order.command, inventory=str(order.inventory), limit=order.limit, check=order.check,
            pid=os.getpid(),
        )  # fmt: skip
        self.copy.go_on()  # a disk that is full already is no place to begin
        self.follow()
        self.stop_file, self.approval_file = self.private / "stop", self.private / "approval"

    def tell(self, what: str, **facts: Any) -> None:
        self.writer.write(what, **facts)
        self.follow()

    def follow(self) -> None:
        """Takes what was written since: by this process, and by the callback of ansible-playbook."""
        self._keep(self.copy.go_on)
        for line in self.follower.new():
            if line["what"] == "result":
                self.results.append(line)
            elif line["what"] == "stats":
                self.stats = {name: counts for name, counts in line.items() if isinstance(counts, dict)}
            self.begun = self.begun or line["what"] == "play"
            self._show(line)

    def _keep(self, write: Callable[[], object]) -> None:
        """What cannot be kept does not end the run; that is said once."""
        try:
            write()
        except OSError as problem:
            if not self.gaps:
                self.gaps = True
                with suppress(OSError, ValueError):
                    print(
                        f"glm-fleet: {self.run.directory}: {problem.strerror}: the run goes on, its journal and its "
                        "output may have gaps",
                        file=sys.stderr,
                    )

    def _show(self, line: journal.Line) -> None:
        with suppress(OSError, ValueError):  # a terminal or a pipe that is gone does not end a rollout
            self.listen(line)

    def interrupt(self, *_: Any) -> None:
        """The first time: end after the wave in hand, where there are waves. Then: stop at once."""
        self.now = self.asked or not self.order.waves
        self.asked = True
        self.stop_file.touch()
        self._show({"what": "interrupt", "now": self.now})

    def stop(self, *_: Any) -> None:
        """At once."""
        self.asked = self.now = True
        self._show({"what": "interrupt", "now": True})

    def hang_up(self, *_: Any) -> None:
        """The terminal is gone: the run goes on, in the journal alone."""
        self._show({"what": "hangup"})

    def execute(self) -> Outcome:
        """Never raises for what happens on the nodes: that is in what it returns."""
        wanted = {signal.SIGINT: self.interrupt, signal.SIGTERM: self.stop, signal.SIGHUP: self.hang_up}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            outcome = self._execute()
            self.tell("end", exit_code=int(outcome.code), messages=outcome.messages, hosts=outcome.hosts)
            return outcome
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.run.remove_private()
            self.writer.close()
            self.follower.close()
            self.copy.close()

    def _execute(self) -> Outcome:
        import ansible_runner  # --help and completion do without
        from ansible import constants

        for name in list(os.environ):
            if not KEPT.match(name) and name not in self.order.keep:
                del os.environ[name]
        # That of this environment, activated or not.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        # ansible-runner sets both, whatever ansible.cfg says.
        os.environ.setdefault("ANSIBLE_HOST_KEY_CHECKING", str(constants.HOST_KEY_CHECKING))
        enabled = dict.fromkeys([*constants.CALLBACKS_ENABLED, "glm.fleet.journal"])
        os.environ["ANSIBLE_CALLBACKS_ENABLED"] = ",".join(enabled)
        os.environ["GLM_FLEET_JOURNAL"] = str(self.live)
        self.output = journal.opened(self.run.output)
        try:
            config = ansible_runner.RunnerConfig(
                private_data_dir=str(self.private),
                project_dir=str(Path.cwd()),
                playbook=str(ROOT / self.order.playbook),
                cmdline=shlex.join(self._arguments()),
                quiet=True,
                fact_cache_type="memory",  # no facts on the disk
            )
            config.prepare()
            config.pexpect_timeout, config.suppress_output_file = 1, True
            runner = ansible_runner.Runner(
                config, cancel_callback=self._cancelled, event_handler=self._event, remove_partials=True
            )
            runner.run()
        finally:
            self._keep(self.output.close)
        return self._outcome(runner.rc if runner.rc is not None else 1)

    def _arguments(self) -> list[str]:
        """Of ansible-playbook; a setting by value goes into a file that nobody else can read."""
        order = self.order
        arguments = ["-i", str(order.inventory), *order.arguments]
        control = {"glm_stop_file": str(self.stop_file), "glm_approval_file": str(self.approval_file)}
        for number, part in enumerate([*order.extra, control if order.waves else {}]):
            path = part if isinstance(part, Path) else self.private / f"settings-{number}.json"
            if isinstance(part, dict):
                with journal.opened(path) as file:
                    json.dump(part, file)
            arguments += ["-e", f"@{path}"]
        return arguments + (["--limit", order.limit] if order.limit else [])

    def _cancelled(self) -> bool:
        """Whether ansible-runner is to kill what is left; ansible-playbook ends its workers itself, if it is let."""
        self.follow()
        if self.now and not self.stopping:
            self.stopping = time.monotonic()
            for child in Path("/proc/self/task").glob("*/children"):
                for pid in child.read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGTERM)
        return bool(self.stopping) and time.monotonic() - self.stopping > GRACE

    def _event(self, event: dict[str, Any]) -> bool:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(event.get("stdout") or ""))
        if text:
            self._keep(lambda: self.output.write(text.replace("\r\n", "\n") + "\n"))
            if event["event"] in ("verbose", "error"):
                self.said += text.splitlines()
        self.follow()
        return False  # ansible-runner need not keep it

    def _outcome(self, rc: int) -> Outcome:
        self.follow()
        ended = judge(rc, self.stats, self.results, self.said, begun=self.begun, changes=self.order.changes)
        if self.now and rc:
            return Outcome(Exit.INTERRUPTED, [], ended.hosts)
        failed = [kind(line) for line in last_of_each(self.results) if ended.hosts.get(line["host"]) == "failed"]
        if failed and set(failed) <= ENDINGS:
            return Outcome(Exit.INTERRUPTED, ended.messages, ended.hosts)
        return ended


def judge(
    rc: int,
    stats: dict[str, dict[str, int]],
    results: list[journal.Line],
    said: list[str],
    *,
    begun: bool,
    changes: bool,
) -> Outcome:
    """The exit code and the words for a run.

    rc: that of ansible-playbook
    stats: its counts by name and host; empty where it did not come to its end
    results: the journal's lines of that kind
    said: what it printed beside the results of tasks
    begun: whether it came as far as a play
    changes: whether the command is for changing nodes: then a failure before any change is a refusal; without, only
        one that says so
    """
    hosts = {}
    for host in stats.get("processed", {}):
        marks = (("unreachable", "dark"), ("failed", "failures"), ("changed", "changed"))
        hosts[host] = next((mark for mark, name in marks if stats[name].get(host)), "ok")
    bad = [line for line in results if line["outcome"] in ("failed", "unreachable")]
    failed = [line for line in last_of_each(bad) if hosts.get(line["host"]) in ("failed", "unreachable")]
    last = [line["message"] for line in failed]
    locked = [line["message"] for line in bad if kind(line) == "locked"]
    if rc == 0:
        return Outcome(Exit.OK, [], hosts)
    if not stats:
        wrong = [line for line in said if re.match(r"\[?ERROR", line)] or said[-1:]
        cause = re.sub(r"^\[?ERROR\]?[:!]*\s*", "", " ".join(wrong[:1]))
        return Outcome(Exit.FAILED if begun else Exit.USAGE, [cause or f"ansible-playbook ended with {rc}"], hosts)
    if locked:
        return Outcome(Exit.LOCKED, unique(locked), hosts)
    if stats["dark"]:
        return Outcome(Exit.UNREACHABLE, unique(last), hosts)
    says_so = failed and all((line.get("failure") or {}).get("nothing_changed") for line in failed)
    refused = not stats["changed"] and (changes or says_so)
    return Outcome(Exit.REFUSED if refused else Exit.FAILED, unique(last), hosts)


def kind(line: journal.Line) -> str:
    """Which failure it was, for programs."""
    return str((line.get("failure") or {}).get("id", ""))


def last_of_each(lines: list[journal.Line]) -> list[journal.Line]:
    """Of each host the last line, in the order in which these came."""
    last = {line["host"]: line for line in lines}
    return [line for line in lines if last[line["host"]] is line]


def unique(messages: list[str]) -> list[str]:
    return list(dict.fromkeys(messages))


def approve(playbook: Playbook, answer: bool) -> None:
    """Lets the rollout go on to its next wave, or halt."""
    partial = playbook.approval_file.with_suffix(".new")
    partial.write_text("yes\n" if answer else "no\n")
    partial.replace(playbook.approval_file)
