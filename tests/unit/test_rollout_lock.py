"""One rollout at a time: who gets the lock, and when it counts no more."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.action import rollout_lock as ACTION
from ansible_collections.glm.fleet.plugins.modules import rollout_lock as MODULE

A = {"user": "a", "host": "one", "boot": "x", "pid": 1, "begun": "10"}
B = {"user": "b", "host": "two", "boot": "y", "pid": 2, "begun": "20"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "glm/rollout.lock")


def wish(
    path: str, owner: dict[str, Any], now: float = 0, boot: str = "one", clock: float = 1e9, **more: Any
) -> dict[str, Any]:
    """`now` is the uptime of the host where the lock lies, `clock` its clock at the boot."""
    dry = more.pop("dry", False)
    params = {"path": path, "owner": owner, "state": "held", "ttl": 100, "instead_of": "", **more}
    changed: dict[str, Any] = MODULE.change(params, MODULE.Now(now, boot, clock + now), dry)
    return changed


def test_the_first_one_gets_it_and_the_second_one_does_not(path: str) -> None:
    assert wish(path, A)["mine"]
    second = wish(path, B, now=50)
    assert not second["mine"]
    assert (second["holder"]["user"], second["holder"]["since"], second["left"]) == ("a", 1e9, 50)


def test_its_owner_renews_it(path: str) -> None:
    wish(path, A)
    assert wish(path, A, now=80)["left"] == 100
    assert wish(path, B, now=90)["holder"]["since"] == 1e9
    assert not wish(path, B, now=150)["mine"]


def test_it_expires(path: str) -> None:
    wish(path, A)
    assert wish(path, B, now=101)["mine"]
    assert not wish(path, A, now=102)["mine"]


def test_only_its_owner_releases_it(path: str) -> None:
    wish(path, A)
    assert not wish(path, B, state="released")["mine"]
    assert wish(path, A, state="released") == {"holder": {}, "mine": True, "left": 0.0, "damaged": ""}
    assert wish(path, B)["mine"]


def test_releasing_what_nobody_holds_is_fine(path: str) -> None:
    assert wish(path, A, state="released")["mine"]


def test_it_is_taken_over_only_from_the_one_that_was_seen(path: str) -> None:
    wish(path, A)
    assert not wish(path, B, instead_of=MODULE.token_of(B))["mine"]
    assert wish(path, B, instead_of=MODULE.token_of(A))["mine"]
    assert wish(path, A, instead_of="any")["mine"]


@pytest.mark.parametrize("hours", [4.1, -4.1, 1000])
def test_a_clock_that_is_set_lets_nobody_in(path: str, hours: float) -> None:
    wish(path, A)
    assert not wish(path, B, now=99, clock=1e9 + hours * 3600)["mine"]
    assert wish(path, B, now=101, clock=1e9 - hours * 3600)["mine"]


def test_after_a_reboot_of_its_host_it_counts_from_the_boot_on(path: str) -> None:
    """Its owner is on another machine, and has gone through nothing."""
    wish(path, A, now=5000)
    assert wish(path, B, now=60, boot="two")["left"] == 40
    assert not wish(path, B, now=60, boot="two")["mine"]
    assert wish(path, A, now=60, boot="two")["left"] == 100
    assert not wish(path, B, now=159, boot="two")["mine"]
    assert wish(path, B, now=161, boot="two")["mine"]


BEFORE = {**A, "token": "a/one/x/1/10", "since": 1e9 - 50.5, "expires": 1e9 + 50.5}


def test_a_lock_of_a_release_before_counts_by_the_clock(path: str) -> None:
    Path(path).parent.mkdir()
    Path(path).write_text(json.dumps(BEFORE))
    assert not wish(path, B, now=50)["mine"]
    assert wish(path, A, now=50)["holder"]["since"] == 1e9 - 50.5
    Path(path).write_text(json.dumps(BEFORE))
    assert wish(path, B, now=51)["mine"]


DAMAGED = {
    "empty": "",
    "cut off": '{"user": "a", "ho',
    "a list": "[1]",
    "binary": "\udcff\udcfe",
    "without a token": json.dumps({name: value for name, value in BEFORE.items() if name != "token"}),
    "without an owner": json.dumps({"token": "t", "since": 1, "expires": 1e9 + 100}),
    "a time that is text": json.dumps({**BEFORE, "expires": "soon"}),
    "a time that is none": json.dumps({**BEFORE, "since": float("inf")}),
    "a process that is none": json.dumps({**BEFORE, "pid": None}),
    "half of the times": json.dumps({**BEFORE, "uptime": 1}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_lock_is_left_to_a_person(path: str, name: str) -> None:
    """Its owner may be at work."""
    Path(path).parent.mkdir()
    Path(path).write_text(DAMAGED[name], errors="surrogateescape")
    for dry in (True, False):
        answer = wish(path, B, dry=dry)
        assert (answer["mine"], answer["holder"]) == (False, {})
        assert answer["damaged"].startswith(f"{path}: no ")
    assert not wish(path, B, state="released")["mine"]
    assert wish(path, B, instead_of="any")["mine"]
    assert not wish(path, A)["mine"]


def asked(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], **args: Any) -> dict[str, Any]:
    """What the action plugin makes of the module's answer."""
    monkeypatch.setattr(ActionBase, "run", lambda *_: {})
    plugin = object.__new__(ACTION.ActionModule)
    plugin._task = SimpleNamespace(args=args, delegate_to="gateway-1")
    plugin._execute_module = lambda **_: answer
    result: dict[str, Any] = plugin.run(None, {})
    return result


