"""Action plugin: an edge that cannot be reached is a failure of the task.

Ansible would call the node unreachable for whom the task is delegated, and run neither rescue nor always for it: it
would stay out of rotation without a reason.
"""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):  # type: ignore[misc]
    """Calls the module of this name."""

    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        try:
            result.update(self._execute_module(module_name="glm.fleet.backend_state", task_vars=task_vars))
        except AnsibleConnectionFailure as problem:
            host = self._task.delegate_to or (task_vars or {}).get("inventory_hostname")
            result.update(failed=True, msg=f"the edge {host} was not reached: {' '.join(str(problem).split())}")
        return result
