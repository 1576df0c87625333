"""A node that serves, for the tests of this folder, and what they do to it behind Ansible's back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fleet import Fleet, provided
from machines import Machine
from testbed import ROOT, Play, Run, docker

INVENTORY = ROOT / "molecule/node-life/inventory"
NODE, EDGE = "life-1", "http://198.18.73.10:8000"
IMAGES = ["vllm/vllm-openai:light"]
# Seconds for a container to boot, Docker to start and the light engine to load, on a busy machine.
BOOT = 180


class Life(Machine):
    """The node from behind: its power switch, and what it says."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(f"glm-{NODE}")
        self.fleet = fleet

    def reboot(self) -> None:
        """A boot without Ansible: returns at once, the node comes up by itself."""
        docker("restart", "--time", "30", self.container, seconds=120)

    def serves(self) -> bool:
        return self.fleet.ask(EDGE, "hello", 20, max_tokens=4) == 200

    def wait(self, what: Callable[[], Any], seconds: float = BOOT) -> float:
        """Seconds until something is so."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds, self.said()
            time.sleep(1)
        return time.monotonic() - began

    def status(self) -> str:
        """The word of glm-engine.service for what it does."""
        return self.run("systemctl show glm-engine.service --property=StatusText --value", check=False).strip()

    def said(self) -> str:
        journal = "journalctl --boot --no-pager --output=short-precise --lines=40 --unit=glm-engine --unit=docker"
        return f"{self.status()}\n{self.run(journal, check=False)}"

    def waits_for(self, text: str) -> bool:
        return f"waits for {text}" in self.said()

    def drop_in(self, unit: str, text: str) -> None:
        path = f"/etc/systemd/system/{unit}.d/zz-test.conf"
        self.run(f"mkdir -p $(dirname {path}) && cat > {path} && systemctl daemon-reload", stdin=text)

    def remove_drop_in(self, unit: str) -> None:
        self.run(f"rm -f /etc/systemd/system/{unit}.d/zz-test.conf; systemctl daemon-reload", check=False)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    play = Play(tmp_path_factory.mktemp("node-life"), INVENTORY)
    with provided(Fleet(play, (NODE,), {NODE: EDGE}), "LIFE_KEEP", IMAGES) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def deployed(fleet: Fleet) -> Run:
    run = fleet.play(seconds=900)
    assert run.code == 0, run.messages
    return run


@pytest.fixture
def node(fleet: Fleet, deployed: Run) -> Life:
    """A node that serves, warm: after a boot HAProxy asks whether it is once more than a test does."""
    life = Life(fleet)
    life.wait(life.serves)
    return life
