#!/usr/bin/python
"""Ansible module: start a systemd unit, or look after one; the action plugin of this name drives it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_job
short_description: Start a systemd unit and wait for it, with its progress on the terminal
description:
  - Starts the unit and waits until it has finished (C(Type=oneshot)) or is active (any other type).
  - Shows the unit's StatusText as it changes. A start in progress is joined, not repeated.
  - A start that systemd passes over, since a condition of the unit is not met, is a failure.
  - The work belongs to systemd, so a lost SSH connection costs nothing but a reconnection.
  - In check mode nothing is started.
options:
  name: {description: The unit with its suffix., type: str, required: true}
  timeout: {description: Seconds to wait before giving up; the unit is left running., type: int, default: 3600}
  interval: {description: Least seconds between two lines of progress., type: int, default: 10}
  restart: {description: Restart the unit where it is active., type: bool, default: false}
  reload_units:
    description: Have systemd read its unit files before the start, if it says that they have changed.
    type: bool
    default: false
  result_file:
    description: A JSON object that the unit's program leaves at its end, to be returned.
    type: path
    default: ""
  reconnect_timeout: {description: Seconds without a connection before giving up., type: int, default: 600}
  follow:
    description: What the action plugin knows of the run that it follows. Not for playbooks.
    type: dict
    suboptions:
      token: {description: 'Names one start, so that it is not repeated.', type: str, required: true}
      wait: {description: Seconds to stay on the node., type: float, default: 5}
      started: {description: Whether the start was done., type: bool, default: false}
      run_id: {description: systemd's id of the run., type: str, default: ""}
      boot: {description: The node's boot id when the run began., type: str, default: ""}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Download the weights
  glm.fleet.systemd_job:
    name: glm-weights.service
    timeout: 14400
"""

RETURN = r"""
elapsed: {description: Seconds from the start to the end., type: float, returned: always}
status_text: {description: The last StatusText of the unit., type: str, returned: always}
result: {description: What result_file holds; empty where nothing was started., type: dict, returned: success}
inactive_s:
  description: Seconds from when the unit last stopped being active until it was active again; null if it never was.
  type: float
  returned: success
"""


import contextlib
import os
import subprocess
import time
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_json

SYSTEMCTL_PROPERTIES = (
    "Type,LoadState,ActiveState,SubState,Result,Job,StatusText,InvocationID,ExecMainStatus,NeedDaemonReload,"
    "ActiveExitTimestampMonotonic,ActiveEnterTimestampMonotonic,ConditionResult,ConditionTimestampMonotonic"
)
TOKENS = "/run/systemd_job"
ERROR_PREFIX = "glm: error:"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)


