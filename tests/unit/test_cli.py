"""The command line: what it makes of Ansible's events, what it keeps, and one line for each wrong call."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import stat
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from rich.console import Console

from glm_fleet import journal, tables
from glm_fleet.cli import execute, extra_settings
from glm_fleet.errors import Exit, UsageProblem
from glm_fleet.playbook import KEPT, Order, judge
from glm_fleet.view import LiveView, PlainView, Screen, State

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = """\
all:
  children:
    nodes:
      hosts: {node-1: {ansible_host: 192.0.2.1}, node-2: {ansible_host: 192.0.2.2}}
"""


def glm_fleet(*arguments: str, columns: int = 80, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glm_fleet", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(columns), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "hosts.yml").write_text(INVENTORY)
    return directory


# --- the callback ---

PLAYS = """
- hosts: nodes
  gather_facts: false
  serial: [1, 1]
  tasks:
    - name: Any name
      vars: {some_role_phase: drain}
      block:
        - ansible.builtin.command: {argv: ["true"]}
        - ansible.builtin.debug: {msg: the words}
          vars: {some_role_says: verdict}
        - ansible.builtin.set_fact: {report_entry: {ok: true}, model_weights_fetched: {bytes: 5}}
    - ansible.builtin.set_stats: {data: {status: {node-1: {phase: serving}}}}
    - ansible.builtin.fail: {msg: "{{ item }}"}
      loop: [it is full, it is cold]
      ignore_errors: true
      when: inventory_hostname == 'node-1'
    - ansible.builtin.include_tasks: {file: waits.yml}
      vars: {some_role_phase: soak}
    - glm.fleet.fail: {id: too_hot, text: it is hot, fix: cool it, nothing_changed: true}
      when: inventory_hostname == 'node-2'
"""
WAITS = """
- ansible.builtin.debug: {msg: waiting}
  vars: {some_role_awaits: approval}
