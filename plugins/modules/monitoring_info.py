#!/usr/bin/python
"""Read what a monitoring host has already, before anything is changed on it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: monitoring_info
short_description: Read what a monitoring host has already, in one round trip
description:
  - Whose configuration of Prometheus and Alertmanager is there, the site's own rules, the room for samples, and whether
    the receiver of alerts answers.
  - Reads only; runs the same in check mode.
options:
  configs:
    description: Configuration files. One that neither is as its package brought it nor holds I(mark) is the site's own.
    type: list
    elements: path
    required: true
  mark: {description: What a file of ours holds., type: str, required: true}
  rules: {description: Directory of the site's own rules., type: path, required: true}
  own: {description: Directory of our rules., type: path, required: true}
  directory: {description: Where Prometheus keeps its samples., type: path, required: true}
  webhook_url: {description: The receiver of alerts; empty for none., type: str, default: ""}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read what the host has
  glm.fleet.monitoring_info:
    configs: [/etc/prometheus/prometheus.yml]
    mark: written by the role monitoring
    rules: /etc/prometheus/rules
    own: /etc/prometheus/glm/rules
    directory: /var/lib/prometheus
  register: seen
"""

RETURN = r"""
foreign: {description: Those of I(configs) that are the site's own., returned: always, type: list, elements: str}
rule_files: {description: Path and content of each file of rules., returned: always, type: list, elements: dict}
own: {description: The paths of our rules that are there., returned: always, type: list, elements: str}
directory: {description: The directory that was looked at., returned: always, type: str}
free: {description: Bytes that are free there., returned: always, type: int}
used: {description: Bytes that Prometheus has there., returned: always, type: int}
receiver: {description: Why the receiver gives no answer; empty if it does., returned: always, type: str}
installed: {description: Whether both programs are there., returned: always, type: bool}
"""

import hashlib
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.store import free_bytes

PACKAGES = ("prometheus", "prometheus-alertmanager")


def packaged() -> dict[str, str]:
    """The MD5 of each configuration file as its package brought it."""
    command = ["dpkg-query", "--show", "--showformat=${Conffiles}\n", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    words = (line.split() for line in done.stdout.splitlines())
    return {found[0]: found[1] for found in words if len(found) >= 2}


def foreign(paths: list[str], mark: str) -> list[str]:
    known = packaged()
    found = []
    for path in map(Path, paths):
        data = path.read_bytes() if path.is_file() else b""
        if data and mark.encode() not in data and hashlib.md5(data).hexdigest() != known.get(str(path)):  # noqa: S324  (dpkg's own)
            found.append(str(path))
    return found


def size_of(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def silence(url: str) -> str:
    """Why nobody answers there. Any status is an answer: only Alertmanager sends what the receiver wants."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(url, timeout=10).close()  # an http address: judged before
    except urllib.error.HTTPError:
        return ""
    except (urllib.error.URLError, OSError, ValueError) as problem:
        return str(getattr(problem, "reason", problem))
    return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "configs": {"type": "list", "elements": "path", "required": True},
            "mark": {"type": "str", "required": True},
            "rules": {"type": "path", "required": True},
            "own": {"type": "path", "required": True},
            "directory": {"type": "path", "required": True},
            "webhook_url": {"type": "str", "default": "", "no_log": True},
        },
        supports_check_mode=True,
    )
    asked = module.params
    directory = Path(asked["directory"])
    rules = sorted(Path(asked["rules"]).glob("*.y*ml"))
    module.exit_json(
        changed=False,
        foreign=foreign(asked["configs"], asked["mark"]),
        rule_files=[{"path": str(path), "content": path.read_text(errors="replace")} for path in rules],
        own=sorted(map(str, Path(asked["own"]).glob("*"))),
        directory=str(directory),
        free=free_bytes(directory),
        used=size_of(directory) if directory.is_dir() else 0,
        receiver=silence(asked["webhook_url"]) if asked["webhook_url"] else "",
        installed=all(os.access(f"/usr/bin/{name}", os.X_OK) for name in PACKAGES),
    )


if __name__ == "__main__":
    main()
