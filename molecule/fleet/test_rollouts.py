"""Rollouts over a fleet in use: not one accepted request fails or is cut."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import GATEWAYS, NODES, REAL, REAL_ENV
from fleet import OPENER, Fleet
from testbed import ROOT, SNAPSHOT, Run, crowd, differences

# Of the engines' own times to stop and to start.
BUDGET = 1.15


def engine_seconds(fleet: Fleet) -> float:
    """What the engines took by themselves: by systemd, from each one's stop to the end of its next start."""
    total = 0.0
    for node in NODES:
        command = (
            "systemctl show glm-engine --property ActiveExitTimestampMonotonic --property ActiveEnterTimestampMonotonic"
        )
        times = dict(line.split("=") for line in fleet.run(node, command).splitlines())
        total += (int(times["ActiveEnterTimestampMonotonic"]) - int(times["ActiveExitTimestampMonotonic"])) / 1e6
    return total


def one_line(run: Run, line: str) -> bool:
    return any(line in text for message in run.messages for text in message.splitlines())


def node_of(fleet: Fleet, session: str, gateway: str) -> str:
    """Where a session is answered."""
    body = {"model": "glm-5.2-fp8", "messages": [{"role": "user", "content": "hello"}]}
    request = urllib.request.Request(
        f"{GATEWAYS[gateway]}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {fleet.key()}",
            "Content-Type": "application/json",
            "X-Claude-Code-Session-Id": session,
        },
    )
    with OPENER.open(request, timeout=30) as answer:
        return str(answer.headers["X-Glm-Node"])


def homes(fleet: Fleet, gateway: str = "fleet-gateway-1") -> dict[str, str]:
    """Of 40 sessions, one after the other."""
    return {name: node_of(fleet, name, gateway) for name in (f"session-{number}" for number in range(40))}


def test_a_second_run_changes_nothing(fleet: Fleet, first: str) -> None:
    run = fleet.play(seconds=200)
    assert (run.code, run.recap("changed")) == (0, 0), run.messages
    assert fleet.all_in()


def test_the_first_release_has_none_to_go_back_to(fleet: Fleet, first: str) -> None:
    run = fleet.play(playbook="playbooks/rollback.yml")
    assert run.code != 0
    for node in NODES:
        # The first one may have another, which failed there as a canary.
        line = rf"{node}: there is no previous release to go back to \(found (\w+, )?{first}, current {first}\)"
        assert any(re.search(line, message) for message in run.messages), run.messages
    assert run.recap("changed") == 0
    assert fleet.all_in()


def test_the_status_costs_one_round_trip(fleet: Fleet, first: str) -> None:
    run = fleet.play(playbook="playbooks/status.yml")
    assert (run.code, run.recap("changed")) == (0, 0), run.messages
    assert {run.trips[host]["round_trips"] for host in (*NODES, *GATEWAYS)} == {1}
    status = json.loads((ROOT / "results/fleet/status.json").read_text())
    for node in NODES:
        assert status[node].items() >= {"rotation": "in", "phase": "serving", "release": first, "in_flight": 0}.items()
        assert status[node]["verified"]["ok"] is True
        assert re.search(rf"{node} +in +serving +{first} +vllm ", run.output)


def test_check_mode_changes_nothing(fleet: Fleet, load: None) -> None:
    before = {host: fleet.run(host, SNAPSHOT) for host in (*NODES, *GATEWAYS)}
    run = fleet.play("--check", "--diff", seconds=200, light_release="look")
    assert run.code == 0, run.messages
    for host, seen in before.items():
        assert differences(seen.splitlines(), fleet.run(host, SNAPSHOT).splitlines()) == []
    assert fleet.all_in()


def test_sessions_leave_a_drained_node_alone_and_stay_where_they_went(fleet: Fleet, first: str) -> None:
    before = homes(fleet)
    assert set(before.values()) == set(NODES)
    time.sleep(1)
    assert homes(fleet, "fleet-gateway-2") == before, "the gateways disagree"
    run = fleet.play("--limit", "fleet-2", playbook="playbooks/drain.yml")
    assert run.code == 0, run.messages
    drained = homes(fleet)
    assert {session: node for session, node in before.items() if node != "fleet-2"} == {
        session: node for session, node in drained.items() if before[session] != "fleet-2"
    }
    assert "fleet-2" not in drained.values()
    run = fleet.play("--limit", "fleet-2", playbook="playbooks/undrain.yml")
    assert run.code == 0, run.messages
    time.sleep(1)  # for the last ones to be told
    assert homes(fleet, "fleet-gateway-2") == drained


def test_sessions_in_use_stay_on_their_node_except_while_it_is_drained(fleet: Fleet, first: str) -> None:
    with fleet.load("a node drained and put back") as seen:
        for verb in ("drain", "undrain"):
            run = fleet.play("--limit", "fleet-2", playbook=f"playbooks/{verb}.yml")
            assert run.code == 0, run.messages
            time.sleep(5)
    strayed = {session: nodes for session, nodes in seen["visits"].items() if len(nodes) > 1}
    assert all("fleet-2" in nodes for nodes in strayed.values()), strayed
    assert seen["moves"] == len(strayed) > 0, "away once"


