"""Callback: what happens in a run, one JSON object a line."""

from __future__ import annotations

DOCUMENTATION = r"""
name: journal
type: aggregate
short_description: Writes what happens in a run as JSON lines
description:
  - The file is the one that the environment variable C(GLM_FLEET_JOURNAL) names; without it nothing is written.
  - Each line has C(at) (UTC) and C(what), which is one of C(play), C(wave), C(phase), C(approval), C(result),
    C(progress), C(fact), C(entry) and C(stats).
  - Names of tasks mean nothing to it. A variable of a block or a task that ends in C(_phase) names what is being done
    to the node; one that ends in C(_says) makes the words of the task a fact of that name; one that ends in C(_awaits)
    says that the task waits for a person.
  - Never writes arguments, variables or the environment.
requirements: [enable it in callbacks_enabled]
"""

import time
from collections.abc import Mapping
from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure_of, render
from ansible_collections.glm.fleet.plugins.plugin_utils.journal import write

# What a command is run for, by the public fact that holds it.
FACTS = {
    "verify_result": "verify",
    "benchmark_result": "benchmark",
    "model_weights_fetched": "weights",
    "gateway_keys": "keys",
    "gateway_edge": "edge",
    "gateway_usage": "usage",
}


def marked(task: Any, ending: str) -> str:
    """The innermost variable of that ending around a task."""
    found = [value for name, value in task.get_vars().items() if name.endswith(ending) and isinstance(value, str)]
    return "" if not found or "{{" in found[-1] else str(found[-1])


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Goes through the events of one run in order."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "journal"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.phases: dict[str, str] = {}
        self.wave, self.in_wave = 0, False
        self.wave_nodes: set[str] = set()
        self.began: dict[tuple[str, str], float] = {}

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self.in_wave = bool(play.serial)
        write("play", play=play.get_name(), waves=self.in_wave)
        if self.in_wave:
            self.wave += 1
            self.wave_nodes = set()

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        awaited = marked(task, "_awaits")
        if awaited:
            write(awaited, wave=self.wave)

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        self.began[host.name, task._uuid] = time.monotonic()
        if self.in_wave and host.name not in self.wave_nodes:
            self.wave_nodes.add(host.name)
            write("wave", number=self.wave, host=host.name)

    def v2_runner_on_ok(self, result: Any) -> None:
        self._task(result, "changed" if result.result.get("changed") else "ok")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._task(result, "failed")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._task(result, "unreachable")

    def v2_playbook_on_stats(self, stats: Any) -> None:
        handed = stats.custom.get("_run", {})
        for host, seen in (handed.get("status") or {}).items():
            write("fact", host=host, name="status", value=seen)
        if "launch" in handed:
            write("fact", host="localhost", name="launch", value=handed["launch"])
        names = ("changed", "failures", "dark", "rescued", "processed")
        write("stats", **{name: dict(getattr(stats, name)) for name in names})

    def _task(self, result: Any, outcome: str) -> None:
        host, task, said = result.host.name, result.task, result.result
        phase = marked(task, "_phase")
        if phase and self.phases.get(host) != phase and outcome != "unreachable":
            self.phases[host] = phase
            write("phase", host=host, phase=phase)
        self._facts(host, task, said, outcome)
        took = round(time.monotonic() - self.began.pop((host, task._uuid), time.monotonic()), 1)
        if outcome == "ok":
            return
        found = failure_of(said, host) if outcome != "changed" else None
        write(
            "result", host=host, outcome=outcome, role=role_of(task), task=str(task.name), seconds=took,
            message=render(found) if found else "", **({"failure": found} if found else {}),
        )  # fmt: skip

    def _facts(self, host: str, task: Any, said: Mapping[str, Any], outcome: str) -> None:
        facts = said.get("ansible_facts") or {}
        if "report_entry" in facts:
            write("entry", host=host, entry=facts["report_entry"])
        for variable, name in FACTS.items():
            if variable in facts:
                write("fact", host=host, name=name, value=facts[variable])
        name = marked(task, "_says")
        if name and "msg" in said and outcome in ("ok", "changed"):
            write("fact", host=host, name=name, value=str(said["msg"]))


def role_of(task: Any) -> str:
    """The short name of the role that a task is of."""
    return str(task._role.get_name()).rpartition(".")[2] if task._role else ""
