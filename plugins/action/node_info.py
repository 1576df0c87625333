"""Action plugin: how far the node's clock is from the controller's, whatever the way there takes.

A connection may take long, where many nodes are asked at once or the line is slow: the node's time is compared with
the span in which the controller knows it to have been read.
"""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase


def offset(begun: float, ended: float, asked: float, answered: float) -> float:
    """The least distance in seconds, positive where the node is ahead.

    begun, ended: on the node's clock, of its work; asked, answered: on the controller's, around it.
    """
    return round(max(ended - answered, 0.0) + min(begun - asked, 0.0), 3)


class ActionModule(ActionBase):  # type: ignore[misc]
    """Calls the module of this name."""

    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        asked = time.time()
        result.update(self._execute_module(module_name="glm.fleet.node_info", task_vars=task_vars))
        if "node" in result:
            clock = result["node"]["clock"]
            clock["offset_seconds"] = offset(clock["begun"], clock["ended"], asked, time.time())
        return result
