"""Callback: how many round trips each node cost, and what the controller spent on them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: round_trips
type: aggregate
short_description: Counts the ssh processes that a playbook starts per node
description:
  - Each ssh, scp or sftp process is one round trip, retries included. Local connections count nothing.
  - C(waits) are those of them that only follow a long unit on, which are as many as the unit takes time.
  - Ends with a table; with C(-v) also the tasks of the node that cost most.
options:
  json_path:
    description: File for the figures as JSON.
    type: path
    env: [{name: ROUND_TRIPS_JSON}]
    ini: [{section: callback_round_trips, key: json_path}]
requirements: [enable it in callbacks_enabled]
"""

import collections
import json
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ansible.executor.task_executor import TaskExecutor
from ansible.plugins.callback import CallbackBase
from ansible.plugins.connection import ssh


def count_ssh_processes(log: str) -> None:
    """Has each worker add a line to `log` per process; workers are forks, so they inherit the wrappers."""
    current = {"host": "", "task": "", "action": ""}
    run_task, start_process = TaskExecutor.run, ssh.Connection._bare_run

    def run(self: Any) -> Any:
        # A delegated task's host is known by its address alone, until a task of its own names it.
        current.update(
            host="" if self._task.delegate_to else str(self._host.name),
            task=self._task.get_name(),
            action=self._task.action,
        )
        return run_task(self)

    def bare_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        line = json.dumps([current["host"], self.host, current["task"], current["action"]]) + "\n"
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())  # one short write to the end of a file is not torn apart
        finally:
            os.close(descriptor)
        return start_process(self, *args, **kwargs)

    TaskExecutor.run, ssh.Connection._bare_run = run, bare_run


def summarise(lines: list[str], known: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    tasks: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    waits: collections.Counter[str] = collections.Counter()
    trips = [json.loads(line) for line in lines]
    names = {**(known or {}), **{address: host for host, address, *_task in trips if host}}
    for host, address, task, action in trips:
        name = host or names.get(address, address)
        waits[name] += action == "glm.fleet.systemd_job" and tasks[name][task] > 0
        tasks[name][task] += 1
    return {
        host: {"round_trips": sum(counts.values()), "waits": waits[host], "tasks": dict(counts.most_common())}
        for host, counts in sorted(tasks.items())
    }


def cpu_seconds() -> float:
    return sum(os.times()[:4])  # this process and its children, in user and system mode


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Prints and saves the count at the end of the playbook."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "round_trips"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin, self.cpu_begin = time.monotonic(), cpu_seconds()
        descriptor, self.log = tempfile.mkstemp(prefix="round_trips.")
        os.close(descriptor)
        count_ssh_processes(self.log)
        self.names: dict[str, str] = {}

    def v2_playbook_on_play_start(self, play: Any) -> None:
        # By their addresses alone are the hosts known that tasks are delegated to.
        if not self.names:
            manager = play.get_variable_manager()
            for host in manager._inventory.get_hosts(ignore_limits=True, ignore_restrictions=True):
                address = manager.get_vars(host=host, include_hostvars=False).get("ansible_host", host.name)
                self.names[str(address)] = host.name

    def v2_playbook_on_stats(self, stats: Any) -> None:
        with open(self.log) as file:
            hosts = summarise(file.readlines(), self.names)
        os.unlink(self.log)
        wall, cpu = round(time.monotonic() - self.begin, 1), round(cpu_seconds() - self.cpu_begin, 1)
        width = max([len(host) for host in hosts] + [4])
        self._display.banner("ROUND TRIPS")
        self._display.display(f"{'node':{width}}  round trips")
        for host, figures in hosts.items():
            self._display.display(f"{host:{width}}  {figures['round_trips']:11}")
        self._display.display(f"{wall} s on the wall, {cpu} s of the controller's CPU")
        if hosts and self._display.verbosity:
            costliest = max(hosts, key=lambda host: int(hosts[host]["round_trips"]))
            for task, count in hosts[costliest]["tasks"].items():
                self._display.display(f"{costliest}  {count:4}  {task}")
        path = self.get_option("json_path")
        if path:
            with open(path, "w") as file:
                json.dump({**hosts, "wall_s": wall, "controller_cpu_s": cpu}, file, indent=2)
                file.write("\n")
