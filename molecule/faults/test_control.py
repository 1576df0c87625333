"""The controller: nodes that cannot be reached, runs that are killed, and two that want the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import CANARY, NODES, OTHER, Case
from machines import Machine

OTHER_LINE = "        faults-2: {ansible_host: 198.18.72.11}\n"  # of its hosts.yml


@pytest.mark.parametrize(
    "node",
    [
        pytest.param(OTHER, id="a node cannot be reached before", marks=pytest.mark.vital),
        pytest.param(CANARY, id="the canary cannot be reached"),
    ],
)
def test_an_unreachable_node_is_named_and_nothing_changes(node: str, case: Case) -> None:
    with case.node(node).unreachable():
        run = case.play(**case.next())
    case.refused(run, rf"^Nothing was changed\. Refused, as said above: {node}")


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        pytest.param("draining", "during the drain", id="a node is lost during the drain"),
        pytest.param("starting", "while its engine starts", id="a node is lost while its engine starts"),
    ],
)
def test_a_node_lost_in_its_turn(phase: str, words: str, case: Case, release: str) -> None:
    """It stays out of rotation, the rollout halts, and the next run finishes what was begun."""
    other = case.fleet.engine(OTHER)
    acting = case.during(phase, case.node().cut_off)
    try:
        run = case.play(seconds=500, **case.next(light_load_seconds="15"), inference_service_reconnect_timeout=10)
    finally:
        acting.join()
        case.node().let_in()
    assert run.code != 0
    assert case.fleet.engine(OTHER) == other, "the other node was touched"
    settings = {"light_release": f"after it was lost {words}"}
    case.converged(
        case.play(seconds=400, **settings), "it stayed out of rotation and the rollout halted; the next run converged"
    )


PHASES = (
    "Read the node",
    "Read the arguments within the image",
    "until it has no request in flight",
    "Stop the engine gently",
    "Point to the release",
    "Start the engine and wait until it serves",
    "Verify what it serves",
    "Put the node into rotation",
)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(
            task,
            id=f"the controller is killed at: {task}",
            marks=[pytest.mark.vital] * (task == "Point to the release"),
        )
        for task in PHASES
    ],
)
def test_the_controller_is_killed_and_the_run_begun_again(task: str, case: Case) -> None:
    wanted = case.next()
    case.began = time.monotonic()
    case.fleet.kill_at(task, **wanted)
    case.converged(case.play(seconds=400, **wanted), "the same command, run again, converged")


@pytest.mark.fault("two rollouts at once")
def test_the_second_rollout_is_refused(case: Case) -> None:
    process = case.fleet.begin(**case.next(light_load_seconds="40"))
    assert process.stdout
    case.began = time.monotonic()
    assert any("Take the nodes to the release" in line for line in process.stdout)
    run = case.play(**case.next())
    case.refused(run, r"another rollout holds the lock: ")
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == 0, rest[-2000:]


@pytest.mark.fault("the connection is lost in a long copy")
def test_a_lost_connection_does_not_end_a_copy(case: Case, release: str) -> None:
    elsewhere = "/var/lib/glm/elsewhere"
    settings = {
        "glm_model_revision": "2" * 40,
        "glm_weights_dir": elsewhere,
    }

    def lose(node: Machine) -> None:
        time.sleep(1)
        with node.unreachable():
            time.sleep(8)

    losing = case.during_the_copy(CANARY, lose)
    try:
        with case.mirror.hub(bytes_per_second=20_000):
            run = case.play(seconds=500, **case.next(**settings))
        losing.join()
        assert "connection lost, reconnecting" in run.output, run.output[-3000:]
        case.converged(run, "the copy went on without it, and the run found it again")
        back = case.play(seconds=400, light_release="after the copy")
        assert back.code == 0, back.messages
    finally:
        losing.join()
        for name in NODES:
            case.node(name).run(f"rm -rf {elsewhere}", check=False)


@pytest.mark.fault("the way back fails too")
def test_a_rescue_that_fails(case: Case, release: str) -> None:
    """The release before cannot start any more: the node stays out of rotation with its reason, then a run mends it."""
    node = case.node()
    run_file = f"/opt/glm/releases/{release}/run"
    node.run(f"cp -p {run_file} /root/run.good")
    acting = case.during("starting", lambda: node.run(f"sed -i '2i exit 7' {run_file}"))
    run = case.play(seconds=400, **case.next(light_fault="exit-at-once"))
    acting.join()
    assert run.code != 0
    state = case.fleet.state(CANARY)
    assert state["phase"] == "failed" and f"going back to {release} failed too" in state["reason"], state
    assert {case.fleet.rotation(gateway)[CANARY].split()[0] for gateway in case.fleet.gateways} == {"out"}
    node.run(f"mv /root/run.good {run_file}")
    settings = {"light_release": "after the rescue"}
    case.converged(
        case.play(seconds=400, **settings),
        "stopped, out of rotation, with both reasons in its state; the next run mended it",
    )


@pytest.mark.fault("--limit leaves a gateway out")
def test_limit(case: Case) -> None:
    run = case.play("--limit", "faults-1,faults-gateway-1", **case.next())
    case.refused(run, r"^Nothing was changed: the gateway faults-gateway-2 was not reached")


@pytest.mark.fault("a node leaves the inventory in between")
def test_a_node_that_left_the_inventory(case: Case, tmp_path: Path) -> None:
    inventory = case.fleet.other_inventory(tmp_path, OTHER_LINE, "")
    run = case.play(inventory=inventory, glm_accept_downtime=True, **case.next())
    case.refused(run, r"offers the node faults-2, which is not in the inventory")


@pytest.mark.fault("a node is added in between")
def test_a_node_that_joins(case: Case, tmp_path: Path) -> None:
    """One that was taken down for good, and is new to the gateways."""
    settings = case.next()
    for run in (
        case.play(**settings),
        case.play("--limit", OTHER, playbook="playbooks/teardown.yml"),
        case.play(inventory=case.fleet.other_inventory(tmp_path, OTHER_LINE, ""), **settings),
    ):
        assert run.code == 0, run.messages
    assert all(set(case.fleet.rotation(gateway)) == {CANARY} for gateway in case.fleet.gateways)
    engine = case.fleet.engine(CANARY)
    case.converged(case.play(**settings), "verified, and put into rotation beside the one that serves")
    assert case.fleet.engine(CANARY) == engine, "the node that serves was touched"
