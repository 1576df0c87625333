#!/usr/bin/python
"""Ansible module: one rollout at a time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_lock
short_description: Hold or release the lock that lets one rollout at a time touch a fleet
description:
  - The lock is a file on one host of the fleet. It names its owner and how long it counts.
  - That time is measured by the host's uptime, since a clock may be set. A lock that has gone through a reboot of its
    host counts from the boot on, since its owner is on another machine and may have gone through nothing.
  - A file that is no lock is nobody's to take, since its owner may be at work. O(instead_of=any) takes it over.
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
left: {description: Seconds for which the holder's lock still counts., type: float, returned: always}
damaged: {description: What is wrong with the lock's file; empty for nothing., type: str, returned: always}
"""

import fcntl
import json
import os
import time
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

IDENTITY = ("user", "host", "boot", "pid", "begun")
# Of a lock; `expires` is for releases before, which went by the clock and wrote nothing of TIMED.
FIELDS: dict[str, Any] = {
    **dict.fromkeys((*IDENTITY, "token"), str),
    "pid": int,
    **dict.fromkeys(("since", "expires"), (int, float)),
}
TIMED: dict[str, Any] = {"lock_boot": str, **dict.fromkeys(("uptime", "ttl"), (int, float))}


class Now(NamedTuple):
    """Of the host where the lock lies: seconds since its boot, which boot that was, and its clock."""

    uptime: float
    boot: str
    clock: float


class Damaged(Exception):
    """The file is no lock; its text says why."""


def read_now() -> Now:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return Now(time.clock_gettime(time.CLOCK_BOOTTIME), file.read().strip(), time.time())


def token_of(owner: dict[str, Any]) -> str:
    return "/".join(str(owner.get(part, "")) for part in IDENTITY)


def is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (kind is str or 0 <= value < 1e11)


def checked(holder: Any) -> dict[str, Any]:
    if not isinstance(holder, dict):
        raise Damaged("no JSON object")
    fields = {**FIELDS, **(TIMED if set(TIMED) & set(holder) else {})}
    wrong = [name for name, kind in fields.items() if not is_a(holder.get(name), kind)]
    if wrong:
        raise Damaged(f"no good {', '.join(wrong)}")
    return holder


def left(holder: dict[str, Any], now: Now) -> float:
    """Seconds for which it still counts."""
    if "uptime" not in holder:
        return float(holder["expires"] - now.clock)
    return float(holder["ttl"] - now.uptime + (holder["uptime"] if holder["lock_boot"] == now.boot else 0))


def read(path: str, now: Now) -> dict[str, Any]:
    """Who holds the lock; empty for nobody, also where it has expired."""
    try:
        with open(path, encoding="utf-8") as file:
            holder = checked(json.load(file))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Damaged("no JSON") from None
    return holder if left(holder, now) > 0 else {}


def write(path: str, holder: dict[str, Any]) -> None:
    """On the disk, whole: what a power cut leaves half written would be in everybody's way."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(holder, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def change(params: dict[str, Any], now: Now, dry: bool) -> dict[str, Any]:
    """What the lock is after the wish; the guard keeps two wishes apart."""
    if dry:
        return decide(params, now)
    os.makedirs(os.path.dirname(params["path"]), mode=0o755, exist_ok=True)
    with open(f"{params['path']}.guard", "w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        answer = decide(params, now)
        return act(params, now, answer["holder"]) if answer["mine"] else answer


def decide(params: dict[str, Any], now: Now) -> dict[str, Any]:
    """Who holds it, and whether it is to be had."""
    damaged = ""
    try:
        holder = read(params["path"], now)
    except Damaged as problem:
        holder, damaged = {}, f"{params['path']}: {problem}"
    asks, instead_of = token_of(params["owner"]), params["instead_of"]
    free = instead_of == "any" or (holder.get("token") in (None, asks, instead_of or asks) and not damaged)
    return {"holder": holder, "mine": free, "left": left(holder, now) if holder else 0.0, "damaged": damaged}


def act(params: dict[str, Any], now: Now, before: dict[str, Any]) -> dict[str, Any]:
    path, token, ttl = params["path"], token_of(params["owner"]), params["ttl"]
    holder: dict[str, Any] = {}
    if params["state"] == "held":
        since = before["since"] if before.get("token") == token else now.clock
        timed = {"lock_boot": now.boot, "uptime": now.uptime, "ttl": ttl}
        holder = {**params["owner"], "token": token, "since": since, "expires": now.clock + ttl, **timed}
        write(path, holder)
    elif os.path.exists(path):
        os.unlink(path)
    return {"holder": holder, "mine": True, "left": float(ttl) if holder else 0.0, "damaged": ""}


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
        module.exit_json(changed=False, **change(module.params, read_now(), module.check_mode))
    except OSError as problem:
        module.fail_json(msg=f"{module.params['path']}: the lock cannot be read or written: {problem.strerror}")


if __name__ == "__main__":
    main()