def test_rolling_upgrade(fleet: Fleet, load: None) -> None:
    """With a time to load that is still a quarter of a real engine's, which takes 15 minutes."""
    before = set(fleet.releases())
    began = time.monotonic()
    run = fleet.play(seconds=1200, light_release="2", light_load_seconds="240")
    wall = time.monotonic() - began
    assert run.code == 0, run.messages
    assert len(set(fleet.releases())) == 1 and set(fleet.releases()) != before
    assert fleet.all_in()
    own = engine_seconds(fleet)
    fleet.say(
        f"rolling upgrade of 3 nodes: {wall:.0f} s, the engines' own stops and starts {own:.0f} s: {wall / own:.2f}"
    )
    # With its checkpoint of a few MB real vLLM starts in a minute, which is no time to hide other work in. The run's
    # own part takes longer on a machine that others use too.
    assert REAL or wall <= own + (BUDGET - 1) * own * crowd()


def test_rollback_goes_to_the_release_before(fleet: Fleet, load: None, first: str) -> None:
    run = fleet.play(seconds=400, playbook="playbooks/rollback.yml")
    assert run.code == 0, run.messages
    assert fleet.releases() == [first] * 3
    assert fleet.all_in()


def test_a_canary_that_fails_halts_the_rollout(fleet: Fleet, load: None, first: str) -> None:
    others = [fleet.engine(node) for node in NODES[1:]]
    fault = {**REAL_ENV, "VLLM_CPU_KVCACHE_SPACE": "100000"} if REAL else {"LIGHT_FAULT": "exit-at-once"}
    run = fleet.play(seconds=300, fleet_engine_env=fault)
    assert run.code != 0
    assert re.fullmatch(
        rf"fleet-1: release [0-9a-f]{{12}} failed: glm-engine\.service: .*; release {first} serves again",
        run.messages[-1],
    ), run.messages
    assert fleet.releases() == [first] * 3
    assert [fleet.engine(node) for node in NODES[1:]] == others, "another node was touched"
    assert fleet.all_in()
    assert fleet.state("fleet-1")["reason"]


def test_a_node_that_fails_in_a_wave_with_one_that_does_not(fleet: Fleet, load: None, tmp_path: Path) -> None:
    """The good one ends on the new release, the bad one on its old one, both in rotation; no further wave begins."""
    before = fleet.releases()
    line = "fleet-2: {ansible_host: 198.18.71.11"
    inventory = fleet.other_inventory(tmp_path, line, f"{line}, light_fault: exit-at-once")
    run = fleet.play(seconds=300, inventory=inventory, light_release="3", glm_rollout_waves=[2])
    assert run.code != 0
    good, bad, later = fleet.releases()
    assert good not in before
    assert [bad, later] == before[1:]
    assert fleet.all_in()
    assert "failed: glm-engine.service: " in fleet.state("fleet-2")["reason"]
    assert one_line(run, "fleet-1: it serves, and the rollout halts here: fleet-2 failed (allowed 0), as said above")


PHASES = (
    "until it has no request in flight",
    "Point to the release",
    "Verify what it serves",
    "Put the node into rotation",
)


@pytest.mark.parametrize("task", PHASES)
def test_the_controller_is_killed_and_the_run_begun_again(fleet: Fleet, load: None, task: str) -> None:
    # The canary, then both others at once.
    kill_and_go_on(fleet, task, "site.yml", light_release=f"killed {task}", glm_rollout_waves=[1, 2])


def test_the_controller_of_a_rollback_is_killed_and_the_run_begun_again(fleet: Fleet, load: None) -> None:
    target = fleet.state("fleet-1")["previous"]
    wanted = {"glm_release": target, "glm_rollout_waves": [1, 2]}
    kill_and_go_on(fleet, "Point to the release", "playbooks/rollback.yml", **wanted)
    assert fleet.releases() == [target] * 3


def kill_and_go_on(fleet: Fleet, task: str, playbook: str, **wanted: Any) -> None:
    """SIGKILL to the controller as the task has begun, then the same command once more."""
    fleet.kill_at(task, playbook, **wanted)
    run = fleet.play(seconds=400, playbook=playbook, **wanted)
    assert run.code == 0, run.messages
    assert len(set(fleet.releases())) == 1
    assert fleet.all_in()
    assert {fleet.state(node)["phase"] for node in NODES} == {"serving"}


# --- bad input: one line, nothing changed ---

CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "a minimum that is none": (
        (),
        {"light_release": "x", "glm_rollout_min_available": "most"},
        "Nothing was changed: glm_rollout_min_available: 'most' is neither a count nor a share such as 75%",
    ),
    "waves that make no sense": (
        (),
        {"glm_rollout_waves": [0]},
        "glm_rollout_waves: 0 is no wave: write a count from 1 on, or a share from 1% to 100%",
    ),
    "too few nodes left": (
        (),
        {"light_release": "x", "glm_rollout_waves": ["100%"], "glm_rollout_min_available": 2},
        "Nothing was changed: wave 0 stops fleet-1, fleet-2, fleet-3 and leaves 0 of 3 serving nodes",
    ),
    "a gateway left out": (
        ("--limit", "fleet-1,fleet-gateway-1"),
        {"light_release": "x"},
        "Nothing was changed: the gateway fleet-gateway-2 was not reached: every gateway takes part in a rollout: "
        "add it to --limit",
    ),
    "the whole fleet for good": (
        (),
        {"playbook": "playbooks/teardown.yml"},
        "Nothing was changed: this stops fleet-1, fleet-2, fleet-3 and leaves 0 of 3 serving nodes (wanted at least 1)",
    ),
    "a release that is not there": (
        (),
        {"playbook": "playbooks/rollback.yml", "glm_release": "0123456789ab"},
        "fleet-1: there is no release 0123456789ab here (found ",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, fleet: Fleet, first: str) -> None:
    arguments, settings, line = CASES[name]
    engines = [fleet.engine(node) for node in NODES]
    run = fleet.play(*arguments, seconds=120, **settings)
    assert run.code != 0
    assert one_line(run, line), run.messages
    assert run.recap("changed") == 0
    assert [fleet.engine(node) for node in NODES] == engines
    assert fleet.all_in()


def test_a_gateway_that_is_down_is_refused(fleet: Fleet, first: str) -> None:
    engines = [fleet.engine(node) for node in NODES]
    with fleet.machine("fleet-gateway-2").unreachable():
        run = fleet.play(seconds=120, light_release="x")
    assert run.code != 0
    assert one_line(run, "Nothing was changed: the gateway fleet-gateway-2 was not reached"), run.messages
    assert [fleet.engine(node) for node in NODES] == engines


def test_a_lock_of_another_machine_is_respected_until_it_is_broken(fleet: Fleet, first: str) -> None:
    lock = {
        "user": "alice", "host": "other", "boot": "b", "pid": 7, "begun": "1", "token": "alice/other/b/7/1",
        "since": time.time() - 60, "expires": time.time() + 3600,
    }  # fmt: skip
    # On a node it is that of another inventory with the same nodes.
    for host in ("fleet-2", "fleet-gateway-1"):
        fleet.run(host, f"cat > /var/lib/glm/rollout.lock <<'END'\n{json.dumps(lock)}\nEND")
        run = fleet.play(seconds=120, light_release="x")
        assert run.code != 0
        assert one_line(run, "another rollout holds the lock: alice on other (process 7), since "), run.messages
        assert run.recap("changed") == 0
    run = fleet.play(seconds=300, glm_rollout_break_lock=True)
    assert run.code == 0, run.messages
    assert fleet.run("fleet-gateway-1", "ls /var/lib/glm/rollout.lock", check=False) == ""


FLEET_3 = "        fleet-3: {ansible_host: 198.18.71.12}\n"


def test_a_node_that_left_the_inventory_must_be_drained(fleet: Fleet, first: str, tmp_path: Path) -> None:
    run = fleet.play(seconds=120, inventory=fleet.other_inventory(tmp_path, FLEET_3, ""))
    assert run.code != 0
    assert one_line(run, "offers the node fleet-3, which is not in the inventory"), run.messages
    assert fleet.all_in()


def test_a_node_that_no_gateway_knows_is_refused(fleet: Fleet, first: str, tmp_path: Path) -> None:
    inventory = fleet.other_inventory(tmp_path, "fleet-3:", "fleet-9:")
    run = fleet.play("--limit", "fleet-9", playbook="playbooks/drain.yml", inventory=inventory)
    assert run.code != 0
    # Of an item of a loop, not of the task.
    assert "this edge has no server fleet-9 (it has fleet-1, fleet-2, fleet-3): run site.yml" in " ".join(
        run.output.split()
    )
    assert fleet.all_in()


def test_a_node_leaves_and_joins(fleet: Fleet, load: None, tmp_path: Path) -> None:
    """Torn down, out of the inventory, then back in it as a node that is new."""
    run = fleet.play("--limit", "fleet-3", playbook="playbooks/teardown.yml")
    assert run.code == 0, run.messages
    gone = "/opt/glm /etc/glm /var/lib/glm/state.json /etc/haproxy/haproxy.cfg /etc/systemd/system/glm-*"
    assert fleet.run("fleet-3", f"ls -d {gone} 2>/dev/null", check=False) == ""
    assert fleet.run("fleet-3", "docker ps --quiet") == ""
    assert fleet.run("fleet-3", "ls /var/lib/glm/models"), "the weights are kept"
    again = fleet.play("--limit", "fleet-3", playbook="playbooks/teardown.yml")
    assert (again.code, again.recap("changed")) == (0, 0), again.messages
    run = fleet.play(seconds=300, inventory=fleet.other_inventory(tmp_path, FLEET_3, ""))
    assert run.code == 0, run.messages
    assert all(set(fleet.rotation(gateway)) == {"fleet-1", "fleet-2"} for gateway in GATEWAYS)
    run = fleet.play(seconds=400)
    assert run.code == 0, run.messages
    assert fleet.all_in()
