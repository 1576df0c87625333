"""Documentation of the action plugin of the same name, which runs on the controller."""

DOCUMENTATION = r"""
module: metrics_token
short_description: Check the token of those who read metrics, and make it on first use
description:
  - Refuses a file that others can read, or that holds anything but one token.
  - Never returns or shows the token. Runs on the controller and costs the node nothing.
options:
  path:
    description: File on the controller. Where it is missing it is made; in check mode it is only said to be.
    type: path
    required: true
  ephemeral:
    description: Whether the controller's files are gone after the run. Then a missing file is refused, not made.
    type: bool
    default: false
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Have the token
  glm.fleet.metrics_token:
    path: "{{ gateway_metrics_token_file }}"
  run_once: true
"""

RETURN = r"""
sha256:
  description: SHA-256 of the token in hexadecimal; in check mode of one that is not kept, where there is no file.
  type: str
  returned: always
path: {description: The file as an absolute path., type: str, returned: always}
"""
