"""Documentation of the action plugin of the same name, which runs on the controller."""

DOCUMENTATION = r"""
module: api_keys
short_description: Check and edit the file of API keys on the controller, and make it on first use
description:
  - A line is C(KEY [NAME] [requests_per_minute=N] [concurrent=N] [expires=YYYY-MM-DD]); what follows a C(#) is a
    comment. A key without a name is named by the first eight digits of its SHA-256.
  - Refuses a file that others can read, that holds no key, a malformed line, or one key or name twice.
  - Never returns or shows a key. Runs on the controller and costs the node nothing.
options:
  path: {description: File on the controller., type: path, required: true}
  generate:
    description: Make the file with one random key if it is missing. In check mode it is only said to be made.
    type: bool
    default: false
  ephemeral:
    description: Whether the controller's files are gone after the run. Then a missing file is refused, not made.
    type: bool
    default: false
  usable: {description: Refuse a file in which each key has expired., type: bool, default: false}
  edit:
    description:
      - What to do to the key I(name). A new key is in the file, and nowhere else.
      - The file is replaced at once. One that Ansible Vault has encrypted is refused.
    type: str
    choices: [add, revoke, rotate]
  name: {description: Name of the key to edit., type: str, default: ""}
  limits:
    description:
      - Of a new key C(requests_per_minute), C(concurrent) and C(expires). Without one, V(rotate) keeps the old key's.
    type: dict
    default: {}
  grace_hours:
    description: How long a rotated key goes on as C(NAME-old). V(0) takes it away at once.
    type: float
    default: 0
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Have the API keys
  glm.fleet.api_keys:
    path: "{{ gateway_api_keys_file }}"
    generate: true
  run_once: true

- name: Give a user a key
  glm.fleet.api_keys:
    path: "{{ gateway_api_keys_file }}"
    edit: add
    name: alice
    limits: {requests_per_minute: 60, concurrent: 4, expires: "2027-01-31"}
  run_once: true
"""

RETURN = r"""
digests: {description: SHA-256 of each key in hexadecimal., type: list, elements: str, returned: always}
keys:
  description:
    - Of each key C(name), C(digest) (its first eight digits), C(requests_per_minute) and C(concurrent) (0 for no
      limit), C(expires) as it is written, and C(expires_at) (seconds since 1970, 0 for never).
  type: list
  elements: dict
  returned: always
path: {description: The file as an absolute path., type: str, returned: always}
"""
