"""freeze_heap: what was there before a fork is out of the collector's sight, and garbage does not stay for ever."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from ansible_collections.glm.fleet.plugins.callback import freeze_heap


class Node:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def callback() -> Iterator[freeze_heap.CallbackModule]:
    yield freeze_heap.CallbackModule()
    gc.unfreeze()


def test_before_each_task_all_objects_are_frozen(callback: freeze_heap.CallbackModule) -> None:
    kept = Node()
    callback.v2_playbook_on_task_start(None, False)
    assert gc.get_freeze_count() > 0
    assert not any(found is kept for found in gc.get_objects())


def test_a_play_collects_what_has_become_garbage_since(callback: freeze_heap.CallbackModule) -> None:
    node = Node()
    gone = weakref.ref(node)
    callback.v2_playbook_on_task_start(None, False)
    del node
    gc.collect()
    assert gone() is not None
    callback.v2_playbook_on_play_start(None)
    assert gone() is None
