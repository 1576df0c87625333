"""The watchdog of each node: a stalled engine is restarted, a saturated one is left alone."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from conftest import REAL, STALL
from fleet import Fleet

# Until then it serves again: two looks of 10 s at most, the time for requests that will never end and for their
# connections (10 s each), a start, and the checks of both edges.
BOUND = STALL + 2 * 10 + 2 * 10 + (180 if REAL else 5) + 15
NODE, ADDRESS = "fleet-2", "http://198.18.71.11:8000"


def ask(fleet: Fleet, prompt: str, timeout: float) -> int:
    """Status of the node's own answer; 0 where none came whole."""
    thinking = {"enable_thinking": False}
    return fleet.ask(ADDRESS, prompt, timeout, max_tokens=16, chat_template_kwargs=thinking)


def restarts(fleet: Fleet) -> int:
    with suppress(ValueError):
        return int(json.loads(fleet.run(NODE, "cat /var/lib/glm/watchdog.json", check=False))["restarts"])
    return 0


FAULTS = {
    "accepts and never answers": (
        "kill -STOP $(pgrep VLLM::EngineCor)" if REAL else "docker exec glm-engine sh -c 'echo hang > /tmp/fault'",
        r"no token for \d+ s, (nor one that was asked for|1 requests in flight)",
    ),
    "frozen": ("docker pause glm-engine", r"its metrics have not answered for \d+ s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_stalled_engine_is_restarted(name: str, fleet: Fleet, first: str) -> None:
    fault, reason = FAULTS[name]
    release, engine, count = fleet.release(NODE), fleet.engine(NODE), restarts(fleet)
    with ThreadPoolExecutor() as clients:
        fleet.run(NODE, fault)
        began = time.monotonic()
        lost = clients.submit(ask, fleet, "hello", BOUND)  # taken while it is stalled
        while fleet.engine(NODE) in ("", engine) or ask(fleet, "hello", 30) != 200 or not fleet.all_in():
            assert time.monotonic() - began < BOUND, fleet.run(NODE, "journalctl -n 20 -u glm-watchdog -u glm-engine")
            time.sleep(0.5)
        took = time.monotonic() - began
        status = lost.result()
    # A frozen engine thaws on its stop, and may still answer.
    assert status != 200 or name == "frozen"
    fleet.say(f"engine that {name}: serves again after {took:.0f} s (bound {BOUND})")
    assert took >= STALL
    assert fleet.release(NODE) == release
    assert restarts(fleet) == count + 1
    assert re.search(reason, fleet.state(NODE)["reason"])
    said = fleet.run(NODE, "journalctl -o cat -u glm-watchdog")
    assert re.search(rf"glm: the engine is stalled: {reason}: restarting it \(restart {count + 1} of this kind\)", said)


def test_a_saturated_engine_is_left_alone(fleet: Fleet, first: str) -> None:
    """One request at a time, a token a second, /health after 8 s: slow for three times as long as a stall takes."""
    engine, count = fleet.engine(NODE), restarts(fleet)
    with ThreadPoolExecutor(40) as clients:
        fleet.run(NODE, "docker exec glm-engine sh -c 'echo saturated > /tmp/fault'")
        answers = [clients.submit(ask, fleet, "Say 5 words", 300) for _ in range(40)]
        end = time.monotonic() + 3 * STALL
        while time.monotonic() < end:
            assert fleet.engine(NODE) == engine
            time.sleep(1)
        early = [answer.result() for answer in answers if answer.done()]
        assert len(early) < len(answers) / 2, f"it was not saturated: {early}"
        fleet.run(NODE, "docker exec glm-engine rm /tmp/fault")
        assert [answer.result() for answer in answers] == [200] * len(answers)
    assert fleet.engine(NODE) == engine
    assert restarts(fleet) == count
