"""From the events of ansible-runner to the lines of a journal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Fact = tuple[str, dict[str, Any]]  # what happened, and the facts of its line

# The first that fits a task's role and name is the phase of the node.
PHASES: tuple[tuple[str, str, str], ...] = (
    ("preflight", "", "preflight"),
    ("nvidia_driver", "", "driver"),
    ("container_runtime", "", "runtime"),
    ("engine_image", "", "image"),
    ("model_weights", "", "weights"),
    ("gateway", "", "edge"),
    ("rotation", "Put the node|does not call up", "put back"),
    ("rotation", "", "drain"),
    ("verify", "", "verify"),
    ("benchmark", "", "benchmark"),
    ("inference_service", "[Pp]revious release|verified last", "go back"),
    ("inference_service", "Free the GPUs|Stop the engine|holds a GPU", "stop"),
    ("inference_service", "Start the engine", "start"),
    ("inference_service", "arguments", "check"),
    ("inference_service", "Install the release", "release"),
    ("", "Watch it for a while", "soak"),
    ("", "Read how the node does", "status"),
    ("", "Count the failures", "done"),
)
# What a command is run for, by the variable that holds it.
FACTS = {"verify_result": "verify", "benchmark_result": "benchmark"}
# The tasks that say what it was run for.
SAID = {
    "Show the engine's command and environment": "command",
    "Say where the endpoint and the report are": "verdict",
}
WAVES = "Take the nodes to the release"  # the play that goes through them
APPROVAL = "Wait for an approval"
PROGRESS = re.compile(r"^(?P<host>\S+) · (?P<text>\S+ · .*)$")


def phase(role: str, task: str) -> str:
    """What a task does to a node, in a word; empty for what is no phase of its own."""
    for of_role, pattern, name in PHASES:
        if role == of_role and re.search(pattern, task):
            return name
    return ""


class Translator:
    """Goes through the events of one run in order."""

    def __init__(self) -> None:
        self.phases: dict[str, str] = {}
        self.play = ""
        self.wave, self.in_wave = 0, False
        self.wave_nodes: set[str] = set()
        self.items: dict[tuple[str, str], str] = {}  # what an item of a loop said as it failed
        self.stats: dict[str, dict[str, int]] = {}

    def translate(self, event: dict[str, Any]) -> Iterator[Fact]:
        kind, data = event["event"], event.get("event_data") or {}
        if kind == "playbook_on_play_start":
            yield from self._play(str(data.get("name") or data.get("play") or ""))
        elif kind == "playbook_on_task_start" and data.get("task") == APPROVAL:
            yield "approval", {"wave": self.wave}
        elif kind == "playbook_on_stats":
            self.stats = {
                name: dict(data.get(name) or {}) for name in ("changed", "failures", "dark", "rescued", "processed")
            }
            for node, seen in ((data.get("artifact_data") or {}).get("status") or {}).items():
                yield "fact", {"host": node, "name": "status", "value": seen}
        elif kind == "verbose":
            for line in str(event.get("stdout", "")).splitlines():
                found = PROGRESS.match(line)
                if found:
                    yield "progress", found.groupdict()
        elif kind == "runner_item_on_failed":
            self.items[data["host"], data["task_uuid"]] = message(data)
        elif kind.startswith("runner_on_") and data.get("host"):
            yield from self._runner(kind.removeprefix("runner_on_"), data)

    def _play(self, name: str) -> Iterator[Fact]:
        self.play = name
        yield "play", {"play": name}
        self.in_wave = name == WAVES
        if self.in_wave:
            self.wave += 1
            self.wave_nodes = set()

    def _runner(self, kind: str, data: dict[str, Any]) -> Iterator[Fact]:
        host, role, task = str(data["host"]), str(data.get("role") or ""), str(data.get("task") or "")
        if kind == "start":
            if self.in_wave and host not in self.wave_nodes:
                self.wave_nodes.add(host)
                yield "wave", {"number": self.wave, "host": host}
            return
        now = phase(role, task)
        if kind in ("ok", "failed") and now and self.phases.get(host) != now:
            self.phases[host] = now
            yield "phase", {"host": host, "phase": now}
        result = data.get("res") or {}
        facts = result.get("ansible_facts") or {}
        if "report_entry" in facts:
            yield "entry", {"host": host, "entry": facts["report_entry"]}
        for variable, name in FACTS.items():
            if variable in facts:
                yield "fact", {"host": host, "name": name, "value": facts[variable]}
        if task in SAID and kind == "ok":
            yield "fact", {"host": host, "name": SAID[task], "value": str(result.get("msg", ""))}
        outcome = "changed" if kind == "ok" and result.get("changed") else kind
        if outcome in ("changed", "failed", "unreachable"):
            said = "" if outcome == "changed" else self.items.get((host, str(data.get("task_uuid"))), message(data))
            locked = bool(outcome == "failed" and result.get("holder") and not result.get("mine", True))
            yield (
                "result",
                {
                    "host": host,
                    "outcome": outcome,
                    "role": role,
                    "task": task,
                    "seconds": round(float(data.get("duration") or 0), 1),
                    "message": said,
                    **({"locked": True} if locked else {}),
                },
            )


def message(data: dict[str, Any]) -> str:
    """What a failed task says."""
    result = data.get("res") or {}
    return str(result.get("msg") or result.get("stderr") or result.get("reason") or "it failed").strip()
