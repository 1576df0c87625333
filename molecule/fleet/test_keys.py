"""Keys of a fleet in use: changed on every edge at once, whatever else goes on there."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import GATEWAYS, NODES, REAL, REAL_ENV
from fleet import OPENER, Fleet
from testbed import Run, crowd

EDGES = {**GATEWAYS, **{node: f"http://198.18.71.1{number}:8000" for number, node in enumerate(NODES)}}
FAULT = {**REAL_ENV, "VLLM_CPU_KVCACHE_SPACE": "100000"} if REAL else {"LIGHT_FAULT": "exit-at-once"}


def keys(fleet: Fleet, action: str, name: str = "", *arguments: str, **more: Any) -> Run:
    return fleet.play(
        *arguments, playbook="playbooks/keys.yml", glm_key_action=action, glm_key_name=name, seconds=120, **more
    )


def key_named(fleet: Fleet, name: str) -> str:
    (key,) = [words[0] for words in fleet.key_lines() if words[1:2] == [name]]
    return key


def pid(fleet: Fleet, edge: str) -> str:
    return fleet.haproxy(edge, "show info").partition("\nPid: ")[2].split()[0]


def refused(edge: str, key: str) -> bool:
    """Whether the edge does not know the key; what else it answers, of an engine that is down, is no matter here."""
    request = urllib.request.Request(f"{EDGES[edge]}/v1/models", headers={"x-api-key": key})
    try:
        with OPENER.open(request, timeout=20):
            return False
    except urllib.error.HTTPError as answer:
        return answer.code == 401


class Watch:
    """Asks every edge again and again with one key, until it is refused."""

    def __init__(self, key: str) -> None:
        self.key, self.refused_at, self.over = key, dict[str, float](), threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(edge,), daemon=True) for edge in EDGES]
        for thread in self.threads:
            thread.start()

    def ask(self, edge: str) -> None:
        while not self.over.wait(0.2):
            began = time.time()
            if refused(edge, self.key):
                self.refused_at[edge] = began
                return

    def ended(self) -> dict[str, float]:
        """When each edge was asked that refused it."""
        for thread in self.threads:
            thread.join(20)
        self.over.set()
        return self.refused_at


@pytest.fixture
def file(fleet: Fleet, first: str) -> Path:
    return fleet.playbook.inventory / "keys/api-keys.txt"


def test_a_key_revoked_in_the_middle_of_a_broken_rollout(fleet: Fleet, file: Path, first: str) -> None:
    """One node is drained, the canary fails: refused everywhere within 5 s, other streams uncut; and it stays so.

    The controller, the machines and the clients share the cores here: each has as much longer as others wait for them.
    """
    run = keys(fleet, "add", "leaked")
    assert run.code == 0, run.messages
    leaked = key_named(fleet, "leaked")
    assert leaked not in run.output + run.errors
    assert not any(refused(edge, leaked) for edge in EDGES)
    pids = {gateway: pid(fleet, gateway) for gateway in GATEWAYS}
    with fleet.load("a key revoked in a broken rollout", clients=(6, 6, 20)):
        drained = fleet.play("--limit", "fleet-3", playbook="playbooks/drain.yml")
        assert drained.code == 0, drained.messages
        rollout = fleet.begin(fleet_engine_env=FAULT)
        try:
            assert rollout.stdout
            assert any("Switch to it" in line for line in rollout.stdout), "the rollout did not come to the canary"
            threading.Thread(target=rollout.stdout.read, daemon=True).start()
            watch = Watch(leaked)
            began, others = time.time(), crowd()
            run = keys(fleet, "revoke", "leaked")
            assert rollout.poll() is None, "the rollout was over before"
            assert run.code == 0, run.messages
            assert all(run.trips[edge]["round_trips"] == 1 for edge in EDGES), run.trips
            seen = watch.ended()
            assert set(seen) == set(EDGES), f"still taken by {set(EDGES) - set(seen)}"
            left, last = file.stat().st_mtime, max(seen.values())
            fleet.say(
                f"a key revoked in a broken rollout: refused by all edges {last - left:.1f} s after it left the file, "
                f"{last - began:.1f} s after the command began"
            )
            assert last - left < 5 * others
        finally:
            code = rollout.wait()
        assert code != 0
        assert fleet.release("fleet-1") == first
        assert all(refused(edge, leaked) for edge in EDGES), "the rollout brought it back"
        back = fleet.play("--limit", "fleet-3", playbook="playbooks/undrain.yml")
        assert back.code == 0, back.messages
    assert {gateway: pid(fleet, gateway) for gateway in GATEWAYS} == pids, "a gateway was reloaded"
    assert fleet.all_in()


def test_what_was_applied_is_nothing_new_to_a_rollout(fleet: Fleet, file: Path, first: str) -> None:
    for run in (keys(fleet, "apply"), keys(fleet, "list"), fleet.play(seconds=200)):
        assert (run.code, run.recap("changed")) == (0, 0), run.messages


def test_a_key_of_the_file_comes_with_a_rollout_too_without_a_reload(fleet: Fleet, file: Path) -> None:
    """As one who adds a line by hand, and runs site.yml."""
    before = file.read_text()
    pids = {edge: pid(fleet, edge) for edge in EDGES}
    file.write_text(f"{before}sk-glm-{'h' * 43} by-hand requests_per_minute=100\n")
    run = fleet.play(seconds=200)
    assert (run.code, run.recap("changed")) == (0, len(EDGES)), run.messages
    assert not any(refused(edge, "sk-glm-" + "h" * 43) for edge in EDGES)
    file.write_text(before)
    run = keys(fleet, "apply")
    assert run.code == 0, run.messages
    assert all(refused(edge, "sk-glm-" + "h" * 43) for edge in EDGES)
    assert {edge: pid(fleet, edge) for edge in EDGES} == pids


def test_an_edge_that_is_not_reached_is_named_and_the_others_are_done(fleet: Fleet, file: Path, tmp_path: Path) -> None:
    line = "fleet-2: {ansible_host: 198.18.71.11"
    lost = fleet.other_inventory(tmp_path, line, f"{line}, ansible_port: 9, ansible_ssh_retries: 0")
    run = keys(fleet, "add", "carol", inventory=lost)
    assert run.code == 4 and "fleet-2 was not reached or failed, as said above" in run.output
    carol = key_named(fleet, "carol")
    # A gateway lets it through, and hands it on: to fleet-2 too, which does not know it.
    assert {node for node in NODES if refused(node, carol)} == {"fleet-2"}
    run = keys(fleet, "list")
    assert run.code == 0 and "fleet-2 has other keys" in run.output, run.output
    run = keys(fleet, "apply")
    assert run.code == 0, run.messages
    assert not refused("fleet-2", carol)
    run = keys(fleet, "revoke", "carol", "--limit", "gateways")
    assert run.code == 0 and "fleet-1 was not asked: --limit leaves it out" in run.output
    assert {edge for edge in EDGES if refused(edge, carol)} == set(GATEWAYS)
    assert keys(fleet, "apply").code == 0


def test_keys_are_not_made_anew_by_accident(fleet: Fleet, file: Path, tmp_path: Path) -> None:
    """A second operator's clone has no file of keys."""
    absent = tmp_path / "api-keys.txt"
    for arguments in ((), ("--limit", "fleet-3,gateways")):
        run = fleet.play(*arguments, glm_api_keys_file=str(absent))
        assert run.code != 0 and run.recap("changed") == 0
        (said,) = {message for message in run.messages if "API keys are already on" in message}
        assert (
            f"API keys are already on fleet-1, fleet-2, fleet-3, fleet-gateway-1, fleet-gateway-2, and {absent}" in said
        )
        assert not absent.exists()
    assert fleet.accepts("fleet-gateway-1")
