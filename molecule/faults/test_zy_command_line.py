"""The command line over nodes in use: what it says, how it ends, and what it costs beside ansible-playbook."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CANARY, INVENTORY, NODES, OTHER, SETTINGS, serves
from fleet import Fleet
from testbed import ROOT

pytestmark = pytest.mark.command_line

OVERHEAD = 1.05  # of the wall time of the bare run


def command(runs: Path, *arguments: str, **settings: Any) -> list[str]:
    verb, *rest = arguments
    extra = ["-e", json.dumps({**SETTINGS, **settings})] if verb not in ("report", "status") else []
    return [sys.executable, "-m", "glm_fleet", verb, "-i", str(INVENTORY), "--runs", str(runs), *rest, *extra]


def call(runs: Path, *arguments: str, seconds: int = 400, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(runs, *arguments, **settings), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=seconds, check=False,
    )  # fmt: skip


def interrupted(runs: Path, when: Callable[[], bool], times: int, **settings: Any) -> tuple[int, str]:
    """A rollout that gets so many SIGINT once something is so; its exit code and what it said."""
    process = subprocess.Popen(
        command(runs, "rollout", **settings), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not when():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def whole(fleet: Fleet) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if fleet.all_in() and not any(serves(fleet, node) for node in NODES):
            return True
        time.sleep(1)
    return False


@pytest.mark.vital
def test_status_and_report(fleet: Fleet, tmp_path: Path) -> None:
    up = call(tmp_path, "up", light_release="command line")
    assert up.returncode == 0, up.stderr
    assert "faults-1  start" in up.stderr and "faults-2  put back" in up.stderr
    for _ in range(2):  # also where nothing has changed since
        status = call(tmp_path, "status", "--json")
        assert {node: seen["phase"] for node, seen in json.loads(status.stdout)["status"].items()} == dict.fromkeys(
            NODES, "serving"
        )
    written = json.loads((ROOT / "results/faults/report.json").read_text())
    (ROOT / "results/faults/report.json").unlink()
    again = call(tmp_path, "report", "--json")
    assert again.returncode == 0, again.stderr
    rebuilt = json.loads((ROOT / "results/faults/report.json").read_text())
    assert rebuilt["nodes"] == written["nodes"]


def test_a_canary_that_fails(fleet: Fleet, tmp_path: Path) -> None:
    (release,) = set(fleet.releases())
    run = call(tmp_path, "rollout", light_fault="exit-at-once", light_release="bad")
    assert run.returncode == 10
    assert "glm-fleet: faults-1: release " in run.stderr and f"release {release} serves again" in run.stderr
    assert whole(fleet)


def test_ctrl_c_ends_after_the_wave_in_hand(fleet: Fleet, tmp_path: Path) -> None:
    before = fleet.release(OTHER)
    settings = {"light_release": "ctrl-c", "light_load_seconds": "10"}
    code, output = interrupted(tmp_path, lambda: fleet.state(CANARY)["phase"] == "starting", 1, **settings)
    assert code == 130, output
    assert "Ctrl-C again stops at once" in output and "to go on from here: glm-fleet" in output
    assert fleet.release(CANARY) != before and fleet.release(OTHER) == before
    assert whole(fleet)
    again = call(tmp_path, "rollout", **settings)
    assert again.returncode == 0, again.stderr
    assert len(set(fleet.releases())) == 1


def test_a_second_ctrl_c_stops_at_once(fleet: Fleet, tmp_path: Path) -> None:
    settings = {"light_release": "ctrl-c twice", "light_load_seconds": "20"}
    began = 0.0

    def starting() -> bool:
        nonlocal began
        began = time.monotonic()
        return bool(fleet.state(CANARY)["phase"] == "starting")

    code, output = interrupted(tmp_path, starting, 2, **settings)
    assert code == 130, output
    assert time.monotonic() - began < 15
    assert "in the middle of faults-1 (start)" in output
    again = call(tmp_path, "rollout", **settings)
    assert again.returncode == 0, again.stderr
    assert whole(fleet)


@pytest.mark.parametrize(("answer", "code"), [("no", 130), ("yes", 0)])
def test_an_approval_without_a_terminal(fleet: Fleet, tmp_path: Path, answer: str, code: int) -> None:
    process = subprocess.Popen(
        command(tmp_path, "rollout", "--pause", light_release="approved"), cwd=ROOT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    line = next(line for line in process.stdout if "to go on: echo yes > " in line)
    assert fleet.release(CANARY) != fleet.release(OTHER)
    Path(line.partition("echo yes > ")[2].split(";")[0]).write_text(f"{answer}\n")
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == code, rest
    assert (fleet.release(CANARY) == fleet.release(OTHER)) is (answer == "yes")
    assert whole(fleet)


def test_it_costs_little_beside_the_bare_run(fleet: Fleet, tmp_path: Path) -> None:
    """Of two rollouts each, in turns, the faster one, so that a busy moment counts for neither.

    The engines load for 20 s, where real ones take minutes.
    """
    walls: dict[str, list[float]] = {"ansible-playbook": [], "glm-fleet": []}
    for number in range(2):
        for name, seconds in walls.items():
            release = {"light_release": f"{name} {number}", "light_load_seconds": "20"}
            bare = ["-i", str(INVENTORY), "-e", json.dumps({**SETTINGS, **release})]
            arguments = {
                "ansible-playbook": [f"{ROOT}/.venv/bin/ansible-playbook", "site.yml", *bare],
                "glm-fleet": command(tmp_path, "up", **release),
            }[name]
            began = time.monotonic()
            subprocess.run(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=300)
            seconds.append(time.monotonic() - began)
    ratio = min(walls["glm-fleet"]) / min(walls["ansible-playbook"])
    print({name: [round(wall, 1) for wall in seconds] for name, seconds in walls.items()}, f"{ratio:.3f}")
    (ROOT / "results/faults/overhead.json").write_text(json.dumps({**walls, "ratio": ratio}, indent=2) + "\n")
    assert ratio <= OVERHEAD, walls
