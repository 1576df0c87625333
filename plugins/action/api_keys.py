"""Action plugin: check the file of API keys on the controller, and make it on first use."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

KEY = re.compile(r"[A-Za-z0-9._~+/=-]{20,512}")


class Refused(Exception):
    """What the user has to put right, in one line."""


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(
            argument_spec={"path": {"type": "path", "required": True}, "generate": {"type": "bool", "default": False}}
        )
        path = os.path.abspath(args["path"])
        try:
            made = not os.path.lexists(path)
            if made and not args["generate"]:
                raise Refused(f"{path} does not exist: site.yml makes it, or put one key a line in it")
            if made and not self._task.check_mode:
                generate(path)
            if made and self._task.check_mode:
                return {**result, "changed": True, "path": path, "digests": []}
            check_private(path)
            keys = parse(self._text(path), path)
        except (Refused, AnsibleError) as problem:
            return {**result, "failed": True, "msg": str(problem)}
        except OSError as problem:
            return {**result, "failed": True, "msg": f"{path}: {problem.strerror}"}
        return {
            **result,
            "changed": made,
            "path": path,
            "digests": [hashlib.sha256(key.encode()).hexdigest() for key in keys],
        }

    def _text(self, path: str) -> str:
        """The content, decrypted if Ansible Vault has encrypted it."""
        with open(self._loader.get_real_file(path), encoding="utf-8", errors="replace") as file:
            return file.read()


def generate(path: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"sk-glm-{secrets.token_urlsafe(32)}\n")


def check_private(path: str) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise Refused(f"{path} is open to others (mode {mode:04o}): chmod 600 {path}")


def parse(text: str, path: str) -> list[str]:
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not KEY.fullmatch(key):
            raise Refused(f"{path}, line {number}: not an API key (one a line, 20 to 512 of A-Z a-z 0-9 . _ ~ + / = -)")
        if key in seen:
            raise Refused(f"{path}, line {number}: the same key as in line {seen[key]}, delete one of them")
        seen[key] = number
    if not seen:
        raise Refused(f"{path} holds no key: put one a line in it, or delete it to have one made")
    return list(seen)