"""


def test_the_journal_says_what_happened_whatever_the_tasks_are_called(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYS)
    (tmp_path / "waits.yml").write_text(WAITS)
    (tmp_path / "hosts.yml").write_text("{nodes: {hosts: {node-1: , node-2: }}}")
    file = tmp_path / "journal.jsonl"
    subprocess.run(
        [
            str(Path(sys.executable).parent / "ansible-playbook"),
            tmp_path / "play.yml",
            "-i",
            tmp_path / "hosts.yml",
            "-c",
            "local",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "ANSIBLE_CALLBACKS_ENABLED": "glm.fleet.journal",
            "GLM_FLEET_JOURNAL": str(file),
        },
        capture_output=True,
        check=False,
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    of_first = [(seen["what"], seen) for seen in lines if seen.get("host") == "node-1"]
    assert [what for what, _ in of_first] == [
        "wave", "phase", "result", "fact", "entry", "fact", "result", "phase", "fact"
    ]  # fmt: skip
    facts = [seen for _, seen in of_first]
    assert facts[0]["number"] == 1
    assert [seen["phase"] for what, seen in of_first if what == "phase"] == ["drain", "soak"]
    assert facts[2]["outcome"] == "changed"
    assert (facts[3]["name"], facts[3]["value"]) == ("verdict", "the words")
    assert facts[4]["entry"] == {"ok": True}
    assert (facts[5]["name"], facts[5]["value"]) == ("weights", {"bytes": 5})
    assert facts[6]["message"] == "node-1: it is full; it is cold"
    assert (facts[8]["name"], facts[8]["value"]) == ("status", {"phase": "serving"})
    assert [seen["waves"] for seen in lines if seen["what"] == "play"] == [True, True]
    assert "approval" in [seen["what"] for seen in lines]
    bad = [seen for seen in lines if seen.get("host") == "node-2" and seen["what"] == "result"][-1]
    assert bad["message"] == "node-2: it is hot: cool it"
    assert bad["failure"] == {
        "id": "too_hot", "host": "node-2", "text": "it is hot", "fix": "cool it", "unit": "", "nothing_changed": True
    }  # fmt: skip
    assert lines[-1]["what"] == "stats"
    assert lines[-1]["failures"] == {"node-2": 1}


def test_what_two_write_is_read_once(tmp_path: Path) -> None:
    run = journal.create(tmp_path, "up")
    writer = journal.Writer(run)
    follower = journal.Follower(run)
    writer.write("begin")
    with run.journal.open("a") as other:
        other.write('{"what": "play", "pl')
    assert [seen["what"] for seen in follower.new()] == ["begin"]
    with run.journal.open("a") as other:
        other.write('ay": "x"}\n')
    assert [seen["what"] for seen in follower.new()] == ["play"]
    assert list(follower.new()) == []


def line(outcome: str, message: str, **more: Any) -> journal.Line:
    return {"what": "result", "host": "node-1", "outcome": outcome, "role": "", "message": message, **more}


def stats(**counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"processed": {"node-1": 1}, "changed": {}, "failures": {}, "dark": {}, "rescued": {}, **counts}


FAILED = {"failures": {"node-1": 1}}
ENDS: dict[str, tuple[Any, Exit, list[str]]] = {
    "all ok": ((0, stats(), [], []), Exit.OK, []),
    "refused": ((2, stats(**FAILED), [line("failed", "no")], []), Exit.REFUSED, ["no"]),
    "rolled back": (
        (2, stats(**FAILED, changed={"node-1": 1}), [line("failed", "first"), line("failed", "why")], []),
        Exit.FAILED,
        ["why"],
    ),
    "unreachable": ((4, stats(dark={"node-1": 1}), [line("unreachable", "gone")], []), Exit.UNREACHABLE, ["gone"]),
    "locked": (
        (2, stats(**FAILED), [line("failed", "bob", failure={"id": "locked"}), line("failed", "x")], []),
        Exit.LOCKED,
        ["bob"],
    ),
    "cut off": ((1, {}, [], ["[ERROR]: no memory"]), Exit.FAILED, ["no memory"]),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_exit_code_says_how_it_ended(name: str) -> None:
    arguments, code, messages = ENDS[name]
    outcome = judge(*arguments, begun=True, changes=True)
    assert (outcome.code, outcome.messages) == (code, messages)


def test_what_is_no_refusal_and_what_never_began() -> None:
    asked = judge(2, stats(**FAILED), [line("failed", "wrong answer")], [], begun=True, changes=False)
    assert asked.code == Exit.FAILED
    said = line("failed", "glm_prot: no such setting", failure={"id": "inventory", "nothing_changed": True})
    assert judge(2, stats(**FAILED), [said], [], begun=True, changes=False).code == Exit.REFUSED
    broken = judge(4, {}, [], ["[ERROR]: no such role"], begun=False, changes=True)
    assert (broken.code, broken.messages) == (Exit.USAGE, ["no such role"])


# --- what is kept ---


def test_a_run_is_for_its_owner_alone_and_can_be_read_back(tmp_path: Path) -> None:
    run = journal.create(tmp_path / "runs", "up")
    writer = journal.Writer(run)
    writer.write("begin", command="up")
    writer.write("entry", host="node-1", entry={"ok": False})
    writer.write("entry", host="node-1", entry={"ok": True})
    writer.close()
    with run.journal.open("a") as file:
        file.write('{"at": "cut o')
    assert stat.S_IMODE(run.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.journal.stat().st_mode) == 0o600
    assert run.entries()["entries"] == {"node-1": {"ok": True}}
    assert journal.find(tmp_path / "runs", "").name == run.name


def test_a_journal_of_whatever_nodes_have_said(tmp_path: Path) -> None:
    run = journal.create(tmp_path, "up")
    writer = journal.Writer(run)
    writer.write("result", message="a line\u2028of Unicode\x85s")
    writer.write("entry", host="node-1", entry={})
    writer.close()
    with run.journal.open("ab") as file:
        file.write("cut off within é".encode()[:-1])
    assert [seen["what"] for seen in run.lines()] == ["result", "entry"]


def test_the_oldest_runs_go(tmp_path: Path) -> None:
    for number in range(journal.KEPT + 5):
        old = journal.Run(tmp_path / f"20260101T{number:06}-up")
        old.directory.mkdir()
        old.journal.write_text("")
    new = journal.create(tmp_path, "up")
    assert len(journal.known(tmp_path)) == journal.KEPT - 1
    assert new.directory.is_dir()


def test_a_token_in_the_environment_stays_out() -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ANSIBLE_VAULT_PASSWORD", "ANSIBLE_GALAXY_TOKEN", "GITHUB_TOKEN"):
        assert not KEPT.match(name)
    for name in ("PATH", "HOME", "SSH_AUTH_SOCK", "ANSIBLE_CONFIG", "ANSIBLE_VAULT_PASSWORD_FILE", "LC_ALL"):
        assert KEPT.match(name)


# --- a full disk ---


def test_a_journal_that_cannot_be_written_does_not_end_a_run(tmp_path: Path) -> None:
    """ansible-playbook alone, with the callback."""
    (tmp_path / "play.yml").write_text("[{hosts: localhost, tasks: [{command: echo}, {command: echo}]}]")
    run = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), tmp_path / "play.yml", "-c", "local"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CALLBACKS_ENABLED": "glm.fleet.journal", "GLM_FLEET_JOURNAL": "/dev/full"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "failed=0" in run.stdout and "changed=2" in run.stdout
    said = " ".join(run.stderr.split())
    assert said.count("/dev/full: the journal has gaps: No space left on device") == 1
    assert "Traceback" not in said and "callback" not in said


def test_a_disk_that_is_full_is_no_place_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(journal, "MEMORY", tmp_path / "memory")
    run = journal.create(tmp_path / "runs", "up")
    run.journal.symlink_to("/dev/full")
    with pytest.raises(UsageProblem) as problem:
        execute(Order("up", "site.yml", tmp_path), run, State("up", ()), silent=True)
    said = "the directory of the runs cannot be written (No space left on device): free some, or pass --runs DIR"
    assert str(problem.value) == f"{tmp_path}/runs: {said}"
    assert list((tmp_path / "runs").iterdir()) == list((tmp_path / "memory").iterdir()) == []


FILLED = """\
import os, sys
from glm_fleet import journal
def go_on(self, go_on=journal.Copy.go_on):
    go_on(self)
    os.dup2(os.open("/dev/full", os.O_WRONLY), self.target)
