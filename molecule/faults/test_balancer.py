"""The gateways: each takes part, and what they know of a node is put right by the next run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import CANARY, GATEWAYS, NODES, Case

FIRST, SECOND = GATEWAYS


@pytest.mark.vital
@pytest.mark.fault("one of two cannot be reached at the start")
def test_a_gateway_that_is_down_is_refused(case: Case) -> None:
    with case.node(SECOND).unreachable():
        run = case.play(**case.next())
    case.refused(run, r"^Nothing was changed: the gateway faults-gateway-2 was not reached")


@pytest.mark.fault("one cannot be reached at the drain")
def test_a_gateway_lost_at_the_drain(case: Case, release: str) -> None:
    """The node stays where it is: nothing is stopped that a gateway may still send requests to."""
    engine = case.fleet.engine(CANARY)
    acting = case.during("draining", case.node(SECOND).cut_off)
    try:
        run = case.play(seconds=300, **case.next())
    finally:
        acting.join()
        case.node(SECOND).let_in()
    assert run.code != 0
    assert case.fleet.engine(CANARY) == engine, "it was stopped although a gateway may still send requests there"
    settings = {"light_release": "after the gateway"}
    again = case.play(seconds=300, **settings)
    case.converged(again, "the node kept its release, and its engine was not stopped; the next run converged")


@pytest.mark.fault("it does not know the node's name")
def test_a_name_that_no_gateway_has(case: Case, tmp_path: Path) -> None:
    inventory = case.fleet.other_inventory(tmp_path, "faults-2:", "faults-9:")
    run = case.play("--limit", "faults-9", playbook="playbooks/drain.yml", inventory=inventory)
    case.refused(run, r"this edge has no server faults-9 \(it has faults-1, faults-2\): run site\.yml")


ENDLESS = """
import sys, httpx2
key = sys.stdin.readline().strip()
body = {"model": "glm-5.2-fp8", "stream": True, "messages": [{"role": "user", "content": "Say 100000 words"}],
        "chat_template_kwargs": {"enable_thinking": False}}
with httpx2.Client(timeout=600, trust_env=False) as client:
    with client.stream("POST", "http://198.18.72.10:8000/v1/chat/completions", json=body,
                       headers={"Authorization": f"Bearer {key}"}) as answer:
        for line in answer.iter_lines():
            if line:
                print("token", flush=True)
"""


@contextmanager
def endless_stream(case: Case) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A client of the canary whose answer does not end, and what it has got so far."""
    client = subprocess.Popen([sys.executable, "-c", ENDLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin and client.stdout
    client.stdin.write(case.fleet.key() + "\n")
    client.stdin.flush()
    assert client.stdout.readline() == "token\n"
    tokens: list[str] = []
    reader = threading.Thread(target=lambda: tokens.extend(client.stdout or []))
    reader.start()
    try:
        yield client, tokens
    finally:
        client.terminate()
        client.wait()
        reader.join()


@pytest.mark.fault("a stream that never ends, policy abort")
def test_an_endless_stream_is_not_cut(case: Case, release: str) -> None:
    with endless_stream(case) as (client, tokens):
        run = case.play(**case.next(glm_rollout_drain_timeout=10))
        case.rolled_back(run, r"faults-1: \d+ requests were still in flight after 10 s", release)
        before = len(tokens)
        time.sleep(2)
        assert client.poll() is None and len(tokens) > before, "the stream was cut"
        case.what += "; the stream goes on"


@pytest.mark.fault("a stream that never ends, policy force")
def test_an_endless_stream_is_cut_where_the_policy_says_so(case: Case) -> None:
    with endless_stream(case) as (client, _):
        run = case.play(**case.next(glm_rollout_drain_timeout=10, glm_rollout_drain_policy="force"))
        client.wait(timeout=30)
    case.converged(run, "that stream was cut after the time to drain, no other request was; the rollout went on")


@pytest.mark.fault("it is reloaded during a drain")
def test_a_reload_does_not_bring_a_drained_node_back(case: Case) -> None:
    with endless_stream(case), ThreadPoolExecutor() as pool:
        drain = pool.submit(case.play, "--limit", CANARY, playbook="playbooks/drain.yml", glm_rollout_drain_timeout=20)
        deadline = time.monotonic() + 60
        while {case.fleet.rotation(gateway)[CANARY].split()[0] for gateway in GATEWAYS} != {"out"}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for gateway in GATEWAYS:
            case.fleet.run(gateway, "systemctl reload haproxy")
        time.sleep(3)
        assert {case.fleet.rotation(gateway)[CANARY].split()[0] for gateway in GATEWAYS} == {"out"}
    assert drain.result().code != 0  # the stream outlasted it
    run = case.play("--limit", CANARY, playbook="playbooks/undrain.yml")
    assert run.code == 0, run.messages
    case.what = "it stayed out on both, by the saved server state"


@pytest.mark.fault("one is stopped during a run")
def test_a_gateway_that_is_stopped_in_between(case: Case, release: str) -> None:
    """Its clients are refused at the door; the other one, and the rollout, must not suffer."""
    case.spared = "a gateway that is stopped takes no requests"
    process = case.fleet.begin(**case.next(light_load_seconds="10"))
    case.began = time.monotonic()
    assert process.stdout
    assert any("Start the engine and wait" in line for line in process.stdout)
    case.fleet.run(SECOND, "systemctl stop haproxy")
    output = process.communicate(timeout=400)[0]
    case.fleet.run(SECOND, "systemctl start haproxy")
    time.sleep(3)
    settings = {"light_release": "after the stopped gateway"}
    first = "the rollout went on" if process.returncode == 0 else "the rollout halted with its reason"
    assert process.returncode == 0 or "fatal: " in output
    case.converged(case.play(seconds=400, **settings), f"{first}; the next run converged")


@pytest.mark.fault("the minimum would be undercut")
def test_a_wave_that_takes_too_many(case: Case) -> None:
    run = case.play(**case.next(), glm_rollout_waves=["100%"], glm_rollout_min_available=1)
    case.refused(run, r"^Nothing was changed: wave 0 stops faults-1, faults-2 and leaves 0 of 2 serving nodes")


@pytest.mark.fault("a node left drained by an earlier run")
def test_a_node_left_drained_is_put_back(case: Case) -> None:
    first = case.play(light_release="drained")
    assert first.code == 0, first.messages
    engines = [case.fleet.engine(node) for node in NODES]
    case.began = time.monotonic()
    for gateway in GATEWAYS:
        case.fleet.haproxy(gateway, f"set server engines/{CANARY} state drain")
    assert not case.fleet.all_in()
    settings = {"light_release": "drained"}
    case.converged(case.play(**settings), "put back, verified, although its release had not changed")
    assert [case.fleet.engine(node) for node in NODES] == engines
    assert case.fleet.all_in()


@pytest.mark.fault("it dies, with two of them")
def test_a_gateway_that_dies_comes_back_by_itself(case: Case) -> None:
    case.spared = "connections of a HAProxy that is killed end with it"
    case.began = time.monotonic()
    case.fleet.run(FIRST, "systemctl kill --signal=KILL haproxy")
    deadline = time.monotonic() + 60
    while not case.fleet.accepts(FIRST):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    case.what = f"systemd started it again; it took requests after {time.monotonic() - case.began:.0f} s"
