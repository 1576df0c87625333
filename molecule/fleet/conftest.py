"""Two gateways and three nodes for the tests of this folder, and clients that use them all through."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fleet import Fleet, provided
from testbed import ROOT, Play

INVENTORY = ROOT / "molecule/fleet/inventory"
LOAD = ROOT / "results/fleet/load.txt"  # the counts
NODES = ("fleet-1", "fleet-2", "fleet-3")
GATEWAYS = {"fleet-gateway-1": "http://198.18.71.5:8000", "fleet-gateway-2": "http://198.18.71.6:8000"}

# FLEET_ENGINE=vllm: real vLLM on the CPU, which two cores bear for a few sessions; else the light engine.
REAL = os.environ.get("FLEET_ENGINE") == "vllm"
IMAGES = ["vllm/vllm-openai:light", *(["vllm/vllm-openai:glm52-cu129"] if REAL else [])]
STALL = 60 if REAL else 15  # seconds until a watchdog calls an engine stalled
# Each engine would bind its worker to the first core, and one that is busy there starves the one that starts.
REAL_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, Any] = {
    "glm_image": IMAGES[-1],
    "glm_watchdog_timeout": STALL,
    "fleet_engine_env": REAL_ENV if REAL else {},
}


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    play = Play(tmp_path_factory.mktemp("fleet"), INVENTORY)
    more: dict[str, Any] = {"patience": 4, "clients": (3, 2, 20)} if REAL else {}
    with provided(Fleet(play, NODES, GATEWAYS, SETTINGS, **more), "FLEET_KEEP", IMAGES) as fleet:
        yield fleet
        text = [
            *fleet.lines,
            f"requests sent {fleet.total['sent']}, failed {fleet.total['failed']}",
            f"streams {fleet.total['streams']}, cut {fleet.total['cut']}",
            f"changes of a session's node under load {fleet.total['moves']}",
        ]
        LOAD.parent.mkdir(parents=True, exist_ok=True)
        LOAD.write_text("\n".join(text) + "\n")


def pytest_sessionstart() -> None:
    LOAD.unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts, whatever pytest hides."""
    if LOAD.exists():
        terminalreporter.write_line(LOAD.read_text())


@pytest.fixture(scope="session")
def first(fleet: Fleet) -> str:
    """The release of the first deployment, on all nodes, with clients from the first node on."""
    with ThreadPoolExecutor() as runs:
        deployment = runs.submit(fleet.play, seconds=600)
        while not all(map(fleet.accepts, GATEWAYS)) and not deployment.done():
            time.sleep(1)
        if deployment.done():
            pytest.fail(f"no request was accepted before the deployment ended: {deployment.result().messages}")
        with fleet.load("first deployment"):
            run = deployment.result()
    assert run.code == 0, run.messages
    assert fleet.all_in()
    (release,) = set(fleet.releases())
    return release


@pytest.fixture
def load(fleet: Fleet, first: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """Clients all through the test."""
    with fleet.load(request.node.name):
        yield
