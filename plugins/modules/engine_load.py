#!/usr/bin/python
"""Ansible module: how many requests an engine has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_load
short_description: Requests that the engine works on, and that wait in it
description:
  - By the engine's own metrics, so that requests count too which came past every edge. Read-only.
  - An engine that does not answer has no request that could be waited for; in check mode none is waited for.
options:
  url: {description: 'The engine, as the node reaches it.', type: str, required: true}
  running: {description: Metric of the requests in work., type: str, required: true}
  waiting: {description: Metric of those that wait; empty where C(running) has them too., type: str, default: ''}
  wait: {description: Seconds to wait until it has none., type: float, default: 0}
attributes:
  check_mode:
    description: Asks the engine once, and waits for nothing.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Wait until the engine has nothing to do
  glm.fleet.engine_load:
    url: http://127.0.0.1:8001
    running: vllm:num_requests_running
    waiting: vllm:num_requests_waiting
    wait: 10
"""

RETURN = r"""
running: {description: Requests in work; null where the engine does not answer., type: int, returned: always}
waiting: {description: Requests that wait; null likewise., type: int, returned: always}
idle: {description: Whether it has none., type: bool, returned: always}
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.metrics import load

INTERVAL = 0.2  # seconds between two looks


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "running": {"type": "str", "required": True},
            "waiting": {"type": "str", "default": ""},
            "wait": {"type": "float", "default": 0.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    deadline = time.monotonic() + (0 if module.check_mode else params["wait"])
    while True:
        now = load(params["url"], params["running"], params["waiting"])
        # A check run has drained nothing.
        idle = module.check_mode or not (now["running"] or now["waiting"])
        if idle or time.monotonic() >= deadline:
            module.exit_json(changed=False, idle=idle, **now)
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main()
