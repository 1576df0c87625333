"""The tests' way to the playbooks and to the containers: run one, and see what it said and what it changed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

SHARED = Path(__file__).resolve().parent
ROOT = SHARED.parents[1]
# What a play may have changed on a node: files by content, links, packages, units, containers. Not what the node writes
# by itself, the counts of each key's tokens every minute.
SNAPSHOT = r"""
set -u
for directory in /etc /opt /usr/local /root /srv /var/lib/glm; do
  [ -d "$directory" ] || { echo "$directory: absent"; continue; }
  find "$directory" -xdev -path /var/lib/glm/cache -prune -o -path /var/lib/glm/accounts -prune -o \
    -printf '%p %y %m %u %l\n' -type f -size -2M \
    -exec sha256sum {} + | sort
done
dpkg-query -W -f '${Package} ${Version} ${Status}\n'
command -v docker || echo 'docker: absent'
systemctl list-unit-files --no-legend --no-pager --type=service,timer,socket,path
systemctl list-units --no-legend --no-pager --plain --type=service --state=active,failed --output=json |
  grep -o '"unit":"[^"]*","load":"[a-z]*","active":"[a-z]*"' |
  grep -vE '"unit":"(user|user-runtime-dir)@|systemd-(tmpfiles|hostnamed|timedated)|apt-|fstrim|e2scrub'
[ -S /run/docker.sock ] && docker ps --all --no-trunc --format '{{.ID}} {{.Names}} {{.Image}}'
true
"""


def docker(*arguments: str, stdin: str | None = None, check: bool = True, seconds: int = 120) -> str:
    """Output of the local engine's client."""
    socket = os.environ.get("DOCKER_HOST", "") or os.access("/var/run/docker.sock", os.W_OK)
    command = ["docker", *arguments] if socket else ["sudo", "-n", "docker", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


def crowd() -> float:
    """How many share a core now: a second is worth that much less to each. At most 6, so that what hangs is ended."""
    return min(6, max(1, os.getloadavg()[0] / (os.cpu_count() or 1)))


@dataclass
class Run:
    """A playbook run that has ended."""

    code: int
    output: str
    errors: str
    trips: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[str]:
        """What each failed task says, in order."""
        blocks = re.findall(r"^fatal: .*=> *\n((?:(?: .*)?\n)+)", self.output, re.M)
        return [str(yaml.safe_load(block)["msg"]) for block in blocks]

    def lines(self, start: str) -> list[str]:
        """The lines of the messages that begin with `start`."""
        return [line for message in self.messages for line in message.splitlines() if line.startswith(start)]

    def line(self, start: str) -> str:
        """The one line that begins with `start`."""
        found = self.lines(start)
        assert len(found) == 1, f"{len(found)} lines begin with {start!r}: {self.messages}\n{self.errors}"
        return found[0]

    def findings(self) -> list[str]:
        """The ids of what nodes were refused for."""
        refused = [message.splitlines()[1:] for message in self.messages if " cannot serve, and nothing was" in message]
        return [line.partition(":")[0] for lines in refused for line in lines]

    def recap(self, name: str) -> int:
        return sum(int(count) for count in re.findall(rf"\b{name}=(\d+)", self.output.partition("PLAY RECAP")[2]))


@dataclass
class Play:
    """Runs a playbook over an inventory, within so many seconds of a machine that nobody else uses."""

    scratch: Path
    inventory: Path

    def __call__(
        self,
        *arguments: str,
        inventory: Path | None = None,
        playbook: str = "site.yml",
        seconds: int = 300,
        **settings: Any,
    ) -> Run:
        trips = self.scratch / "round_trips.json"
        trips.unlink(missing_ok=True)
        environment = {
            # Molecule's own are for its playbooks: here ansible.cfg counts.
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_NOCOLOR": "1",
            # Connections of their own: none of an earlier testbed at the same address.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.scratch / "cp"),
            "ANSIBLE_CALLBACKS_ENABLED": "glm.fleet.freeze_heap,glm.fleet.round_trips",
            "ROUND_TRIPS_JSON": str(trips),
        }
        command = ["ansible-playbook", playbook, "-i", str(inventory or self.inventory), *arguments]
        if settings:
            command += ["-e", json.dumps(settings)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        left = float(seconds)
        while True:
            began = time.monotonic()
            try:
                output, errors = process.communicate(timeout=5)
                break
            except subprocess.TimeoutExpired:
                left -= (time.monotonic() - began) / crowd()
            if left <= 0:
                os.killpg(process.pid, signal.SIGKILL)
                output, errors = process.communicate()
                pytest.fail(f"{' '.join(command)} took more than {seconds} s:\n{output[-3000:]}\n{errors[-1000:]}")
        print(output, errors)  # pytest shows it where a test fails
        figures = json.loads(trips.read_text()) if trips.exists() else {}
        return Run(process.returncode, output, errors, figures)


def differences(before: list[str], after: list[str]) -> list[str]:
    """What is new (+) or gone (-) between two snapshots."""
    return sorted(
        [f"+ {line}" for line in set(after) - set(before)] + [f"- {line}" for line in set(before) - set(after)]
    )
