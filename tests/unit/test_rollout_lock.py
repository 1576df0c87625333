"""One rollout at a time: who gets the lock, and when it counts no more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.action import rollout_lock as ACTION
from ansible_collections.glm.fleet.plugins.modules import rollout_lock as MODULE

A = {"user": "a", "host": "one", "boot": "x", "pid": 1, "begun": "10"}
B = {"user": "b", "host": "two", "boot": "y", "pid": 2, "begun": "20"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "glm/rollout.lock")


def wish(path: str, owner: dict[str, Any], now: float = 0, **more: Any) -> dict[str, Any]:
    dry = more.pop("dry", False)
    params = {"path": path, "owner": owner, "state": "held", "ttl": 100, "instead_of": "", **more}
    changed: dict[str, Any] = MODULE.change(params, now, dry)
    return changed


def test_the_first_one_gets_it_and_the_second_one_does_not(path: str) -> None:
    assert wish(path, A)["mine"]
    second = wish(path, B, now=50)
    assert not second["mine"]
    assert (second["holder"]["user"], second["holder"]["since"], second["holder"]["expires"]) == ("a", 0, 100)


def test_its_owner_renews_it(path: str) -> None:
    wish(path, A)
    assert wish(path, A, now=80)["holder"]["expires"] == 180
    assert not wish(path, B, now=150)["mine"]


def test_it_expires(path: str) -> None:
    wish(path, A)
    assert wish(path, B, now=101)["mine"]
    assert not wish(path, A, now=102)["mine"]


def test_only_its_owner_releases_it(path: str) -> None:
    wish(path, A)
    assert not wish(path, B, state="released")["mine"]
    assert wish(path, A, state="released") == {"holder": {}, "mine": True}
    assert wish(path, B)["mine"]


def test_releasing_what_nobody_holds_is_fine(path: str) -> None:
    assert wish(path, A, state="released")["mine"]


def test_it_is_taken_over_only_from_the_one_that_was_seen(path: str) -> None:
    wish(path, A)
    assert not wish(path, B, instead_of=MODULE.token_of(B))["mine"]
    assert wish(path, B, instead_of=MODULE.token_of(A))["mine"]
    assert wish(path, A, instead_of="any")["mine"]


def test_a_damaged_lock_counts_for_nothing(path: str) -> None:
    wish(path, A)
    Path(path).write_text("{")
    assert wish(path, B)["mine"]


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
