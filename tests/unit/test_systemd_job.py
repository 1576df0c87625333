"""systemd_job: what the module makes of systemd's answers, and how the action plugin follows a run."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.action import systemd_job as action
from ansible_collections.glm.fleet.plugins.modules import systemd_job as module
from ansible_collections.glm.fleet.plugins.plugin_utils import journal

ONESHOT = {"Type": "oneshot", "LoadState": "loaded", "Result": "success", "ExecMainStatus": "0"}
IDLE = {**ONESHOT, "ActiveState": "inactive", "SubState": "dead"}
BUSY = {**ONESHOT, "ActiveState": "activating", "SubState": "start", "InvocationID": "aa", "StatusText": "1 GB of 2 GB"}
FAILED = {
    **ONESHOT,
    "ActiveState": "failed",
    "SubState": "failed",
    "InvocationID": "aa",
    "Result": "exit-code",
    "ExecMainStatus": "1",
}
SERVICE = {"Type": "notify", "LoadState": "loaded", "Result": "success", "ExecMainStatus": "0"}
SERVING = {**SERVICE, "ActiveState": "active", "SubState": "running", "InvocationID": "aa"}
AGAIN = {
    **SERVICE,
    "ActiveState": "activating",
    "SubState": "auto-restart",
    "InvocationID": "aa",
    "Result": "exit-code",
    "ExecMainStatus": "1",
}


class Systemd:
    """Answers `systemctl show` with one state after the other, and `journalctl` with the journal."""

    def __init__(self, states: list[dict[str, str]], journal: str = "", finished: str = "Finished x.\n") -> None:
        self.states, self.journal, self.finished = list(states), journal, finished
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        self.calls.append(argv)
        output = self.journal if argv[0] == "journalctl" else ""
        if "JOB_RESULT=done" in argv:
            output = self.finished
        if argv[:2] == ("systemctl", "cat"):
            output = "# /etc/x.service\n[Unit]\nConditionPathExists=/opt/x/run\n[Service]\nExecStart=/bin/x\n"
        if argv[:2] == ("systemctl", "show"):
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            output = "".join(f"{key}={value}\n" for key, value in state.items())
        return subprocess.CompletedProcess(argv, 0, output, "")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "TOKENS", str(tmp_path / "run"))
    monkeypatch.setattr(module, "boot_id", lambda: "boot1")


def unit(systemd: Systemd, restart: bool = False, reload_units: bool = False, **follow: Any) -> Any:
    params = {
        "name": "x.service",
        "restart": restart,
        "reload_units": reload_units,
        "result_file": str(Path(module.TOKENS).with_name("result.json")),
        "follow": {"token": "t", "wait": 0.05, "started": False, "run_id": "", "boot": "", **follow},
    }
    return module.Unit(params, systemd, pause=0.0)


def client(monkeypatch: pytest.MonkeyPatch, code: int | None, stderr: str = "", late: bool = False) -> list[list[str]]:
    """For `systemctl start`; a code of None is one that still waits, `late` one that ends just after the wait."""
    calls: list[list[str]] = []

    def popen(argv: list[str], **_: Any) -> Any:
        calls.append(argv)
        rounds = iter(range(9))

        def communicate(timeout: float | None = None) -> tuple[None, str]:
            if (late or code is None) and next(rounds) == 0:
                raise subprocess.TimeoutExpired(argv, timeout or 0)
            return None, stderr

        return SimpleNamespace(returncode=code, communicate=communicate, kill=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return calls


def test_a_short_run_ends_in_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = client(monkeypatch, 0)
    assert unit(Systemd([IDLE])).start()["phase"] == "done"
    assert calls == [["systemctl", "start", "x.service"]]


SKIPPED = {
    **SERVICE, "ActiveState": "inactive", "SubState": "dead", "InvocationID": "of before",
    "ConditionResult": "no", "ConditionTimestampMonotonic": "1234",
}  # fmt: skip


@pytest.mark.parametrize("restart", [False, True])
def test_a_start_that_systemd_passes_over_is_a_failure(monkeypatch: pytest.MonkeyPatch, restart: bool) -> None:
    """For systemctl it is a success."""
    client(monkeypatch, 0)
    result = unit(Systemd([SKIPPED], journal="of before"), restart=restart).start()
    assert result["phase"] == "failed"
    assert result["message"] == (
        "x.service: systemd passed over its start: a condition of the unit is not met "
        "(ConditionPathExists=/opt/x/run): see systemctl status x.service"
    )


@pytest.mark.parametrize(
    "state",
    [
        {**SERVING, "ConditionResult": "yes", "ConditionTimestampMonotonic": "1234"},
        # A oneshot unit that has ended is forgotten: no condition was looked at.
        {**IDLE, "ConditionResult": "no", "ConditionTimestampMonotonic": "0"},
        {**IDLE, "ConditionResult": "yes", "ConditionTimestampMonotonic": "1234"},
    ],
)
def test_a_start_whose_conditions_are_met_is_done(monkeypatch: pytest.MonkeyPatch, state: dict[str, str]) -> None:
    client(monkeypatch, 0)
    assert unit(Systemd([IDLE, state])).start()["phase"] == "done"


@pytest.mark.parametrize(("code", "phase"), [(0, "done"), (1, "failed")])
def test_a_run_that_ends_with_the_wait_is_judged_by_the_client(
    monkeypatch: pytest.MonkeyPatch, code: int, phase: str
) -> None:
    """By then systemd has forgotten the unit: nobody else could say how it ended."""
    client(monkeypatch, code, late=True)
    assert unit(Systemd([IDLE])).start()["phase"] == phase


def test_a_long_run_is_handed_on_and_then_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, None)
    first = unit(Systemd([IDLE, BUSY])).start()
    assert (first["phase"], first["run_id"], first["status_text"]) == ("running", "aa", "1 GB of 2 GB")
    watched = unit(Systemd([BUSY, IDLE]), started=True, run_id="aa", boot="boot1").watch()
    assert watched["phase"] == "done" and watched["status_text"] == "1 GB of 2 GB"


def test_what_the_program_leaves_is_returned_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run has left is not this one's."""
    left = Path(module.TOKENS).with_name("result.json")
    left.write_text('{"bytes": 5}')
    client(monkeypatch, None)
    assert unit(Systemd([IDLE, BUSY])).start()["result"] == {}
    assert unit(Systemd([SERVING])).start()["result"] == {}
    assert unit(Systemd([BUSY, IDLE]), started=True, run_id="aa", boot="boot1").watch()["result"] == {"bytes": 5}
    left.unlink()
    assert unit(Systemd([IDLE]), started=True, run_id="aa", boot="boot1").watch()["result"] == {}


