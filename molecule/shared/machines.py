"""The containers of a testbed from behind: what a test breaks, and sees, without the project's playbooks."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from testbed import SNAPSHOT, docker

STATE = "/var/lib/glm/state.json"


@dataclass
class Machine:
    """A node or a gateway."""

    container: str

    def run(self, command: str, check: bool = True, stdin: str | None = None) -> str:
        return docker("exec", "-i", self.container, "/bin/sh", "-c", command, check=check, stdin=stdin)

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

    def cut_off(self) -> None:
        """Nobody comes in by SSH any more, not even over a connection that is open; what runs there goes on."""
        self.run("systemctl kill --signal=KILL ssh.service; systemctl stop ssh.socket ssh.service", check=False)

    def let_in(self) -> None:
        self.run("systemctl start ssh.service")

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        self.cut_off()
        try:
            yield
        finally:
            self.let_in()

    @contextlib.contextmanager
    def small_disk(self, path: str, size: str, *options: str) -> Iterator[None]:
        self.run(f"mkdir -p {path} && mount -t tmpfs -o {','.join([f'size={size}', *options])} tmpfs {path}")
        try:
            yield
        finally:
            self.run(f"umount {path} && rmdir --ignore-fail-on-non-empty {path}")

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


@dataclass
class Mirror:
    """Registry, packages and hub."""

    container: str

    @contextlib.contextmanager
    def hub(self, **faults: Any) -> Iterator[None]:
        """A hub with faults."""
        write = "mkdir -p /etc/hub && cat > /etc/hub/faults.json"
        docker("exec", "-i", self.container, "sh", "-c", write, stdin=json.dumps(faults))
        try:
            yield
        finally:
            docker("exec", self.container, "rm", "-f", "/etc/hub/faults.json")

    def downloads(self) -> Counter[str]:
        """How often the hub's client asked for each file."""
        asked: Counter[str] = Counter()
        for name, _address, times in json.loads(
            docker("exec", self.container, "curl", "-sf", "127.0.0.1:8081/downloads")
        ):
            asked[name] += times
        return asked

    def blobs(self) -> Counter[str]:
        """How often the registry gave each blob, by its digest."""
        log = docker("exec", self.container, "journalctl", "--unit=docker-registry", "--output=cat")
        return Counter(re.findall(r'"GET /v2/\S+/blobs/(\S+) HTTP/1\.1" 20[06]', log))

    @contextlib.contextmanager
    def no_registry(self) -> Iterator[None]:
        docker("exec", self.container, "systemctl", "stop", "docker-registry")
        try:
            yield
        finally:
            docker("exec", self.container, "systemctl", "start", "docker-registry")
