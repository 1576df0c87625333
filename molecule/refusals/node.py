"""The node and the mirror that the tests break."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from testbed import ROOT, SNAPSHOT, docker

INVENTORY = ROOT / "molecule/refusals/inventory"
NODE, MIRROR = "glm-refusal-1", "glm-refusals-mirror"
EDGE = "http://198.18.66.10:8000"
STATE = "/var/lib/glm/state.json"


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