def test_a_run_that_ended_while_nobody_was_told_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection was lost in the first call, and the unit ended before it came back."""
    client(monkeypatch, 0)
    unit(Systemd([IDLE])).start()
    systemd = Systemd([IDLE])
    assert unit(systemd).start()["phase"] == "done"
    (asked,) = [argv for argv in systemd.calls if "JOB_RESULT=done" in argv]
    assert "UNIT=x.service" in asked and any(part.startswith("--since=@") for part in asked)
    assert unit(Systemd([IDLE], finished="")).start()["phase"] == "failed"


def test_a_start_in_progress_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = client(monkeypatch, 0)
    assert unit(Systemd([BUSY, BUSY, IDLE])).start()["phase"] == "done"
    assert calls == []


def test_a_repeated_call_starts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = client(monkeypatch, 0)
    unit(Systemd([SERVING]), restart=True).start()
    unit(Systemd([SERVING]), restart=True).start()
    assert calls == [["systemctl", "restart", "x.service"]]
    unit(Systemd([SERVING]), restart=True, token="another").start()
    assert len(calls) == 2


def test_an_active_unit_is_no_change() -> None:
    answer = unit(Systemd([SERVING])).start()
    assert answer["phase"] == "done" and not answer["changed"]


def test_unit_files_are_read_again_only_if_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, 0)
    for says, reloads in (("yes", 1), ("no", 0)):
        systemd = Systemd([{**IDLE, "NeedDaemonReload": says}, IDLE])
        unit(systemd, reload_units=True, token=says).start()
        assert systemd.calls.count(("systemctl", "daemon-reload")) == reloads


def test_a_failure_is_the_programs_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, 1, "Job for x.service failed.\n")
    journal = "starting\nglm: error: registry r:5000 cannot be reached\nbye\n"
    answer = unit(Systemd([IDLE, FAILED], journal)).start()
    assert answer["message"] == (
        "x.service: registry r:5000 cannot be reached (result exit-code, exit status 1; more: journalctl -u x.service)"
    )


@pytest.mark.parametrize(
    ("state", "journal", "says"),
    [
        (FAILED, "one\ntwo\n", "x.service: two (result exit-code"),
        ({**IDLE, "LoadState": "not-found"}, "", "x.service: the unit is not-found on this node"),
        (IDLE, "", "x.service: A dependency job failed. (more: journalctl"),
    ],
)
def test_other_failures(monkeypatch: pytest.MonkeyPatch, state: dict[str, str], journal: str, says: str) -> None:
    client(monkeypatch, 1, "A dependency job failed.\n")
    assert unit(Systemd([state], journal)).start()["message"].startswith(says)


def test_systemds_own_second_try_is_a_failure() -> None:
    known: dict[str, Any] = {"started": True, "run_id": "aa", "boot": "boot1"}
    assert unit(Systemd([AGAIN]), **known).watch()["phase"] == "failed"
    assert unit(Systemd([{**SERVING, "InvocationID": "bb"}]), **known).watch()["phase"] == "failed"


def test_a_run_that_was_stopped_has_not_ended() -> None:
    systemd = Systemd([IDLE], "downloading\n", finished="")
    answer = unit(systemd, started=True, run_id="aa", boot="boot1").watch()
    assert answer["phase"] == "failed" and "x.service: downloading" in answer["message"]


def test_a_run_that_a_reboot_ended_is_lost() -> None:
    assert unit(Systemd([IDLE]), started=True, run_id="aa", boot="boot0").watch()["phase"] == "lost"
    assert unit(Systemd([SERVING]), started=True, run_id="bb", boot="boot0").watch()["phase"] == "done"


def answer(phase: str, **more: Any) -> dict[str, Any]:
    return {"phase": phase, "changed": True, "status_text": "", "message": "", "run_id": "aa", "boot": "b", **more}


def follow(monkeypatch: pytest.MonkeyPatch, answers: list[Any], **args: Any) -> tuple[dict[str, Any], list[Any], str]:
    """Runs the action plugin on prepared answers; an exception among them is raised."""
    sent: list[Any] = []
    shown: list[str] = []

    def execute(module_args: dict[str, Any], **_: Any) -> Any:
        sent.append({**module_args, "follow": dict(module_args["follow"])})
        now = answers.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr(ActionBase, "run", lambda *_: {})
    monkeypatch.setattr(journal, "Display", lambda: SimpleNamespace(display=shown.append))
    monkeypatch.setattr(action, "RECONNECT_PAUSE", 0.0)
    plugin = object.__new__(action.ActionModule)
    plugin._task = SimpleNamespace(args={"name": "x.service", "interval": 0, **args}, _uuid="u")
    plugin._connection = SimpleNamespace(reset=lambda: None)
    plugin._execute_module = execute
    return plugin.run(None, {"inventory_hostname": "node1"}), sent, "\n".join(shown)


def test_progress_is_shown_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [answer("running", status_text=text) for text in ("1 GB", "1 GB", "2 GB")]
    result, sent, shown = follow(monkeypatch, [*states, answer("done", changed=False)])
    assert shown.splitlines() == ["node1 · x.service · 1 GB", "node1 · x.service · 2 GB"]
    assert result["changed"] and "failed" not in result and result["status_text"] == "2 GB"
    assert [call["follow"]["started"] for call in sent] == [False, True, True, True]
    assert result["result"] == {}  # in check mode the module has none


def test_the_result_of_the_program_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [answer("running", result={}), answer("done", result={"bytes": 5})]
    assert follow(monkeypatch, answers)[0]["result"] == {"bytes": 5}


def test_a_lost_connection_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = AnsibleConnectionFailure("Broken pipe")
    result, sent, shown = follow(monkeypatch, [answer("running"), lost, lost, answer("done")])
    assert "failed" not in result and shown.count("connection lost, reconnecting") == 2
    assert len({call["follow"]["token"] for call in sent}) == 1


def test_a_connection_that_stays_lost_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _, _ = follow(monkeypatch, [AnsibleConnectionFailure("No route")], reconnect_timeout=0)
    assert result["unreachable"] and "the unit goes on without it" in result["msg"]


def test_a_reboot_starts_the_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    result, sent, _ = follow(monkeypatch, [answer("running"), answer("lost"), answer("done")])
    assert "failed" not in result and not sent[-1]["follow"]["started"]
    assert sent[-1]["follow"]["token"] != sent[0]["follow"]["token"] and sent[-1]["follow"]["boot"] == ""


def test_failure_and_timeout_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _, _ = follow(monkeypatch, [answer("failed", message="x.service: broken")])
    assert result["failed"] and result["msg"] == "x.service: broken"
    result, _, _ = follow(monkeypatch, [answer("running", status_text="loading")], timeout=0)
    assert result["failed"] and "still at it" in result["msg"] and "(loading)" in result["msg"]
