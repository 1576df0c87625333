"""Action plugin: the token of those who read metrics, a file on the controller that is made on first use."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused, check_private, write

TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{20,512}")
SPEC = {
    "path": {"type": "path", "required": True},
    "ephemeral": {"type": "bool", "default": False},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone. The token itself is in no answer."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=SPEC)
        path = os.path.abspath(args["path"])
        try:
            return {**result, "path": path, **self._bring(path, args["ephemeral"])}
        except (Refused, AnsibleError) as problem:
            said = str(problem)
        except OSError as problem:
            said = f"{path}: {problem.strerror}"
        return {**result, "failed": True, "msg": said, "failure": failure("metrics_token", said, nothing_changed=True)}

    def _bring(self, path: str, ephemeral: bool) -> dict[str, Any]:
        there = os.path.lexists(path)
        if not there and ephemeral:
            raise Refused(
                f"{path} does not exist, and a token made here would be lost with this job: give the job a file by a "
                "credential (docs/awx.md)"
            )
        token = self._read(path) if there else secrets.token_urlsafe(32)
        if not there and not self._task.check_mode:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            write(path, f"{token}\n")
        return {"changed": not there, "sha256": hashlib.sha256(token.encode()).hexdigest()}

    def _read(self, path: str) -> str:
        """Decrypted if Ansible Vault has encrypted it."""
        check_private(path)
        with open(self._loader.get_real_file(path), encoding="utf-8", errors="replace") as file:
            token = file.read().strip()
        if not TOKEN.fullmatch(token):
            raise Refused(
                f"{path} holds no token (20 to 512 of A-Z a-z 0-9 . _ ~ + / = -, and nothing else): put one in it, or "
                "delete it to have one made"
            )
        return token
