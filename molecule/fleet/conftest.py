"""Two gateways and three nodes for the tests of this folder, and clients that use them all through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from testbed import ROOT, SHARED, Play, Run, docker

FLEET = ROOT / "molecule/fleet"
INVENTORY = FLEET / "inventory"
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
SHORT, STREAMS, ENOUGH = (3, 2, 20) if REAL else (24, 9, 100)


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Fleet:
    """The machines, from behind, and what was counted over all tests."""

    playbook: Play
    total: dict[str, int] = field(default_factory=lambda: {"sent": 0, "failed": 0, "streams": 0, "cut": 0, "moves": 0})
    lines: list[str] = field(default_factory=list)

    def play(self, *arguments: str, seconds: int = 300, **settings: Any) -> Run:
        """A playbook over the fleet, with the settings of the engine; real vLLM takes its time."""
        return self.playbook(*arguments, seconds=seconds * 4 if REAL else seconds, **{**SETTINGS, **settings})

    def run(self, host: str, command: str, check: bool = True) -> str:
        return docker("exec", "-i", f"glm-{host}", "/bin/sh", "-c", command, check=check)

    def state(self, node: str) -> dict[str, Any]:
        return dict(json.loads(self.run(node, "cat /var/lib/glm/state.json")))

    def release(self, node: str) -> str:
        return self.run(node, "basename $(readlink /opt/glm/current)").strip()

    def releases(self) -> list[str]:
        return [self.release(node) for node in NODES]

    def engine(self, node: str) -> str:
        """The id of the container that serves."""
        return self.run(node, "docker ps --quiet --no-trunc --filter name=^/glm-engine$").strip()

    def rotation(self, gateway: str) -> dict[str, str]:
        """Of each node whether the gateway offers it, and whether it calls it up."""
        program = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
            "s.sendall(b'show servers state engines\\n'); print(s.makefile().read())"
        )
        rows = [line.split() for line in self.run(gateway, f'python3 -c "{program}"').splitlines()]
        return {
            row[3]: f"{'out' if int(row[6]) & 0x3F else 'in'} {'up' if row[5] == '2' else 'down'}"
            for row in rows
            if len(row) > 6 and row[1] == "engines"
        }

    def all_in(self) -> bool:
        return all(self.rotation(gateway) == dict.fromkeys(NODES, "in up") for gateway in GATEWAYS)

    def key(self) -> str:
        return (INVENTORY / "keys/api-keys.txt").read_text().splitlines()[-1].strip()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def accepts(self, gateway: str) -> bool:
        """Whether the gateway has answered a request."""
        body = {"model": "glm-5.2-fp8", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
        try:
            request = urllib.request.Request(
                f"{GATEWAYS[gateway]}/v1/chat/completions",
                data=json.dumps(body).encode(),
                headers={"Authorization": f"Bearer {self.key()}", "Content-Type": "application/json"},
            )
            return bool(OPENER.open(request, timeout=60).status == 200)
        except OSError:  # no key yet, no gateway, or no node behind it
            return False

    @contextmanager
    def load(self, name: str) -> Iterator[dict[str, Any]]:
        """Clients all through the block; not one of their requests may fail. What they saw is there afterwards."""
        process = subprocess.Popen(
            [sys.executable, FLEET / "load.py", str(SHORT), str(STREAMS), *GATEWAYS.values()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        process.stdin.write(self.key() + "\n")
        process.stdin.flush()
        time.sleep(3)
        seen: dict[str, Any] = {}
        try:
            yield seen
            time.sleep(3)
        finally:
            process.terminate()
            output, errors = process.communicate(timeout=400)
            assert not errors
            result = json.loads(output)
            for count in ("sent", "streams", "moves"):
                self.total[count] += result[count]
            for kind in ("failed", "cut"):
                self.total[kind] += len(result[kind])
            seen.update(result)
            nodes = dict(sum(map(Counter, result["visits"].values()), Counter()))
            self.say(f"{name}: {result['sent']} requests, {result['moves']} changes of a node, {nodes}")
        assert (result["failed"], result["cut"]) == ([], [])
        assert result["done"] == result["sent"] > ENOUGH


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Bare machines. What an aborted run left behind goes first; FLEET_KEEP=1 leaves all as it is."""
    play = Play(tmp_path_factory.mktemp("fleet"), INVENTORY)
    keep = os.environ.get("FLEET_KEEP")

    def shared(name: str, seconds: int) -> None:
        done = play(playbook=str(SHARED / name), seconds=seconds, testbed_registry_images=IMAGES)
        assert done.code == 0, done.output[-3000:] + done.errors

    if not keep:
        shared("destroy.yml", 120)
    shared("create.yml", 3600)  # with the images to be built
    fleet = Fleet(play)
    yield fleet
    text = [
        *fleet.lines,
        f"requests sent {fleet.total['sent']}, failed {fleet.total['failed']}",
        f"streams {fleet.total['streams']}, cut {fleet.total['cut']}",
        f"changes of a session's node under load {fleet.total['moves']}",
    ]
    (ROOT / "results/fleet").mkdir(parents=True, exist_ok=True)
    (ROOT / "results/fleet/load.txt").write_text("\n".join(text) + "\n")
    print("\n" + "\n".join(text))
    if not keep:
        shared("destroy.yml", 120)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts, whatever pytest hides."""
    path = ROOT / "results/fleet/load.txt"
    if path.exists():
        terminalreporter.write_line(path.read_text())


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
