#!/usr/bin/python
"""Ansible module: one rollout at a time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_lock
short_description: Hold or release the lock that lets one rollout at a time touch a fleet
description:
  - The lock is a file on one host of the fleet. It names its owner and the time at which it no longer counts.
  - The action plugin of this name runs on the controller, fills in O(owner), and takes over a lock of its own machine
    whose process is gone, so that a run that was killed can be begun anew at once.
options:
  path: {description: The lock's file., type: path, default: /var/lib/glm/rollout.lock}
  state:
    description: V(held) takes or renews it; V(released) gives back one's own.
    type: str
    choices: [held, released]
    default: held
  ttl: {description: Seconds after which it no longer counts unless renewed., type: int, default: 14400}
  owner:
    description: Who asks, with C(user), C(host), C(boot), C(pid), C(begun). The action plugin fills it in.
    type: dict
    default: {}
  instead_of: {description: The C(token) of a lock to take over; C(any) for whichever there is., type: str, default: ""}
attributes:
  check_mode:
    description: Says whether the lock could be had, and leaves it as it is.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Let no other rollout begin
  glm.fleet.rollout_lock:
    state: held
"""

RETURN = r"""
holder: {description: Who holds the lock now; empty for nobody., type: dict, returned: always}
mine: {description: Whether that is who asks., type: bool, returned: always}
"""

import fcntl
import json
import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

IDENTITY = ("user", "host", "boot", "pid", "begun")


def token_of(owner: dict[str, Any]) -> str:
    return "/".join(str(owner.get(part, "")) for part in IDENTITY)


def read(path: str, now: float) -> dict[str, Any]:
    """Who holds the lock; empty for nobody, also where it has expired or is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            holder = json.load(file)
        return dict(holder) if holder["expires"] > now else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write(path: str, holder: dict[str, Any]) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(holder, file)
    os.replace(f"{path}.new", path)


def change(params: dict[str, Any], now: float, dry: bool) -> dict[str, Any]:
    """What the lock is after the wish; the guard keeps two wishes apart."""
    path, token = params["path"], token_of(params["owner"])
    if dry:
        holder = read(path, now)
        free = not holder or holder["token"] == token or params["instead_of"] in ("any", holder["token"])
        return {"holder": holder, "mine": free}
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(f"{path}.guard", "w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        holder = read(path, now)
        free = not holder or holder["token"] == token or params["instead_of"] in ("any", holder["token"])
        if free and params["state"] == "held":
            since = holder["since"] if holder and holder["token"] == token else now
            holder = {**params["owner"], "token": token, "since": since, "expires": now + params["ttl"]}
            write(path, holder)
        elif free and os.path.exists(path):
            os.unlink(path)
            holder = {}
    return {"holder": holder, "mine": bool(free)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/var/lib/glm/rollout.lock"},
            "state": {"type": "str", "choices": ["held", "released"], "default": "held"},
            "ttl": {"type": "int", "default": 14400},
            "owner": {"type": "dict", "default": {}},
            "instead_of": {"type": "str", "default": "", "no_log": False},
        },
        supports_check_mode=True,
    )
    try:
        # It is there for the run alone: no change of the node's.
        module.exit_json(changed=False, **change(module.params, time.time(), module.check_mode))
    except OSError as problem:
        module.fail_json(msg=f"{module.params['path']}: the lock cannot be written: {problem.strerror}")


if __name__ == "__main__":
    main()
