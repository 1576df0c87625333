"""Action plugin: no round trip for keys that are known to be in place."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.action.file_set import in_place

PATH = "/etc/glm/gateway/keys.map"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Calls the module of this name, unless `known` says that there is nothing to do."""

    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        known = args.pop("known", None)
        file = {"path": args.get("path", PATH), "content": args["content"], "mode": "0600"}
        if known and in_place({"files": [file]}, known):
            return {**result, "changed": False, "edge": True, "added": [], "removed": []}
        result.update(self._execute_module(module_name="glm.fleet.edge_keys", module_args=args, task_vars=task_vars))
        return result
