"""Two nodes and their mirror for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from driver_testbed import INVENTORY, Node
from testbed import SHARED, Play


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    return Play(tmp_path_factory.mktemp("driver-refusals"), INVENTORY)


@pytest.fixture(scope="session")
def nodes(play: Play) -> Iterator[None]:
    """What an aborted run left behind goes first; REFUSALS_KEEP=1 leaves all as it is."""
    keep = os.environ.get("REFUSALS_KEEP")

    def shared(name: str, seconds: int) -> None:
        done = play(playbook=str(SHARED / name), seconds=seconds)
        assert done.code == 0, done.output[-3000:] + done.errors

    if not keep:
        shared("destroy.yml", 120)
    shared("create.yml", 3600)  # with the images to be built
    shared("distribution.yml", 120)
    yield
    if not keep:
        shared("destroy.yml", 120)


@pytest.fixture(scope="session")
def bare(play: Play, nodes: None) -> Node:
    """A node without a driver."""
    return Node("driver-bare", play)


@pytest.fixture(scope="session")
def loaded(play: Play, nodes: None) -> Node:
    """A node with 570.211.01 loaded."""
    return Node("driver-loaded", play)
