"""The demo's node, bare, and an SSH agent that has its key, for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from awx import IMAGE, Demo, Job, NewJob, checkout
from machines import Machine
from testbed import ROOT, SHARED, Play


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """EE_KEEP=1 leaves all as it is."""
    scratch = tmp_path_factory.mktemp("demo")
    play = Play(scratch, ROOT / "inventory/demo")
    keep = os.environ.get("EE_KEEP")

    def shared(name: str, seconds: int) -> None:
        done = play(playbook=str(SHARED / name), seconds=seconds, testbed_keys_dir=str(scratch / "keys"))
        assert done.code == 0, done.output[-3000:] + done.errors

    shared("destroy.yml", 120)
    shared("create.yml", 3600)
    socket = scratch / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        command = f"until [ -S {socket} ]; do sleep 0.1; done; ssh-add -q {scratch}/keys/id_ed25519"
        environment = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
        subprocess.run(["/bin/sh", "-c", command], env=environment, timeout=30, check=True)
        yield Demo(
            Machine("glm-demo-1"), (scratch / "keys/known_hosts").read_text(), str(socket), "sk-glm-" + "awx" * 12
        )
    finally:
        agent.terminate()
        agent.wait()
        if not keep:
            shared("destroy.yml", 120)


@pytest.fixture
def job(demo: Demo, tmp_path: Path) -> NewJob:
    """A job with a checkout of its own, whole or of some paths; it knows the node's host keys."""
    numbers = count(1)

    def new(*paths: str, image: str = IMAGE, known_hosts: str = demo.known_hosts) -> Job:
        number = next(numbers)
        project = checkout(tmp_path / f"checkout-{number}", *paths)
        made = Job(project, tmp_path / f"private-{number}", image, demo.agent)
        made.credential("glm-fleet host keys", known_hosts=known_hosts)
        return made

    return new
