#!/usr/bin/python
"""Ansible module: what a node serves and how it does, in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_status
short_description: Reads what a node serves, and how it does
description:
  - From the deployment's own files, the driver, the engine's metrics and the node's edge. Read-only, never fails.
options:
  base_dir: {description: Directory of the releases., type: path, default: /opt/glm}
  data_dir: {description: Directory of the state file., type: path, default: /var/lib/glm}
  metrics:
    description: By engine, the names of its metrics C(running) and, where it has one, C(waiting).
    type: dict
    default: {}
  socket: {description: HAProxy's socket., type: path, default: /run/haproxy/admin.sock}
attributes:
  check_mode:
    description: Reads the same as without it.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read how the node does
  glm.fleet.node_status:
    metrics: {vllm: {running: "vllm:num_requests_running", waiting: "vllm:num_requests_waiting"}}
"""

RETURN = r"""
status:
  description:
    - C(phase), C(since), C(reason), C(release), C(previous), C(engine), C(image), C(image_digest), C(model_revision),
      C(driver), C(unit), C(in_flight), C(verified) (time, ok, failed), C(stalls) (restarts, time and reason of the
      last, by the watchdog) and C(edge) (servers of the node's own edge).
    - What is not known is null.
  type: dict
  returned: always
"""

import os
import re
import subprocess
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_json
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.haproxy import SOCKET, HAProxy, Unavailable
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.metrics import load

UNIT = "glm-engine.service"


def driver(path: str = "/proc/driver/nvidia/version") -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = re.search(r"x86_64\s+([\d.]+)", file.read())
    except OSError:
        return None
    return found[1] if found else None


def unit_state(name: str) -> str | None:
    try:
        done = subprocess.run(["systemctl", "is-active", name], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def edge(socket: str) -> dict[str, Any] | None:
    try:
        servers: dict[str, Any] = HAProxy(socket).servers()
    except Unavailable:
        return None
    return servers


def broken_link(base: str) -> str | None:
    """What is wrong with the release that is pointed to; systemd passes over the start of an engine without one."""
    link = os.path.join(base, "current")
    if not os.path.lexists(link) or os.path.exists(os.path.join(link, "run")):
        return None
    target = os.readlink(link) if os.path.islink(link) else link
    return f"{link} points to {target}, where no release is: the engine cannot be started: run site.yml"


def status(params: dict[str, Any]) -> dict[str, Any]:
    state = read_json(os.path.join(params["data_dir"], "state.json"))
    release = read_json(os.path.join(params["base_dir"], "current", "release.json"))
    names = params["metrics"].get(release.get("engine")) or {}
    now = load(release["url"], names["running"], names.get("waiting", "")) if names and release.get("url") else {}
    counts = [now.get("running"), now.get("waiting")]
    return {
        "phase": state.get("phase"),
        "since": state.get("since"),
        "reason": broken_link(params["base_dir"]) or state.get("reason"),
        "previous": state.get("previous"),
        "release": release.get("id"),
        "engine": release.get("engine"),
        "image": release.get("image"),
        "image_digest": release.get("image_digest"),
        "model_revision": release.get("model_revision"),
        "driver": driver(),
        "unit": unit_state(UNIT),
        "in_flight": None if None in counts else sum(counts),
        "verified": read_json(os.path.join(params["data_dir"], "verify.json")) or None,
        "stalls": read_json(os.path.join(params["data_dir"], "watchdog.json")) or None,
        "edge": edge(params["socket"]),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "base_dir": {"type": "path", "default": "/opt/glm"},
            "data_dir": {"type": "path", "default": "/var/lib/glm"},
            "metrics": {"type": "dict", "default": {}},
            "socket": {"type": "path", "default": SOCKET},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, status=status(module.params))


if __name__ == "__main__":
    main()
