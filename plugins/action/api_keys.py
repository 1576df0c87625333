"""Action plugin: check and edit the file of API keys on the controller, and make it on first use."""

from __future__ import annotations

import os
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from ansible_collections.glm.fleet.plugins.plugin_utils.key_file import edit, new_key, parse
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused, check_private, is_encrypted, write

SPEC = {
    "path": {"type": "path", "required": True},
    "generate": {"type": "bool", "default": False},
    "ephemeral": {"type": "bool", "default": False},
    "usable": {"type": "bool", "default": False},
    "edit": {"type": "str", "choices": ["add", "revoke", "rotate"]},
    "name": {"type": "str", "default": ""},
    "limits": {"type": "dict", "default": {}},
    "grace_hours": {"type": "float", "default": 0.0},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=SPEC)
        path = os.path.abspath(args["path"])
        try:
            return {**result, "path": path, **self._bring(path, args)}
        except (Refused, AnsibleError) as problem:
            said = str(problem)
        except OSError as problem:
            said = f"{path}: {problem.strerror}"
        return {**result, "failed": True, "msg": said, "failure": failure("api_keys", said, nothing_changed=True)}

    def _bring(self, path: str, args: dict[str, Any]) -> dict[str, Any]:
        there, check = os.path.lexists(path), self._task.check_mode
        if not there and args["ephemeral"]:
            raise Refused(
                f"{path} does not exist, and a key made here would be lost with this job: give the job a file of keys "
                "by a credential (docs/awx.md)"
            )
        if not there and not args["generate"]:
            raise Refused(f"{path} does not exist: site.yml makes it, or put one key a line in it")
        if not there and check:
            return {"changed": True, "digests": [], "keys": []}
        if not there:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            write(path, f"{new_key()}\n")
        check_private(path)
        if args["edit"]:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
            if is_encrypted(path):
                raise Refused(
                    f"{path} is encrypted: change it by `ansible-vault edit {path}`, then apply it by "
                    "playbooks/keys.yml (glm-fleet keys apply)"
                )
            text = edit(text, path, args["edit"], args["name"], args["limits"], grace=args["grace_hours"])
            if not check:
                write(path, text)
        else:
            text = self._text(path)
        entries = parse(text, path)
        if args["usable"] and all(entry.expired() for entry in entries):
            raise Refused(f"{path}: each key has expired: add one with glm-fleet keys add NAME")
        return {
            "changed": not there or bool(args["edit"]),
            "digests": [entry.sha256 for entry in entries],
            "keys": [entry.public() for entry in entries],
        }

    def _text(self, path: str) -> str:
        """The content, decrypted if Ansible Vault has encrypted it."""
        with open(self._loader.get_real_file(path), encoding="utf-8", errors="replace") as file:
            return file.read()
