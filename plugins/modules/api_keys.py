"""Documentation of the action plugin of the same name, which runs on the controller."""

DOCUMENTATION = r"""
module: api_keys
short_description: Check the file of API keys on the controller, and make it on first use
description:
  - Reads a file with one key a line; empty lines and lines that begin with C(#) are skipped.
  - Refuses a file that others can read, that holds no key, a malformed key or one key twice.
  - Returns digests, never a key. Runs on the controller and costs the node nothing.
options:
  path: {description: File on the controller., type: path, required: true}
  generate:
    description: Make the file with one random key if it is missing. In check mode it is only said to be made.
    type: bool
    default: false
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Have the API keys
  glm.fleet.api_keys:
    path: "{{ gateway_api_keys_file }}"
    generate: true
  run_once: true
"""

RETURN = r"""
digests: {description: SHA-256 of each key in hexadecimal., type: list, elements: str, returned: always}
path: {description: The file as an absolute path., type: str, returned: always}
"""
