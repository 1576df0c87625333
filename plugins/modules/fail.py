#!/usr/bin/python
"""The documentation of an action plugin, which does the work."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fail
short_description: Fail with the failure as data
description:
  - Runs on the controller. C(msg) is rendered from the data, which C(failure) returns for what reads it later.
options:
  id:
    description: What kind of failure it is, for programs. It stays the same when the words change.
    type: str
    required: true
  text:
    description: What was found. It may have several lines.
    type: str
    required: true
  fix:
    description: What to set or run.
    type: str
    default: ""
  unit:
    description: The systemd unit whose journal has more.
    type: str
    default: ""
  nothing_changed:
    description: Whether no node was changed before it, so that the run counts as refused.
    type: bool
    default: false
  fleet:
    description: Whether it concerns all nodes; then no host is named in front.
    type: bool
    default: false
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Refuse an old Docker
  glm.fleet.fail:
    id: docker_too_old
    text: Docker 24.0 is too old, GPUs by CDI need 25.0
    fix: "set container_runtime_upgrade: true"
    nothing_changed: true
"""

RETURN = r"""
failure:
  description: id, host, text, fix, unit and nothing_changed.
  returned: always
  type: dict
"""
