"""The engine: a release that fails is taken back, and one that only works hard is left alone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import CANARY, GATEWAYS, OTHER, Case, cases

# How the new release misbehaves, other settings, and the one line.
RELEASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "exits at once": ("exit-at-once", {}, r"glm-engine\.service: engine exited with code 1 after \d+ s: RuntimeError"),
    "never ready": (
        "never-ready",
        {"glm_engine_start_timeout": 20},
        r"engine not ready after 20 s, last phase: loading weights",
    ),
    "healthy, and no tokens": (
        "no-tokens",
        {"verify_timeout": 10, "glm_rollout_drain_timeout": 20},
        r"failed: .*(stream|sum|timed out|no answer)",
    ),
    "answers under a wrong model id": ("wrong-model", {}, r"failed: .*another-model"),
    "answers garbage": ("garbage", {}, r"failed: .*answered 'lkj 0 ~~ zzz'"),
    "answers long prompts with garbage": (
        "long-garbage",
        {},
        r"failed: find_fact: \d+ tokens: answered 'lkj 0 ~~ zzz', wanted '\d{4}'; second_turn: [^;]*; long_answer: ",
    ),
    "loses the calls of tools in streams": (
        "no-streamed-tools",
        {},
        r"failed: tool_call_stream: 0 tool calls, [^;]*; messages_tool_stream: 0 tool calls",
    ),
    "killed for memory": ("out-of-memory", {}, r"glm-engine\.service: .*(137|killed|SIGKILL|memory)"),
}
VITAL = ("exits at once",)


@pytest.mark.parametrize("name", cases(RELEASES, VITAL))
def test_the_release_before_serves_again(name: str, case: Case, release: str) -> None:
    fault, settings, line = RELEASES[name]
    run = case.play(**case.next(light_fault=fault, **settings))
    case.rolled_back(run, rf"faults-1: release [0-9a-f]{{12}} failed: .*; release {release} serves again", release)
    case.rolled_back(run, line, release)
    assert case.fleet.state(CANARY)["reason"]


@pytest.mark.fault("30 % slower than the baseline")
def test_a_slow_release_is_taken_back(case: Case) -> None:
    """The baseline is that of the run before, with the same workload."""
    measured = {
        "glm_benchmark": "quick",
        "glm_benchmark_quick": {"input_len": 16, "output_len": 32, "num_prompts": 8, "max_concurrency": 4},
    }
    good = case.play(seconds=400, **measured)
    assert good.code == 0, good.messages
    base = case.next(**measured)
    good = case.play(seconds=400, **base)
    assert good.code == 0, good.messages
    (release,) = set(case.fleet.releases())
    slower = {"faults_engine_env": {"LIGHT_TOKEN_SECONDS": "0.0715"}}
    run = case.play(seconds=400, **{**base, **slower})
    case.rolled_back(run, r"faults-1: release [0-9a-f]{12} failed: benchmark: .*fewer than the fleet's", release)


@pytest.mark.fault("its port is in use")
def test_a_taken_port_is_refused(case: Case, release: str) -> None:
    """Somebody else took it while the engine was down."""
    case.spared = "the engine is stopped by hand"
    case.began = time.monotonic()
    case.node().run("systemctl stop glm-engine")
    with case.node().listener(8001):
        run = case.play(**case.next())
        case.refused(run, r"^engine_port: port 8001 is taken \(found python3 \(pid \d+, squatter\.service\)")
    settings = {"light_release": "after the port"}
    what = case.what
    case.converged(case.play(**settings), f"{what}; once it was free the next run converged")


@pytest.mark.fault("ignores SIGTERM")
def test_an_engine_that_does_not_stop_is_killed_once_it_is_idle(case: Case) -> None:
    stubborn = case.play(**case.next(light_fault="ignore-term"))
    assert stubborn.code == 0, stubborn.messages
    run = case.play(seconds=500, **case.next(light_fault=""))
    case.converged(run, "drained first, then killed by systemd after its time to stop; the rollout went on")


@pytest.mark.fault("a crash loop")
def test_a_crash_loop_slows_down_and_a_run_mends_it(case: Case, release: str) -> None:
    """A good engine that now dies at each start: it is tried at growing intervals, and the gateways leave it out."""
    case.spared = "the fault kills the engine"
    node = case.node()
    image = node.run("docker inspect --format '{{.Config.Image}}' glm-engine").strip()
    assert image
    run_file = f"/opt/glm/releases/{release}/run"
    node.run(f"cp -p {run_file} /root/run.good && sed -i '2i exit 7' {run_file}")
    case.began = time.monotonic()
    node.run("docker kill glm-engine", check=False)
    deadline = time.monotonic() + 200
    while "after 2 failures in a row" not in node.run("systemctl show glm-engine --property StatusText"):
        assert time.monotonic() < deadline, node.run("systemctl status glm-engine", check=False)
        time.sleep(1)
    starts = int(node.run("systemctl show glm-engine --property NRestarts --value").strip())
    node.run(f"mv /root/run.good {run_file}")
    run = case.play(seconds=400, light_release="after the crash loop")
    case.converged(
        run,
        f"left out, and tried again at growing intervals ({starts} restarts); the next run brought a good release",
    )
    assert 1 <= starts <= 10


def chat(case: Case, prompt: str, key: str = "") -> int:
    """Status of the canary's own answer."""
    return case.fleet.ask("http://198.18.72.10:8000", prompt, 200, key, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.fault("hangs: accepts, and never answers")
def test_a_hung_engine_is_restarted_by_its_watchdog(case: Case, release: str) -> None:
    case.spared = "what the hung engine has taken is never answered"
    engine = case.fleet.engine(CANARY)
    case.began = time.monotonic()
    case.node().run("docker exec glm-engine sh -c 'echo hang > /tmp/fault'")
    deadline = time.monotonic() + 120
    while case.fleet.engine(CANARY) in ("", engine) or not case.fleet.all_in():
        assert time.monotonic() < deadline
        time.sleep(1)
    case.what = case.fleet.state(CANARY)["reason"]
    assert case.fleet.release(CANARY) == release


@pytest.mark.fault("saturated, and healthy")
def test_a_saturated_engine_is_left_alone(case: Case, release: str) -> None:
    engine = case.fleet.engine(CANARY)
    case.began = time.monotonic()
    with ThreadPoolExecutor(20) as clients:
        case.node().run("docker exec glm-engine sh -c 'echo saturated > /tmp/fault'")
        answers = [clients.submit(chat, case, "Say 3 words") for _ in range(20)]
        end = time.monotonic() + 45  # three times what a stall takes
        while time.monotonic() < end:
            assert case.fleet.engine(CANARY) == engine
            time.sleep(1)
        case.node().run("docker exec glm-engine rm /tmp/fault")
        assert {answer.result() for answer in answers} == {200}
    assert case.fleet.engine(CANARY) == engine
    case.what = "left alone; every request was answered"


@pytest.mark.fault("a wrong key")
def test_a_wrong_key_is_refused_at_the_edge(case: Case, release: str) -> None:
    case.began = time.monotonic()
    assert [chat(case, "hello", key="sk-wrong") for _ in range(20)] == [401] * 20
    assert chat(case, "hello") == 200
    case.what = "401 from the edge; the engine was not asked"


@pytest.mark.fault("the only healthy node is the next")
def test_a_node_that_is_down_counts_against_the_minimum(case: Case, release: str) -> None:
    case.spared = "the engine is stopped by hand"
    case.fleet.run(OTHER, "systemctl stop glm-engine")
    deadline = time.monotonic() + 60
    while any(case.fleet.rotation(gateway)[OTHER] != "in down" for gateway in GATEWAYS):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    try:
        run = case.play(**case.next(), glm_rollout_min_available=1)
        case.refused(run, r"^Nothing was changed: wave 0 stops faults-1 and leaves 0 of 1 serving nodes")
    finally:
        case.fleet.run(OTHER, "systemctl start glm-engine", check=False)
