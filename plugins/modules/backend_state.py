#!/usr/bin/python
"""Ansible module: take a server of an edge out of rotation, put it back, or read how things stand."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backend_state
short_description: Which nodes an edge offers to new requests
description:
  - Speaks HAProxy's runtime interface on the host of the edge. What is set survives reloads and restarts.
  - A server that is out gets no new request; the requests that it holds go on.
  - An edge that cannot be reached is a failure like any other, so that a rescue can act; see the action plugin.
  - Another balancer takes HAProxy's place behind the same options and the same answer.
options:
  server: {description: Name of the server; empty to read alone., type: str, default: ""}
  rotation: {description: Whether it takes new requests. Read alone without it., type: str, choices: [in, out]}
  wait:
    description:
      - Seconds to wait; for V(out) until it holds no request, for V(in) until the edge's own checks call it up.
      - That it took longer is C(settled=false), not a failure.
    type: float
    default: 0
  absent_ok: {description: 'An edge that does not run is an empty answer, not a failure.', type: bool, default: false}
  socket: {description: HAProxy's socket with level admin., type: path, default: /run/haproxy/admin.sock}
  backend: {description: The backend with the servers., type: str, default: engines}
attributes:
  check_mode:
    description: Leaves the edge as it is, waits for nothing, and counts the server as settled.
    support: full
  diff_mode:
    description: Says what has changed, or in check mode would change.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Take a node out of rotation
  glm.fleet.backend_state:
    server: node-1
    rotation: out
    wait: 10
"""

RETURN = r"""
servers:
  description:
    - By name C(rotation) (in, out), C(up) (bool, by the edge's checks; false where it is out, which is not checked),
      C(sessions) (requests held), C(port) and C(tls) (how the edge reaches it).
  type: dict
  returned: always
settled: {description: Whether what was waited for came., type: bool, returned: always}
asks_for_keys: {description: Whether the edge has API keys., type: bool, returned: always}
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.haproxy import BACKEND, SOCKET, HAProxy, Unavailable

INTERVAL = 0.2  # seconds between two looks
KEYS = "/etc/glm/gateway/keys.map"
KEEP = "/opt/glm/bin/gateway-reload"  # writes the state that HAProxy reads on its next start


def settled(server: dict[str, Any], rotation: str) -> bool:
    return bool(server["up"] if rotation == "in" else server["sessions"] == 0)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "server": {"type": "str", "default": ""},
            "rotation": {"type": "str", "choices": ["in", "out"]},
            "wait": {"type": "float", "default": 0.0},
            "absent_ok": {"type": "bool", "default": False},
            "socket": {"type": "path", "default": SOCKET},
            "backend": {"type": "str", "default": BACKEND},
        },
        supports_check_mode=True,
    )
    name, rotation = module.params["server"], module.params["rotation"]
    edge = HAProxy(module.params["socket"], module.params["backend"])
    keys = os.path.exists(KEYS)
    try:
        servers = edge.servers()
        if not name or not rotation:
            module.exit_json(changed=False, servers=servers, settled=True, asks_for_keys=keys)
        if name not in servers and module.check_mode:  # the run would have configured it before
            module.exit_json(changed=True, servers=servers, settled=True, asks_for_keys=keys)
        if name not in servers:
            known = ", ".join(servers) or "none"
            module.fail_json(msg=f"this edge has no server {name} (it has {known}): run site.yml to configure it")
        before = servers[name]["rotation"]
        changed = before != rotation
        if changed and not module.check_mode:
            edge.rotate(name, rotation)
        # Also where it was so before: then it may be that it could not be kept, as on a full disk.
        if not module.check_mode and os.path.exists(KEEP):
            module.run_command([KEEP, "--save"], check_rc=True)
        deadline = time.monotonic() + module.params["wait"]
        servers = edge.servers()
        while not settled(servers[name], rotation) and time.monotonic() < deadline and not module.check_mode:
            time.sleep(INTERVAL)
            servers = edge.servers()
    except Unavailable as problem:
        if module.params["absent_ok"]:
            module.exit_json(changed=False, servers={}, settled=True, asks_for_keys=keys)
        module.fail_json(msg=str(problem))
    module.exit_json(
        changed=changed,
        servers=servers,
        settled=module.check_mode or settled(servers[name], rotation),
        asks_for_keys=keys,
        diff={"before": f"{name}: {before}\n", "after": f"{name}: {rotation}\n"},
    )


if __name__ == "__main__":
    main()
