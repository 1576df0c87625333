#!/usr/bin/env python3
"""The light nodes of `make bench-fleet`: GLM_BENCH_NODES of them (default 1)."""

from __future__ import annotations

import json
import os

COUNT = int(os.environ.get("GLM_BENCH_NODES", "1"))
NODES = {f"bench-{number:02}": {"ansible_host": f"198.18.67.{9 + number}"} for number in range(1, COUNT + 1)}
SSH = "-o 'UserKnownHostsFile=\"{{ inventory_dir }}/keys/known_hosts\"' -o StrictHostKeyChecking=yes"

print(
    json.dumps(
        {
            "_meta": {"hostvars": NODES},
            "all": {
                "children": ["nodes"],
                "vars": {
                    "ansible_user": "ubuntu",
                    "ansible_ssh_private_key_file": "{{ inventory_dir }}/keys/id_ed25519",
                    "ansible_ssh_common_args": SSH,
                    "ansible_python_interpreter": "/usr/bin/python3",
                },
            },
            "nodes": {"hosts": list(NODES)},
        }
    )
)
