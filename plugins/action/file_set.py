"""Action plugin: no round trip for a set that is known to be in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.modules.file_set import data_of


def in_place(args: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether nothing of a set is to be done, by what glm.fleet.node_info has read of its paths.

    A path that it has not looked at is not known to be absent.
    """
    paths = known["paths"]
    return (
        all(_file(item, paths.get(item["path"])) for item in args.get("files") or [])
        and all(_directory(item, paths.get(item["path"])) for item in args.get("directories") or [])
        and all((paths.get(item["path"]) or {}).get("target") == item["target"] for item in args.get("links") or [])
        and all(path not in paths and _looked_at(path, known["patterns"]) for path in args.get("absent") or [])
    )


def _file(item: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    digest = hashlib.sha256(data_of(str(item["content"]))).hexdigest()
    return now is not None and now["sha256"] == digest and _owned(item, now, "0644")


def _directory(item: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    return now is not None and now["kind"] == "directory" and _owned(item, now, "0755")


def _owned(item: Mapping[str, Any], now: Mapping[str, Any], mode: str) -> bool:
    return int(str(item.get("mode") or mode), 8) == int(now["mode"], 8) and all(
        item.get(name) in (None, now[name]) for name in ("owner", "group")
    )


def _looked_at(path: str, patterns: list[str]) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in patterns)


class ActionModule(ActionBase):  # type: ignore[misc]
    """Calls the module of this name, unless `known` says that there is nothing to do."""

    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        known = args.pop("known", None)
        if known and in_place(args, known):
            return {**result, "changed": False, "changed_paths": [], "diff": []}
        result.update(self._execute_module(module_name="glm.fleet.file_set", module_args=args, task_vars=task_vars))
        return result
