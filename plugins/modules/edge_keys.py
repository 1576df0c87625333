#!/usr/bin/python
"""Ansible module: bring the API keys of an edge to what they shall be, in its file and in each HAProxy that runs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: edge_keys
short_description: Which API keys an edge takes
description:
  - Writes the map of keys and hands it to HAProxy by its runtime interface, without a reload. No connection is cut,
    and the next request is judged by the new map, also one to a worker that a reload has left its last connections.
  - HAProxy is asked before the file is written, so a file that is as it shall be tells that HAProxy has it too.
  - A host that is no edge yet is left alone.
options:
  content:
    description: Text of the map; a line has the SHA-256 of a key, and its name and limits.
    type: str
    required: true
  path: {description: The file of the map., type: path, default: /etc/glm/gateway/keys.map}
  socket: {description: HAProxy's socket with level admin., type: path, default: /run/haproxy/admin.sock}
  master: {description: The socket of its master., type: path, default: /run/haproxy-master.sock}
  lock: {description: The lock that a reload takes too., type: path, default: /run/haproxy/glm.lock}
  known:
    description:
      - What M(glm.fleet.node_info) has read under C(managed). A map that is in place by it costs no round trip.
    type: dict
attributes:
  check_mode: {description: Tells what would change., support: full}
  diff_mode: {description: Shows names and limits; of a digest the first eight digits., support: full}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Bring the edge to these keys
  glm.fleet.edge_keys:
    content: "{{ lookup('ansible.builtin.template', 'keys.map.j2') }}"
"""

RETURN = r"""
edge: {description: Whether the host asks for keys at all., type: bool, returned: always}
running: {description: Whether HAProxy runs there., type: bool, returned: always}
added:
  description: Names of keys that were not there, or with other limits.
  type: list
  elements: str
  returned: always
removed:
  description: Names of keys that are there no more, or with other limits.
  type: list
  elements: str
  returned: always
"""

import os
import stat
from contextlib import nullcontext
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_text, write_whole
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.haproxy import (
    LOCK,
    MASTER,
    SOCKET,
    HAProxy,
    Unavailable,
    locked,
    workers,
)

Entries = list[tuple[str, str]]


class QuietModule(AnsibleModule):  # type: ignore[misc]
    """Keeps the digests out of the node's journal and of `-vvv` output."""

    def log(self, msg: str, log_args: Any = None) -> None:
        """Would write every argument to the journal."""

    def exit_json(self, **kwargs: Any) -> None:
        super().exit_json(**{"invocation": {}, **kwargs})

    def fail_json(self, msg: str, **kwargs: Any) -> None:
        super().fail_json(msg, **{"invocation": {}, **kwargs})


def entries_of(text: str) -> Entries:
    """As HAProxy reads a map."""
    lines = (line.split(None, 1) for line in text.splitlines() if not line.startswith("#"))
    return [(words[0], words[1].strip()) for words in lines if len(words) == 2]


def shown(entries: Entries) -> list[str]:
    """For people: no digest as a whole."""
    return sorted(f"{value} ({digest[:8].lower()})" for digest, value in entries)


def names(entries: Entries) -> list[str]:
    return sorted(value.partition(":")[0] for _, value in entries)


def bring(worker: HAProxy, path: str, wanted: Entries, check: bool) -> Entries:
    """What the worker had."""
    now = worker.map(path)
    if now is None:
        return wanted
    if sorted(now) != sorted(wanted) and not check:
        worker.replace_map(path, wanted)
        if sorted(worker.map(path) or wanted) != sorted(wanted):
            raise Unavailable("HAProxy has not taken the new keys: run it again, or restart haproxy.service")
    return now


def running(path: str) -> bool:
    """A HAProxy that hangs is one that runs."""
    try:
        HAProxy(path).ask("show info")
    except Unavailable as problem:
        return not isinstance(problem.__cause__, (ConnectionRefusedError, FileNotFoundError))
    return True


def main() -> None:
    module = QuietModule(
        argument_spec={
            "content": {"type": "str", "required": True},
            "path": {"type": "path", "default": "/etc/glm/gateway/keys.map"},
            "socket": {"type": "path", "default": SOCKET},
            "master": {"type": "path", "default": MASTER},
            "lock": {"type": "path", "default": LOCK},
            "known": {"type": "dict"},  # of the action plugin, which takes it out
        },
        supports_check_mode=True,
    )
    options = module.params
    path, check = options["path"], module.check_mode
    text = options["content"].rstrip("\n") + "\n"
    wanted = entries_of(text)
    if not os.path.exists(path):
        module.exit_json(changed=False, edge=False, running=False, added=[], removed=[])
    serves = running(options["socket"])
    try:
        with locked(options["lock"]) if serves and not check else nullcontext():
            seen = [entries_of(read_text(path))]
            in_place = read_text(path) == text and stat.S_IMODE(os.stat(path).st_mode) == 0o600
            if serves:
                asked = workers(options["socket"], options["master"])
                seen += [bring(worker, path, wanted, check) for worker in asked]
            if not in_place and not check:
                write_whole(path, text, 0o600)
                # One that has crashed meanwhile began with the old file.
                if serves:
                    bring(HAProxy(options["socket"]), path, wanted, check)
    except Unavailable as problem:
        module.fail_json(f"the keys were not changed: {problem}: systemctl restart haproxy, then run it again")
    except OSError as problem:
        module.fail_json(f"the keys were not changed: {problem.filename or path}: {problem.strerror}")
    before = sorted({entry for entries in seen for entry in entries})
    missing = {entry for entries in seen for entry in set(wanted) - set(entries)}
    module.exit_json(
        changed=not in_place or any(sorted(entries) != sorted(wanted) for entries in seen),
        edge=True,
        running=serves,
        added=names(sorted(missing)),
        removed=names(sorted(set(before) - set(wanted))),
        diff={
            "before_header": path, "after_header": path,
            "before": "".join(f"{line}\n" for line in shown(sorted(set(before) - missing))),
            "after": "".join(f"{line}\n" for line in shown(wanted)),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
