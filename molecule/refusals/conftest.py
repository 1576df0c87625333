"""One node and its mirror for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from node import INVENTORY, Node
from testbed import SHARED, Play


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    return Play(tmp_path_factory.mktemp("refusals"), INVENTORY)


@pytest.fixture(scope="session")
def node(play: Play) -> Iterator[Node]:
    """A bare node. What an aborted run left behind goes first; REFUSALS_KEEP=1 leaves all as it is."""
    keep = os.environ.get("REFUSALS_KEEP")

    def shared(name: str, seconds: int) -> None:
        done = play(playbook=str(SHARED / name), seconds=seconds)
        assert done.code == 0, done.output[-3000:] + done.errors

    if not keep:
        shared("destroy.yml", 120)
    shared("create.yml", 3600)  # with the images to be built
    yield Node()
    if not keep:
        shared("destroy.yml", 120)