journal.Copy.go_on = go_on
from glm_fleet.cli import main
main(sys.argv[1:])
"""


def test_a_disk_that_gets_full_does_not_end_a_run(inventory: Path, tmp_path: Path) -> None:
    (inventory / "hosts.yml").write_text(INVENTORY.replace("192.0.2.1}", "127.0.0.1, ansible_port: 9}"))
    words = ["verify", "-i", str(inventory), "--runs", str(tmp_path / "runs"), "node-1", "-e", "ansible_ssh_retries=0"]
    run = subprocess.run(
        [sys.executable, "-c", FILLED, *words],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == Exit.UNREACHABLE, run.stderr
    assert run.stderr.count("No space left on device: the run goes on, its journal and its output may have gaps") == 1
    assert "Connection refused" in run.stderr and "Traceback" not in run.stderr


def test_what_found_no_room_is_kept_once_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("one\ntwo\n")
    copy, room = journal.Copy(source, target), [5]

    def write(descriptor: int, data: bytes, write: Any = os.write) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        done: int = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        copy.go_on()
    assert target.read_text() == "one\nt"
    with source.open("a") as file:
        file.write("three\n")
    room[0] = 100
    copy.go_on()
    copy.close()
    assert target.read_text() == "one\ntwo\nthree\n"


def test_a_journal_is_read_on_after_a_gap(tmp_path: Path) -> None:
    run = journal.create(tmp_path, "up")
    run.journal.write_text('{"what": "begin"}\n{"what": "res{"what": "stats"}\n{"what": "end"}\n{"wh')
    assert [seen["what"] for seen in run.lines()] == ["begin", "end"]


# --- what is shown ---


def shown(kind: type[LiveView] | type[PlainView], width: int, nodes: int = 3) -> str:
    names = [f"a-node-with-a-long-name-{number}" for number in range(nodes)]
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=kind is LiveView, color_system=None)
    state = State("glm-fleet rollout · lambda", names)
    view = kind(state, console)
    for fact in (
        {"what": "wave", "number": 1, "host": names[0]},
        {"what": "phase", "host": names[0], "phase": "weights"},
        {"what": "progress", "host": names[0], "text": "glm-weights.service · 40 % of 755 GB, 1.2 GB/s, 6 min left"},
        {"what": "result", "host": names[1], "outcome": "failed", "message": "the fabric is not ready\nsecond line"},
    ):
        view.line(fact)
    if isinstance(view, LiveView):
        console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_table_fits_the_terminal(width: int) -> None:
    lines = shown(LiveView, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 1 + 1 + 3 + 1  # the head, the columns, a line for each node, the foot
    assert "weights" in lines[2]
    assert ("40 % of 755 GB" in lines[2]) is (width >= 80)


def test_downloads_of_all_nodes_are_one_line() -> None:
    state = State("glm-fleet prepare · lambda", ["a", "b", "c"])
    text = "glm-weights.service · some"
    for host, done, rate in (("a", 300e9, 1e9), ("b", 100e9, 2e9)):
        state.take({"what": "phase", "host": host, "phase": "weights"})
        assert not state.downloads()  # of one there is its own line
        state.take({"what": "progress", "host": host, "text": text, "done": done, "total": 500e9, "rate": rate})
    assert state.downloads() == "2 nodes: 400.0 GB of 1.0 TB, 3.0 GB/s, ETA 3:20"
    state.take({"what": "progress", "host": "c", "text": text, "done": 0, "total": 500e9, "rate": 0})
    assert state.downloads() == "3 nodes: 400.0 GB of 1.5 TB, 3.0 GB/s"
    for host, shares in (("a", {"hub": 100e9, "peers": 200e9}), ("b", {"hub": 50e9, "peers": 50e9})):
        line = {"done": 200e9, "total": 500e9, "rate": 1e9, "sources": shares}
        state.take({"what": "progress", "host": host, "text": text, **line})
    told = "400.0 GB of 1.5 TB, 2.0 GB/s, 38 % from the hub, 62 % from peers"
    assert state.downloads() == f"3 nodes: {told}"
    console = Console(file=io.StringIO(), width=120)
    assert f"3 nodes: {told}" in render(LiveView(state, console), console)
    state.take({"what": "progress", "host": "a", "text": text, "done": 300e9, "total": 500e9, "rate": 1e9})
    state.take({"what": "progress", "host": "b", "text": text, "done": 100e9, "total": 500e9, "rate": 2e9})
    console = Console(file=io.StringIO(), width=80)
    assert "3 nodes: 400.0 GB of 1.5 TB, 3.0 GB/s" in render(LiveView(state, console), console)
    state.take({"what": "phase", "host": "a", "phase": "waiting"})
    assert state.downloads().startswith("2 nodes: 100.0 GB")


def render(view: LiveView, console: Console) -> str:
    with console.capture() as captured:
        console.print(view.render())
    return captured.get()


def test_many_nodes_are_as_many_lines_as_there_are() -> None:
    lines = shown(LiveView, 80, nodes=48).splitlines()
    assert len(lines) <= 24
    assert re.search(r"… 29 more; all: \d+ waiting, 1 weights|… 29 more; all: 1 weights, 47 waiting", "\n".join(lines))


def test_without_a_terminal_each_thing_is_a_line() -> None:
    lines = shown(PlainView, 40).splitlines()
    assert [text.split("  ")[-1] for text in lines] == [
        "weights",
        "glm-weights.service · 40 % of 755 GB, 1.2 GB/s, 6 min left",
        "failed: the fabric is not ready",
    ]


def test_what_a_node_says_does_not_reach_the_terminal_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Clear the screen, write to the clipboard, in both spellings of the escape."""
    said = "bad\x1b[2J \x1b]52;c;ZXZpbA==\x07\x9b2J\rgood"
    table = tables.Grid("NODE")
    table.row(said)
    screen = Screen()
    table.show(screen)
    screen.print(said, style="yellow")
    shown = capsys.readouterr().out
    assert shown.count("bad[2J ]52;c;ZXZpbA==2Jgood") == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert failure("x", said)["text"] == "bad[2J ]52;c;ZXZpbA==2Jgood"