def test_who_holds_it_is_one_line(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    wish(path, A)
    result = asked(monkeypatch, wish(path, B))
    assert result["failed"] and result["failure"]["id"] == "locked"
    assert result["msg"].startswith(
        "another rollout holds the lock: a on one (process 1), since 2001-09-09 01:46 UTC, until "
    )


def test_a_damaged_lock_is_one_line(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    Path(path).parent.mkdir()
    Path(path).write_text("{")
    result = asked(monkeypatch, wish(path, B))
    assert result["msg"] == (
        f"the file of the lock on gateway-1 is damaged: {path}: no JSON: "
        "see that no other rollout runs, then remove it, or run again with -e glm_rollout_break_lock=true"
    )
    assert "failed" not in asked(monkeypatch, wish(path, B), state="released")


def test_a_dry_run_takes_nothing(path: str) -> None:
    assert wish(path, A, dry=True)["mine"]
    assert not Path(path).exists()
    wish(path, A)
    assert not wish(path, B, dry=True)["mine"]
    assert wish(path, B, dry=True, instead_of=MODULE.token_of(A))["mine"]
    assert not wish(path, B)["mine"]


def test_a_process_that_ended_holds_nothing() -> None:
    child = subprocess.Popen(["sleep", "60"])
    holder = {**ACTION.owner(), "pid": child.pid, "begun": ACTION.begun(child.pid)}
    assert not ACTION.is_gone(holder)
    child.kill()
    child.wait()
    assert ACTION.is_gone(holder)


@pytest.mark.parametrize("other", [{"boot": "another"}, {"host": "another"}, {"boot": ACTION.boot_id()}])
def test_a_process_of_another_machine_or_container_is_not_judged(other: dict[str, str]) -> None:
    assert not ACTION.is_gone({**ACTION.owner(), "pid": 1, "begun": "1", **other})


def test_another_process_with_the_same_number_is_not_the_holder() -> None:
    assert ACTION.is_gone({**ACTION.owner(), "pid": os.getpid(), "begun": "1"})


@pytest.mark.parametrize("name", ["lock", "unlock"])
def test_nodes_are_locked_beside_their_gateways(name: str) -> None:
    """Another inventory may have the same nodes behind another gateway, or behind none."""
    path = Path(__file__).resolve().parents[2] / f"roles/rollout/tasks/{name}.yml"
    tasks = [task for task in yaml.safe_load(path.read_text()) if "glm.fleet.rollout_lock" in task]
    fleet, node, *_ = tasks
    assert "delegate_to" in fleet and fleet["run_once"]
    assert not {"when", "run_once", "delegate_to"} & set(node)
