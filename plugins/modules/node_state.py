#!/usr/bin/python
"""Ansible module: write the state file of a node's deployment."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_state
short_description: Notes on the node which phase of a deployment it is in
description:
  - Writes the state file before each phase, so that a later run reads where an earlier one was cut off.
  - Unchanged where phase, release, previous release and reason are the same; C(since) and C(rollout_id) then stay.
options:
  path: {description: The state file., type: path, default: /var/lib/glm/state.json}
  phase:
    description:
      - V(serving) says that C(release) was verified and serves.
      - In every other phase C(previous) is the release that was verified last.
    type: str
    required: true
    choices: [draining, stopping, starting, verifying, serving, rolling_back, failed]
  release: {description: Id of the release that the phase is about; empty for none., type: str, default: ""}
  previous: {description: Id of the release to go back to; empty for none., type: str, default: ""}
  rollout_id: {description: Names the run., type: str, default: ""}
  reason: {description: 'Why the node is in this phase, in one line.', type: str, default: ""}
  failure: {description: "What failed, as glm.fleet.fail returns it.", type: dict, default: {}}
attributes:
  check_mode:
    description: Says whether the file would change, and leaves it.
    support: full
  diff_mode:
    description: Says what has changed, or in check mode would change.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Note that the release serves
  glm.fleet.node_state:
    phase: serving
    release: 0123456789ab
    rollout_id: 20260701T120000
"""

RETURN = r"""
state: {description: What the file says now., type: dict, returned: always}
"""

import json
import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_json, write_whole

PHASES = ["draining", "stopping", "starting", "verifying", "serving", "rolling_back", "failed"]
COMPARED = ("phase", "release", "previous", "reason")


def next_state(now: dict[str, Any], wanted: dict[str, Any], since: str) -> dict[str, Any]:
    state = {key: wanted[key] or None for key in (*COMPARED, "rollout_id", "failure")}
    if now and all(now.get(key) == state[key] for key in COMPARED):
        return now
    return {
        "phase": state["phase"],
        "release": state["release"],
        "previous": state["previous"],
        "rollout_id": state["rollout_id"],
        "since": since,
        "reason": state["reason"],
        "failure": state["failure"],
    }


def write_state(path: str, state: dict[str, Any]) -> None:
    """Whole or not at all, also after a power cut."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    write_whole(path, dump(state))


def dump(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n" if state else ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/var/lib/glm/state.json"},
            "phase": {"type": "str", "required": True, "choices": PHASES},
            "release": {"type": "str", "default": ""},
            "previous": {"type": "str", "default": ""},
            "rollout_id": {"type": "str", "default": ""},
            "reason": {"type": "str", "default": ""},
            "failure": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    path: str = module.params["path"]
    now = read_json(path)  # of a damaged state it is written anew
    state = next_state(now, module.params, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    if state != now and not module.check_mode:
        try:
            write_state(path, state)
        except OSError as problem:
            module.fail_json(msg=f"{path}: the state cannot be written: {problem.strerror}")
    module.exit_json(
        changed=state != now,
        state=state,
        diff={"before_header": path, "after_header": path, "before": dump(now), "after": dump(state)},
    )


if __name__ == "__main__":
    main()
