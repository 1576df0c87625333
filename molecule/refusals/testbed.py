"""The tests' way to the playbooks, to the node and to the mirror: break something, and see what changed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "molecule/shared"
INVENTORY = ROOT / "molecule/refusals/inventory"
NODE, MIRROR = "glm-refusal-1", "glm-refusals-mirror"
EDGE = "http://198.18.66.10:8000"
# What a play may have changed on a node: files by content, links, packages, units, containers.
SNAPSHOT = r"""
set -u
for directory in /etc /opt /usr/local /root /srv /var/lib/glm; do
  [ -d "$directory" ] || { echo "$directory: absent"; continue; }
  find "$directory" -xdev -path /var/lib/glm/cache -prune -o -printf '%p %y %m %u %l\n' -type f -size -2M \
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
STATE = "/var/lib/glm/state.json"


def docker(*arguments: str, stdin: str | None = None, check: bool = True, seconds: int = 120) -> str:
    """Output of the local engine's client."""
    socket = os.environ.get("DOCKER_HOST", "") or os.access("/var/run/docker.sock", os.W_OK)
    command = ["docker", *arguments] if socket else ["sudo", "-n", "docker", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


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
    """Runs a playbook with a time limit."""

    scratch: Path

    def __call__(
        self,
        *arguments: str,
        inventory: Path = INVENTORY,
        playbook: str = "site.yml",
        seconds: int = 300,
        **settings: Any,
    ) -> Run:
        trips = self.scratch / "round_trips.json"
        trips.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_NOCOLOR": "1",
            # Connections of their own: none of an earlier testbed at the same address.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.scratch / "cp"),
            "ANSIBLE_CALLBACKS_ENABLED": "round_trips",
            "ROUND_TRIPS_JSON": str(trips),
        }
        command = ["ansible-playbook", playbook, "-i", str(inventory), *arguments]
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
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            pytest.fail(f"{' '.join(command)} took more than {seconds} s:\n{output[-3000:]}\n{errors[-1000:]}")
        print(output, errors)  # pytest shows it where a test fails
        figures = json.loads(trips.read_text()) if trips.exists() else {}
        return Run(process.returncode, output, errors, figures)


@dataclass
class Node:
    """The node and its mirror, from behind."""

    def run(self, command: str, check: bool = True, stdin: str | None = None) -> str:
        return docker("exec", "-i", NODE, "/bin/sh", "-c", command, check=check, stdin=stdin)

    def snapshot(self) -> list[str]:
        return self.run(SNAPSHOT).splitlines()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.run(f"cat {STATE}"))
        return state

    def engine(self) -> str:
        """The id of the container that serves; empty where none does."""
        return self.run("docker ps --quiet --no-trunc --filter name=^/glm-engine$").strip()

    def release(self) -> str:
        return self.run("basename $(readlink /opt/glm/current)").strip()

    @contextlib.contextmanager
    def machine(self, **settings: Any) -> Iterator[None]:
        """GPUs other than those of a good machine."""
        self.run("mkdir -p /etc/nvidia-stand-in && cat > /etc/nvidia-stand-in/machine.json", stdin=json.dumps(settings))
        try:
            yield
        finally:
            self.run("rm -f /etc/nvidia-stand-in/machine.json")

    @contextlib.contextmanager
    def listener(self, port: int) -> Iterator[None]:
        """A program that holds a port."""
        self.run(f"systemd-run --quiet --unit=squatter python3 -m http.server {port}")
        self.run(f"for _ in $(seq 100); do curl -so /dev/null 127.0.0.1:{port} && exit; sleep 0.1; done; exit 1")
        try:
            yield
        finally:
            self.run("systemctl stop squatter")

    @contextlib.contextmanager
    def small_disk(self, path: str, size: str) -> Iterator[None]:
        self.run(f"mkdir -p {path} && mount -t tmpfs -o size={size} tmpfs {path}")
        try:
            yield
        finally:
            self.run(f"umount {path} && rmdir {path}")

    @contextlib.contextmanager
    def other_library(self, version: str) -> Iterator[None]:
        """NVML of another version than the loaded module, as after an unattended upgrade."""
        link = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so"
        before = self.run(f"readlink {link}.1").strip()
        self.run(f"cp $(readlink -f {link}.1) {link}.{version} && ln -sfn {link}.{version} {link}.1")
        try:
            yield
        finally:
            self.run(f"ln -sfn {before} {link}.1 && rm {link}.{version}")

    @contextlib.contextmanager
    def hub(self, **faults: Any) -> Iterator[None]:
        """A hub with faults."""
        write = "mkdir -p /etc/hub && cat > /etc/hub/faults.json"
        docker("exec", "-i", MIRROR, "sh", "-c", write, stdin=json.dumps(faults))
        try:
            yield
        finally:
            docker("exec", MIRROR, "rm", "-f", "/etc/hub/faults.json")

    @contextlib.contextmanager
    def no_registry(self) -> Iterator[None]:
        docker("exec", MIRROR, "systemctl", "stop", "docker-registry")
        try:
            yield
        finally:
            docker("exec", MIRROR, "systemctl", "start", "docker-registry")

    def ask(self, path: str = "/v1/models", key: str | None = None, question: str = "") -> tuple[int, Any]:
        """Status and JSON of the edge's answer; `key` is the right one where it is None."""
        if key is None:
            key = (INVENTORY / "keys/api-keys.txt").read_text().splitlines()[-1].strip()
        body = {"model": "glm-5.2-fp8", "max_tokens": 64, "messages": [{"role": "user", "content": question}]}
        request = urllib.request.Request(
            EDGE + path,
            data=json.dumps(body).encode() if question else None,
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.loads(refused.read() or b"null")


def differences(before: list[str], after: list[str]) -> list[str]:
    """What is new (+) or gone (-) between two snapshots."""
    return sorted(
        [f"+ {line}" for line in set(after) - set(before)] + [f"- {line}" for line in set(before) - set(after)]
    )