def test_a_result_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "[rank0] no [/var/lib/glm] at http://[2001:db8:a::1]:8000"
    entry = {"ok": False, "release": "a", "image_digest": "b", "reason": reason}
    (tmp_path / "report.json").write_text(json.dumps({"nodes": {"node-1": entry}}))
    tables.report(tmp_path / "report.json", as_json=False)
    assert reason in capsys.readouterr().out


# --- what fits where ---

# A node in rotation, and one with all that may be said of it.
STATUS = {
    "b200-1": {"rotation": "in", "phase": "serving", "release": "0c1d2e3f4a5b", "image_digest": f"sha256:{'a1' * 32}",
               "model_revision": "31cba24fb749908a485082bdeed6eb1ac6cffc2f", "driver": "570.211.01", "in_flight": 512,
               "verified": {"time": "2026-12-01T04:37:00Z", "ok": True, "failed": []}},
    "b200-in-the-other-hall-2": {
        "rotation": "drained", "phase": "failed", "release": "9f8e7d6c5b4a", "image_digest": f"sha256:{'b2' * 32}",
        "model_revision": "41cba24fb749908a485082bdeed6eb1ac6cffc2f", "driver": "580.159.04", "in_flight": 0,
        "verified": {"time": "2026-12-01T04:37:00Z", "ok": False, "failed": ["completion", "tool_call", "health"]},
        "reason": "the engine did not become ready within 3600 s"},
}  # fmt: skip
COLUMNS = ["NODE", "ROTATION", "PHASE", "RELEASE", "IMAGE", "WEIGHTS", "DRIVER", "IN FLIGHT", "VERIFIED"]
CELLS = {
    "b200-1": ["in", "serving", "0c1d2e3f4a5b", "a1" * 6, "31cba24fb749", "570.211.01", "512", "2026-12-01T04:37:00Z"],
    "b200-in-the-other-hall-2": [
        *("drained", "failed", "9f8e7d6c5b4a", "b2" * 6, "41cba24fb749", "580.159.04", "0"),
        "FAILED completion, tool_call, health",
    ],
}
SHOW = """
import json, sys
from glm_fleet import tables
from glm_fleet.view import Screen, State
state = State("status", ())
state.facts = {node: {"status": seen} for node, seen in json.loads(sys.argv[1]).items()}
tables.status(tables.Shown(state, None), Screen())
"""


