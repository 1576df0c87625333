"""Action plugin: who asks for the lock, and whether the one who holds it is still alive."""

from __future__ import annotations

import getpass
import os
import socket
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure, render


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()  # a controller without /proc


def machine() -> str:
    """Where process ids mean the same: containers of one machine share its boot id, and not their processes."""
    try:
        return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{boot_id()} "


def begun(pid: int) -> str:
    """When a process began, as the kernel counts; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def owner() -> dict[str, Any]:
    """The process of ansible-playbook, whose worker this is."""
    pid = os.getppid()
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "boot": machine(),
        "pid": pid,
        "begun": begun(pid),
    }


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine that is there no more."""
    here = holder.get("boot") == machine() and holder.get("host") == socket.gethostname()
    return here and begun(int(holder["pid"])) != holder.get("begun")


def refusal(answer: dict[str, Any], where: str) -> dict[str, Any]:
    """Why the lock is not to be had; `where` is the host on which it lies."""
    breaks = "run again with -e glm_rollout_break_lock=true"
    if answer["damaged"]:
        text = f"the file of the lock on {where} is damaged: {answer['damaged']}"
        fix = f"see that no other rollout runs, then remove it, or {breaks}"
    else:
        holder = answer["holder"]
        since, until = (
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
            for moment in (holder["since"], time.time() + answer["left"])
        )
        text = (
            f"another rollout holds the lock: {holder['user']} on {holder['host']} (process {holder['pid']}), "
            f"since {since}, until {until} at the latest"
        )
        fix = f"wait for it, or, if it is certainly gone, {breaks}"
    return failure("locked", text, fix=fix, nothing_changed=True)


MODULE = "glm.fleet.rollout_lock"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Calls the module of this name, a second time where the holder is gone."""

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        forced = bool(args.pop("break", False))
        wish = {**args, "owner": owner(), "instead_of": "any" if forced else ""}
        try:
            answer = self._execute_module(module_name=MODULE, module_args=wish, task_vars=task_vars)
            holder = answer.get("holder") or {}
            if not answer.get("failed") and not answer.get("mine", True) and is_gone(holder):
                wish["instead_of"] = holder["token"]
                answer = self._execute_module(module_name=MODULE, module_args=wish, task_vars=task_vars)
                holder = answer.get("holder") or {}
        except AnsibleConnectionFailure as problem:
            # Ansible would call the node unreachable for whom the task is delegated.
            return {
                **result,
                "failed": True,
                "msg": f"the lock's host was not reached: {' '.join(str(problem).split())}",
            }
        result.update(answer)
        if not answer.get("failed") and not answer.get("mine", True) and wish.get("state", "held") == "held":
            found = refusal(answer, str(self._task.delegate_to or (task_vars or {}).get("inventory_hostname")))
            result.update(failed=True, msg=render(found), failure=found)
        return result
