"""Callback: the garbage collector of the workers passes over what the controller has loaded."""

from __future__ import annotations

DOCUMENTATION = r"""
name: freeze_heap
type: aggregate
short_description: Keeps the workers' garbage collector off the controller's objects
description:
  - Each task of each host is a fork of the controller. Without this, the collector of each fork looks at all objects
    that were there before, whose number grows with the hosts, and so copies the memory that it shares with its parent.
  - Needs no settings; active wherever C(callback_plugins) names this directory.
"""

import gc
from typing import Any

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Freezes before each fork; collects once a play what has become garbage since."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "freeze_heap"

    def v2_playbook_on_play_start(self, play: Any) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        gc.freeze()