class Unit:
    """One unit and the run of it that is being followed."""

    def __init__(self, params: dict[str, Any], command: Run = run, pause: float = 0.5) -> None:
        self.name: str = params["name"]
        self.params = params
        self.follow: dict[str, Any] = params["follow"]
        self.command = command
        self.pause = pause
        self.status_text = ""

    def show(self) -> dict[str, str]:
        output = self.command("systemctl", "show", self.name, f"--property={SYSTEMCTL_PROPERTIES}").stdout
        state = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        self.status_text = state.get("StatusText") or self.status_text
        return state

    def start(self) -> dict[str, Any]:
        state = self.show()
        if self.params["reload_units"] and state.get("NeedDaemonReload") == "yes":
            self.command("systemctl", "daemon-reload")
            state = self.show()
        if state.get("LoadState") in ("not-found", "bad-setting", "masked"):
            return self._report("failed", state, f"{self.name}: the unit is {state['LoadState']} on this node")
        if is_active(state) and not self.params["restart"]:
            return self._report("done", state, changed=False)
        joined = is_starting(state) and not self.params["restart"]
        if joined or self._started_before():
            return self.watch()
        # An operator's start is not one of those that a start limit counts; one that is inactive may have used it up.
        self.command("systemctl", "reset-failed", self.name)
        # One that systemd is about to start again would wait for that, where a restart is at once.
        verb = "restart" if self.params["restart"] or is_to_restart(state) else "start"
        client = subprocess.Popen(
            ["systemctl", verb, self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _stdout, stderr = client.communicate(timeout=self.follow["wait"])
        except subprocess.TimeoutExpired:
            state = self.show()
            if is_starting(state) or is_active(state) or has_job(state):
                client.kill()  # the client only waits for the job, which goes on
                client.communicate()
                return self._report("running", state)
            _stdout, stderr = client.communicate()  # it has ended in this moment, and the client knows how
        state = self.show()
        if client.returncode or was_skipped(state):
            return self._failed(state, stderr)
        return self._report("done", state)

    def watch(self) -> dict[str, Any]:
        """Stays on the node for a while: that is cheaper than to come back for each look."""
        end = time.monotonic() + self.follow["wait"]
        while True:
            state = self.show()
            phase = self.phase(state)
            if is_starting(state):
                self.follow["run_id"] = self.follow["run_id"] or state.get("InvocationID", "")
            if phase == "failed":
                return self._failed(state)
            if phase != "running" or time.monotonic() >= end:
                return self._report(phase, state)
            time.sleep(self.pause)

    def phase(self, state: dict[str, str]) -> str:
        known, now = self.follow["run_id"], state.get("InvocationID", "")
        if self.follow["boot"] not in ("", boot_id()):
            return "done" if is_active(state) else "lost"
        if is_to_restart(state) or (known and now and known != now):
            return "failed"  # systemd tries again, but this start was not a good one
        if is_active(state):
            return "done"
        if state.get("ActiveState") == "failed":
            return "failed"
        if has_job(state) or state.get("ActiveState") != "inactive":
            return "running"
        return "done" if state.get("Type") == "oneshot" and self._finished(known) else "failed"

    def _finished(self, invocation: str) -> bool:
        """systemd forgets a oneshot unit that is inactive again, ended or stopped; the journal still knows which.

        The connection may have been lost before the run's id was told: then it is the run since this start.
        """
        which = [f"INVOCATION_ID={invocation}"]
        if not invocation:
            try:
                begun = os.stat(os.path.join(TOKENS, self.name)).st_mtime
            except OSError:
                return False
            which = [f"--since=@{int(begun)}", f"UNIT={self.name}"]
        self.command("journalctl", "--sync")
        read = ("journalctl", "--quiet", "--no-pager", "--output=cat", "--lines=1")
        return bool(self.command(*read, *which, "JOB_TYPE=start", "JOB_RESULT=done").stdout.strip())

    def _failed(self, state: dict[str, str], stderr: str = "") -> dict[str, Any]:
        if self.command("systemctl", "is-system-running").stdout.strip() == "stopping":
            time.sleep(self.follow["wait"])  # the node is going down, and the unit with it: to be seen after its return
            return self._report("running", state)
        return self._report("failed", state, self.failure(state, stderr))

    def failure(self, state: dict[str, str], stderr: str) -> str:
        """One line that says what went wrong and where to read more."""
        if was_skipped(state):
            unit = self.command("systemctl", "cat", self.name).stdout.splitlines()
            conditions = ", ".join(line for line in unit if line.startswith("Condition"))
            return (
                f"{self.name}: systemd passed over its start: a condition of the unit is not met ({conditions}): "
                f"see systemctl status {self.name}"
            )
        invocation = self.follow["run_id"] or state.get("InvocationID", "")
        self.command("journalctl", "--sync")
        lines: list[str] = []
        if invocation:
            lines = self.command(
                "journalctl",
                "--quiet",
                "--no-pager",
                "--output=cat",
                "--lines=200",
                f"_SYSTEMD_INVOCATION_ID={invocation}",
            ).stdout.splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        said = [line[len(ERROR_PREFIX) :].strip() for line in lines if line.startswith(ERROR_PREFIX)]
        what = " / ".join(dict.fromkeys(said)) or (lines or [line for line in stderr.splitlines() if line] or [""])[-1]
        what = what or "the unit did not run to its end (it was stopped, or a unit that it needs has failed)"
        result = state.get("Result", "")
        ended = f"result {result}, exit status {state.get('ExecMainStatus')}; " if result not in ("", "success") else ""
        return f"{self.name}: {what[:600]} ({ended}more: journalctl -u {self.name})"

    def _started_before(self) -> bool:
        """Leaves a note of this start, and says whether it was there: a lost connection may repeat a call."""
        path = os.path.join(TOKENS, self.name)
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            if file.read() == self.follow["token"]:
                return True
        os.makedirs(TOKENS, mode=0o700, exist_ok=True)
        with open(path, "w") as file:
            file.write(self.follow["token"])
        return False

    def _report(self, phase: str, state: dict[str, str], message: str = "", changed: bool = True) -> dict[str, Any]:
        seen = is_starting(state) or is_active(state)
        # not called "invocation": Ansible takes that key out of results
        return {
            "phase": phase,
            "changed": changed,
            "message": message,
            "status_text": self.status_text,
            "result": read_json(self.params["result_file"]) if phase == "done" and changed else {},
            "inactive_s": inactive_seconds(state),
            "boot": boot_id(),
            "run_id": self.follow["run_id"] or (state.get("InvocationID", "") if seen else ""),
        }


def has_job(state: dict[str, str]) -> bool:
    return state.get("Job", "0") not in ("", "0")


def is_active(state: dict[str, str]) -> bool:
    return state.get("ActiveState") in ("active", "reloading") and not has_job(state)


def is_starting(state: dict[str, str]) -> bool:
    return state.get("ActiveState") == "activating" and not is_to_restart(state)


def is_to_restart(state: dict[str, str]) -> bool:
    """Failed, and systemd will start it again."""
    return state.get("SubState", "").startswith("auto-restart")


def was_skipped(state: dict[str, str]) -> bool:
    """Not started, as a condition is not met: systemctl calls that a success. Without a time none was looked at."""
    looked = state.get("ConditionTimestampMonotonic", "0") not in ("", "0")
    return state.get("ActiveState") == "inactive" and looked and state.get("ConditionResult") == "no"


def inactive_seconds(state: dict[str, str]) -> float | None:
    """By systemd's own clock, which begins anew with each start of the node."""
    left, entered = (int(state.get(f"Active{name}TimestampMonotonic") or 0) for name in ("Exit", "Enter"))
    return round((entered - left) / 1e6, 1) if 0 < left < entered else None


def boot_id() -> str:
    """Differs after each start of the node; a container keeps its host's boot id, but not its first process."""
    with open("/proc/sys/kernel/random/boot_id") as kernel, open("/proc/1/stat") as first:
        return f"{kernel.read().strip()}-{first.read().rsplit(')', 1)[1].split()[19]}"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "timeout": {"type": "int", "default": 3600},
            "interval": {"type": "int", "default": 10},
            "restart": {"type": "bool", "default": False},
            "reload_units": {"type": "bool", "default": False},
            "result_file": {"type": "path", "default": ""},
            "reconnect_timeout": {"type": "int", "default": 600},
            "follow": {
                "type": "dict",
                "options": {
                    "token": {"type": "str", "required": True, "no_log": False},
                    "wait": {"type": "float", "default": 5},
                    "started": {"type": "bool", "default": False},
                    "run_id": {"type": "str", "default": ""},
                    "boot": {"type": "str", "default": ""},
                },
            },
        },
        supports_check_mode=True,
    )
    unit = Unit(module.params)
    if module.check_mode:
        state = unit.show()
        module.exit_json(
            phase="done",
            changed=module.params["restart"] or not is_active(state),
            status_text=unit.status_text,
            message="",
            boot="",
            run_id="",
        )
    module.exit_json(**(unit.watch() if unit.follow["started"] else unit.start()))


if __name__ == "__main__":
    main()
