"""Documentation of the action plugin of the same name, which runs on the controller."""

DOCUMENTATION = r"""
module: lambda_firewall
short_description: Let named networks through Lambda Cloud's firewall, and leave all other rules as they are
description:
  - Reads the global ruleset (C(/firewall-rulesets/global)), adds a rule for each network that has none, takes away
    those with the same description whose network is no longer named, and writes it back. All other rules are sent as
    they were read.
  - The API replaces all rules at once, without a way to see that nobody else has changed them between; the time
    between reading and writing is about a second.
  - The global ruleset is for all instances of the account's workspace. It does not count in the region us-south-1.
options:
  networks: {description: IPv4 networks such as C(203.0.113.0/24)., type: list, elements: str, required: true}
  port: {description: TCP port that they may reach., type: int, required: true}
  description:
    description: Marks the rules as those of one inventory; at most 128 characters of it.
    type: str
    required: true
  api_key_file:
    description: File with the API key, mode 0600, also encrypted by Ansible Vault.
    type: path
    default: ""
  api_url: {description: The API., type: str, default: "https://cloud.lambda.ai/api/v1"}
  patience: {description: "Seconds for which 429, 5xx and failed connections are waited out.", type: int, default: 120}
attributes:
  check_mode: {description: Says what would be changed., support: full}
  diff_mode: {description: Shows the rules before and after., support: full}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Let the clients' network reach the endpoints
  glm.fleet.lambda_firewall:
    networks: [203.0.113.0/24]
    port: 8000
    description: "glm-fleet lambda: clients"
"""

RETURN = r"""
rules: {description: The rules as they are now., type: list, elements: dict, returned: success}
"""
