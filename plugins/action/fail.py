"""Action plugin: fail with the failure as data beside its words."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure, render

SPEC = {
    "id": {"type": "str", "required": True},
    "text": {"type": "str", "required": True},
    "fix": {"type": "str", "default": ""},
    "unit": {"type": "str", "default": ""},
    "nothing_changed": {"type": "bool", "default": False},
    "fleet": {"type": "bool", "default": False},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=SPEC)
        host = "" if args.pop("fleet") else str((task_vars or {}).get("inventory_hostname", ""))
        found = failure(host=host, **args)
        return {**result, "failed": True, "msg": render(found), "failure": found}
