"""Documentation of the action plugin of the same name, which runs on the controller."""

DOCUMENTATION = r"""
module: lambda_instance
short_description: Launch named instances of Lambda Cloud, or terminate them
description:
  - Launches the instances of I(names) that are not there, one by one, and waits until all are active. An instance is
    known by its name, so a second run launches nothing.
  - An order whose answer is lost is not sent again. The instance is looked for until I(lost_timeout), also by a later
    run; then the task fails. The API has no idempotency key.
  - Makes an ed25519 host key for each, which C(user_data) plants, and writes I(keys_directory)C(/known_hosts).
  - The API key comes from the environment variable E(LAMBDA_API_KEY), else from I(api_key_file).
  - In check mode it only says what it would do, and what that costs. Runs on the controller.
options:
  names:
    description: Names of the instances; with O(state=absent) also their ids.
    type: list
    elements: str
    required: true
  state:
    description: With V(absent) these instances are terminated, no other, and waited for until they are gone.
    type: str
    choices: [present, absent]
    default: present
  type: {description: Type of the instances., type: str, default: ""}
  regions:
    description: Where they may be launched, in this order, but those first that say to have capacity.
    type: list
    elements: str
    default: []
  image_family: {description: Family of the image; empty for the API's own choice., type: str, default: ""}
  ssh_key: {description: Name of an SSH key of the account; empty where it has one only., type: str, default: ""}
  file_systems: {description: Names of file systems to attach., type: list, elements: str, default: []}
  tags: {description: Tags of new instances., type: dict, default: {}}
  keys_directory: {description: Directory for host keys and C(known_hosts)., type: path, required: true}
  api_key_file:
    description: File with the API key, mode 0600, also encrypted by Ansible Vault.
    type: path
    default: ""
  api_url: {description: The API., type: str, default: "https://cloud.lambda.ai/api/v1"}
  max_cents_per_hour:
    description: Nothing is launched if what is missing costs more an hour, in US cents, or if this is not given.
    type: int
  capacity_retries:
    description: How often all regions are asked again where there is no capacity.
    type: int
    default: 20
  capacity_timeout: {description: Seconds for that., type: int, default: 1800}
  capacity_pause: {description: Seconds between two rounds., type: int, default: 60}
  lost_timeout:
    description: Seconds in which an instance may still appear whose answer was lost.
    type: int
    default: 300
  wait_timeout: {description: Seconds until the instances are active or gone., type: int, default: 1800}
  patience: {description: "Seconds for which 429, 5xx and failed connections are waited out.", type: int, default: 120}
  poll: {description: Seconds between two looks., type: int, default: 10}
attributes:
  check_mode:
    description: Says what would be launched or terminated, and what it costs.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Have two nodes
  glm.fleet.lambda_instance:
    names: [b200-1, b200-2]
    type: gpu_8x_b200_sxm6
    regions: [us-east-1]
    keys_directory: keys
    max_cents_per_hour: 10704
"""

RETURN = r"""
launch: {description: Names that are or would be launched., type: list, elements: str, returned: present}
found: {description: Names that were there., type: list, elements: str, returned: present}
cents_per_hour: {description: What the launched ones cost an hour in US cents., type: int, returned: present}
terminate: {description: Names that are or would be terminated., type: list, elements: str, returned: absent}
instances:
  description:
    - Each with C(id), C(name), C(ip), C(private_ip), C(status), C(region), C(type), C(tags), and C(host_key), which
      says whether its host key is known. No secret of the API is among them.
  type: list
  elements: dict
  returned: always
"""