def at_a_terminal(columns: int) -> str:
    """What status prints at a real one."""
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(STATUS)],
        cwd=ROOT,
        env={**environment, "TERM": "xterm", "NO_COLOR": "1"},
        stdin=terminal,
        stdout=terminal,
        check=True,
        timeout=60,
    )
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # its end
        while part := os.read(control, 65536):
            text += part
    os.close(control)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).replace("\r", "")


@pytest.mark.parametrize("columns", ["40", "80", ""])
def test_a_pipe_gets_each_column_in_a_line_a_node(columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns} if columns else os.environ
    done = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(STATUS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    head, *lines, reason = done.stdout.splitlines()
    assert re.split(r"  +", head.strip()) == COLUMNS
    assert [re.split(r"  +", line.strip()) for line in lines] == [[node, *cells] for node, cells in CELLS.items()]
    # Cut by columns, too: each begins where its head does.
    assert all(line[head.index("DRIVER") :].startswith(("570", "580")) for line in lines)
    assert reason == "b200-in-the-other-hall-2: the engine did not become ready within 3600 s"


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_shows_each_column_too(columns: int) -> None:
    text = at_a_terminal(columns)
    lines = text.splitlines()
    assert all(len(line) <= columns for line in lines[:-2]) and "…" not in text
    heads = [part for line in lines if line.startswith("NODE") for part in re.split(r"  +", line.strip())]
    assert [part for part in heads if part != "NODE"] == COLUMNS[1:]
    words = text.split()
    assert all(word in words for cells in CELLS.values() for cell in cells for word in cell.split())


def test_a_terminal_too_narrow_for_a_word_breaks_it() -> None:
    text = at_a_terminal(30)
    assert "…" not in text and all(len(line) <= 30 for line in text.splitlines()[:-2])
    assert Counter("".join(cell for cells in CELLS.values() for cell in cells)) <= Counter(text)


def test_a_wide_terminal_shows_one_table() -> None:
    head, *lines = at_a_terminal(200).splitlines()
    assert re.split(r"  +", head.strip()) == COLUMNS and len(lines) == 3


# --- wrong calls ---

WRONG: dict[str, tuple[list[str], str]] = {
    "no such command": (["deploy"], "No such command 'deploy'."),
    "no such option": (["up", "--fast"], "No such option"),
    "no such node": (
        ["up", "-i", "SITE", "node-9"],
        "has no such node (it has node-1, node-2)",
    ),
    "no such inventory": (["up", "-i", "nowhere"], "nowhere: there is no such inventory: pass one with -i"),
    "an inventory that does not parse": (["up", "-i", "BROKEN"], "the inventory does not parse: YAML parsing failed"),
    "an inventory without nodes": (["up", "-i", "EMPTY"], "the inventory has no host in its group nodes"),
    "a run that does not exist": (["report", "-i", "SITE", "20200101T000000-up"], "there is no such run in "),
    "no run yet": (["report", "-i", "SITE"], "no run there has deployed anything yet: glm-fleet up"),
    "runs that cannot be written": (
        ["up", "-i", "SITE", "--runs", "FILE"],
        "the directory of the runs cannot be written",
    ),
    "a wave that is none": (["rollout", "-i", "SITE", "--waves", "1,many"], "--waves: 'many' is neither a count nor"),
    "a setting that is none": (["up", "-i", "SITE", "-e", "nothing"], "-e: write NAME=VALUE, a JSON object, or @FILE"),
    "a file of settings that is not there": (
        ["up", "-i", "SITE", "-e", "@gone.yml"],
        "-e @gone.yml: there is no such file",
    ),
    "a file of settings that is none": (["up", "-i", "SITE", "-e", "@site.yml"], "holds no settings"),
    "a file that is not text": (["up", "-i", "SITE", "-e", "@docs/images/report.png"], "-e @docs/images/report.png: "),
    "a drain of nothing": (["drain", "-i", "SITE"], "Missing argument 'NODES...'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_line(name: str, inventory: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yml").write_text("all: {children: [\n")
    (tmp_path / "empty.yml").write_text("all: {hosts: {a: {}}}\n")
    (tmp_path / "file").write_text("")
    places = {
        "SITE": inventory,
        "BROKEN": tmp_path / "broken.yml",
        "EMPTY": tmp_path / "empty.yml",
        "FILE": tmp_path / "file",
    }
    arguments, said = WRONG[name]
    run = glm_fleet(*(str(places.get(part, part)) for part in arguments), columns=40)
    assert run.returncode == Exit.USAGE
    assert run.stdout == ""
    (only,) = run.stderr.splitlines()
    assert only.startswith("glm-fleet: ")
    assert said in only


def test_every_command_has_examples_in_its_help() -> None:
    listed = glm_fleet("--help")
    names = re.findall(r"^  (\w+) {2,}", listed.stdout.partition("Commands:")[2].partition("Exit codes")[0], re.M)
    assert {"up", "plan", "rollout", "status", "verify", "bench", "rollback", "drain", "undrain"} < set(names)
    for name in names:
        assert f"glm-fleet {name}" in glm_fleet(name, "--help").stdout.partition("Example")[2]


def test_the_shell_completes_commands_and_nodes(inventory: Path) -> None:
    words = {
        "_GLM_FLEET_COMPLETE": "bash_complete",
        "COMP_WORDS": f"glm-fleet drain -i {inventory} no",
        "COMP_CWORD": "4",
    }
    run = subprocess.run(
        [sys.executable, "-c", "from glm_fleet.cli import main; main(prog_name='glm-fleet')"],
        cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert [text.partition(",")[2] for text in run.stdout.splitlines()] == ["node-1", "node-2"]


def test_a_plan_asks_no_node_and_leaves_nothing(inventory: Path, tmp_path: Path) -> None:
    """A whole run through ansible-runner."""
    run = glm_fleet("plan", "-i", str(inventory), "--runs", str(tmp_path / "runs"), HF_TOKEN="hf_canary")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "docker run" in run.stdout
    assert not (tmp_path / "runs").exists()
    found = glm_fleet("plan", "-i", str(inventory), "--json", "node-1")
    assert json.loads(found.stdout)["hosts"] == {"node-1": "ok"}


def deployed(runs: Path, **entry: Any) -> journal.Run:
    """A run that has."""
    run = journal.create(runs, "up")
    writer = journal.Writer(run)
    writer.write("begin", command="up")
    writer.write("entry", host="node-1", entry={**ENTRY, **entry})
    writer.close()
    return run


ENTRY = json.loads((ROOT / "tests/fixtures/report/report.json").read_text(encoding="utf-8"))["nodes"]["b200-1"]


def test_a_report_takes_what_nodes_have_said_for_text(inventory: Path, tmp_path: Path) -> None:
    said = "{{ lookup('pipe', 'echo run') }}"
    run = deployed(tmp_path / "runs", ok=False, reason=said)
    done = glm_fleet("report", "-i", str(inventory), "--runs", str(tmp_path / "runs"), "--json", run.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["nodes"]["node-1"]["reason"] == said
    assert said in (run.directory / "report.md").read_text(encoding="utf-8")


def test_a_later_report_is_not_replaced(inventory: Path, tmp_path: Path) -> None:
    (inventory / "group_vars").mkdir()
    name = f"unit-{os.getpid()}"
    (inventory / "group_vars/all.yml").write_text(f"report_inventory_name: {name}\n")
    run = deployed(tmp_path / "runs")
    later = json.dumps({"schema": 1, "started": "2999-01-01T00:00:00Z", "finished": "2999-01-01T01:00:00Z"})
    report = ROOT / "results" / name / "report.json"
    report.parent.mkdir(parents=True)
    try:
        report.write_text(later)
        done = glm_fleet("report", "-i", str(inventory), "--runs", str(tmp_path / "runs"))
        assert (done.returncode, report.read_text()) == (Exit.USAGE, later)
    finally:
        shutil.rmtree(report.parent)
    assert "is of a run of 2999-01-01T00:00:00Z, after that of the last journal" in done.stderr
    assert f"glm-fleet report {run.name}" in done.stderr


def test_an_encrypted_inventory(inventory: Path, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("canary\n")
    vault = [str(Path(sys.executable).parent / "ansible-vault"), "encrypt", "--vault-password-file", str(password)]
    subprocess.run([*vault, str(inventory / "hosts.yml")], check=True, capture_output=True)
    without = glm_fleet("plan", "-i", str(inventory))
    assert (without.returncode, len(without.stderr.splitlines())) == (Exit.USAGE, 1)
    done = glm_fleet("plan", "-i", str(inventory), "--vault-password-file", str(password))
    assert done.returncode == 0, done.stderr
    likewise = glm_fleet("plan", "-i", str(inventory), ANSIBLE_VAULT_PASSWORD_FILE=str(password))
    assert likewise.returncode == 0, likewise.stderr


def test_runs_are_kept_where_the_user_is(inventory: Path, tmp_path: Path) -> None:
    (inventory / "hosts.yml").write_text(INVENTORY.replace("192.0.2.1}", "127.0.0.1, ansible_port: 9}"))
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "glm_fleet", "verify", "-i", "site", "--runs", "runs", "node-1"]
    run = subprocess.run(
        [*command, "-e", "ansible_ssh_retries=0"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == Exit.UNREACHABLE, run.stderr
    assert len(journal.known(tmp_path / "runs")) == 1


def test_a_configuration_that_ansible_does_not_take(inventory: Path) -> None:
    run = glm_fleet("plan", "-i", str(inventory), ANSIBLE_FORKS="many")
    (only,) = run.stderr.splitlines()
    assert (run.returncode, "ANSIBLE_FORKS" in only) == (Exit.USAGE, True)


def test_a_node_that_cannot_be_reached(inventory: Path, tmp_path: Path) -> None:
    (inventory / "hosts.yml").write_text(INVENTORY.replace("192.0.2.1}", "127.0.0.1, ansible_port: 9}"))
    runs = tmp_path / "runs"
    run = glm_fleet("verify", "-i", str(inventory), "--runs", str(runs), "node-1", "-e", "ansible_ssh_retries=0")
    assert run.returncode == Exit.UNREACHABLE, run.stdout + run.stderr
    assert "glm-fleet: " in run.stderr and "Connection refused" in run.stderr
    (only,) = journal.known(runs)
    end = list(only.lines())[-1]
    assert (end["what"], end["exit_code"]) == ("end", Exit.UNREACHABLE)
    with pytest.raises(UsageProblem, match="no run there has deployed anything"):
        journal.find(runs, "")


ALICE = "sk-glm-" + "a" * 43
EDGES = """\
all:
  children:
    nodes:
      hosts:
        node-1: {ansible_connection: local, ansible_become: false}
        node-2: {ansible_host: 127.0.0.1, ansible_port: 9, ansible_ssh_retries: 0}
"""


@pytest.fixture
def keys_file(inventory: Path) -> Path:
    """Of an inventory whose second edge cannot be reached; the first is none yet."""
    (inventory / "hosts.yml").write_text(EDGES)
    (inventory / "keys").mkdir(mode=0o700)
    path = inventory / "keys/api-keys.txt"
    path.touch(mode=0o600)
    path.write_text(f"# ours\n{ALICE} alice requests_per_minute=60\n")
    return path


def keys_run(verb: str, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    site = file.parents[1]
    return glm_fleet("keys", verb, "-i", str(site), "--runs", str(site.parent / "runs"), *arguments)


def test_a_new_key_is_printed_once_and_kept_nowhere_else(keys_file: Path, tmp_path: Path) -> None:
    run = keys_run("add", keys_file, "bob", "--concurrent", "4")
    # The file is changed, and an edge was not reached: the rest is done.
    assert run.returncode == Exit.UNREACHABLE
    assert "node-2: " in run.stderr and "Connection refused" in run.stderr
    key = run.stdout.strip()
    assert keys_file.read_text() == f"# ours\n{ALICE} alice requests_per_minute=60\n{key} bob concurrent=4\n"
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600
    kept = [path.read_text() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert kept and not any(key in text or ALICE in text for text in [*kept, run.stderr])
    assert any("bob" in text for text in kept)


def test_a_list_of_keys_holds_none(keys_file: Path) -> None:
    run = keys_run("list", keys_file, "--json")
    found = json.loads(run.stdout)
    assert run.returncode == found["exit_code"] == Exit.UNREACHABLE
    (alice,) = found["keys"]
    assert (alice["name"], alice["requests_per_minute"], alice["days_left"]) == ("alice", 60, None)
    assert re.fullmatch("[0-9a-f]{8}", alice["digest"])
    assert found["edges"] == {"node-1": {"asks_for_keys": False, "runs": False, "added": [], "removed": []}}
    assert ALICE not in run.stdout + run.stderr
    assert "alice" in keys_run("list", keys_file).stdout


def test_a_wrong_edit_of_keys_changes_nothing(keys_file: Path) -> None:
    before = keys_file.read_text()
    run = keys_run("revoke", keys_file, "carol")
    assert run.returncode == Exit.REFUSED
    assert f"glm-fleet: {keys_file} has no key carol (it has alice)" in run.stderr
    assert keys_file.read_text() == before


def test_an_edge_with_other_keys_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    state = State("keys", ("node-1",))
    state.facts = {"node-1": {"edge": {"asks_for_keys": True, "added": ["bob", "carol"], "removed": ["alice", "bob"]}}}
    tables.keys(tables.Shown(state, None), Screen())
    assert capsys.readouterr().out == "node-1: lacks carol; has besides alice; other limits of bob\n"


def test_a_node_without_accounts_is_said_in_one_line(keys_file: Path, tmp_path: Path) -> None:
    run = glm_fleet("usage", "-i", str(keys_file.parents[1]), "--runs", str(tmp_path / "runs"), "node-1")
    assert run.returncode == Exit.REFUSED, run.stdout + run.stderr
    assert "glm-fleet: node-1: no accounts are kept here: set glm_accounts to true, and run site.yml" in run.stderr


def test_usage_is_summed_up_for_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"refused": 0, "failed": 1, "broken_off": 0, "unmeasured": 0, "input": 1200, "cached": 800, "output": 30}
    rows = [
        {"day": day, "key": key, "requests": 2, **row}
        for day in ("2027-01-15", "2027-01-16") for key in ("alice", "bob")
    ]  # fmt: skip
    state = State("usage", ("node-1", "node-2"))
    state.facts = {node: {"usage": {"rows": rows, "lost_lines": 0}} for node in ("node-1", "node-2")}
    state.facts["node-2"]["usage"]["lost_lines"] = 3
    tables.usage(tables.Shown(state, None), Screen(), by=("key",))
    first, alice, bob, lost = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["KEY", "REQUESTS"]
    assert alice.split() == ["alice", "8", "0", "4", "0", "0", "4,800", "3,200", "120"]
    assert bob.split()[1:] == alice.split()[1:]
    assert lost == "node-2: HAProxy could not log 3 requests: they are not counted"
    tables.usage(tables.Shown(state, None), Screen(), by=("node", "day"))
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    killed = journal.create(tmp_path, "up")
    writer = journal.Writer(killed)
    writer.write("begin", command="up", pid=2**22 + 1)  # beyond what the kernel gives
    writer.close()
    killed.make_private()
    place = killed.private.resolve()
    (place / "artifacts").mkdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    journal.create(tmp_path, "status")
    assert not os.path.lexists(killed.private)
    assert not place.exists()
    assert killed.journal.exists()


PROBE = """\
import sys, ansible_runner
run = ansible_runner.Runner.run
ansible_runner.Runner.run = lambda self: (print(self.config.env["ANSIBLE_HOST_KEY_CHECKING"]), run(self))
from glm_fleet.cli import main
main(["plan", "-i", sys.argv[1]])
"""


def test_host_keys_are_checked_as_the_project_says(inventory: Path) -> None:
    """ansible-runner alone would trust whoever answers."""
    command = [sys.executable, "-c", PROBE, str(inventory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.startswith("True\n"), run.stderr


def test_the_later_setting_wins_as_with_ansible(tmp_path: Path) -> None:
    file = tmp_path / "site.yml"
    file.write_text("glm_port: 1\n")
    parts = extra_settings((f"@{file}", "glm_port=2", '{"glm_port": 3}'))
    assert parts == [file, {"glm_port": "2"}, {"glm_port": 3}]


def test_a_reader_that_leaves_does_not_end_the_run(inventory: Path) -> None:
    """As `| tee log` does on Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "glm_fleet", "plan", "-i", str(inventory)],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert run.returncode == 0
    assert "docker run" in run.stdout
