"""Gateways and nodes as clients see them, and clients that use them all through a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machines import Machine
from testbed import ROOT, SHARED, Play, Run

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Fleet:
    """The machines, from behind, and what was counted over all tests."""

    playbook: Play
    nodes: tuple[str, ...]
    gateways: dict[str, str]  # and where clients reach each
    settings: dict[str, Any] = field(default_factory=dict)  # of every run
    patience: int = 1  # real vLLM takes its time
    clients: tuple[int, int, int] = (24, 9, 100)  # short sessions, streams, and the fewest requests that count
    total: dict[str, int] = field(default_factory=lambda: {"sent": 0, "failed": 0, "streams": 0, "cut": 0, "moves": 0})
    lines: list[str] = field(default_factory=list)

    def play(self, *arguments: str, seconds: int = 300, **settings: Any) -> Run:
        """A playbook over the fleet, with the settings of the engine."""
        return self.playbook(*arguments, seconds=seconds * self.patience, **{**self.settings, **settings})

    def other_inventory(self, directory: Path, old: str, new: str) -> Path:
        """That of the fleet, with another line in its hosts.yml."""
        hosts = (self.playbook.inventory / "hosts.yml").read_text()
        assert old in hosts
        (directory / "hosts.yml").write_text(hosts.replace(old, new))
        for name in ("group_vars", "host_vars", "keys"):
            if (self.playbook.inventory / name).exists():
                (directory / name).symlink_to(self.playbook.inventory / name)
        return directory

    def begin(self, playbook: str = "site.yml", **settings: Any) -> subprocess.Popen[str]:
        """A run in a session of its own, whose output can be read as it comes: each task as it begins."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "true",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.playbook.scratch / "cp"),
        }
        extra = json.dumps({**self.settings, **settings})
        return subprocess.Popen(
            [f"{ROOT}/.venv/bin/ansible-playbook", playbook, "-i", str(self.playbook.inventory), "-e", extra],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def kill_at(self, task: str, playbook: str = "site.yml", **settings: Any) -> None:
        """SIGKILL to the controller once the task has begun."""
        process = self.begin(playbook, **settings)
        assert process.stdout
        seen = any(task in line for line in process.stdout)
        assert seen, f"the run ended before {task}"
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def machine(self, host: str) -> Machine:
        return Machine(f"glm-{host}")

    def run(self, host: str, command: str, check: bool = True) -> str:
        return self.machine(host).run(command, check=check)

    def state(self, node: str) -> dict[str, Any]:
        return self.machine(node).state()

    def release(self, node: str) -> str:
        return self.machine(node).release()

    def releases(self) -> list[str]:
        return [self.release(node) for node in self.nodes]

    def engine(self, node: str) -> str:
        return self.machine(node).engine()

    def haproxy(self, gateway: str, command: str) -> str:
        """What the gateway's HAProxy answers on its admin socket."""
        program = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
            f"s.sendall(b'{command}\\n'); print(s.makefile().read())"
        )
        return self.run(gateway, f'python3 -c "{program}"')

    def rotation(self, gateway: str) -> dict[str, str]:
        """Of each node whether the gateway offers it, and whether it calls it up."""
        rows = [line.split() for line in self.haproxy(gateway, "show servers state engines").splitlines()]
        return {
            row[3]: f"{'out' if int(row[6]) & 0x3F else 'in'} {'up' if row[5] == '2' else 'down'}"
            for row in rows
            if len(row) > 6 and row[1] == "engines"
        }

    def all_in(self) -> bool:
        return all(self.rotation(gateway) == dict.fromkeys(self.nodes, "in up") for gateway in self.gateways)

    def key(self) -> str:
        """The first one of the file."""
        return self.key_lines()[0][0]

    def key_lines(self) -> list[list[str]]:
        """The words of each line that has a key."""
        lines = (self.playbook.inventory / "keys/api-keys.txt").read_text().splitlines()
        return [line.split() for line in lines if line.strip() and not line.startswith("#")]

    def say(self, line: str) -> None:
        self.lines.append(line)

    def ask(self, address: str, prompt: str, timeout: float, key: str = "", **more: Any) -> int:
        """Status of the answer at an address; 0 where none came whole. `more` goes into the request's body."""
        body = {"model": "glm-5.2-fp8", "messages": [{"role": "user", "content": prompt}], **more}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key or self.key()}", "Content-Type": "application/json"},
        )
        try:
            with OPENER.open(request, timeout=timeout) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            return refused.code
        except OSError:
            return 0

    def accepts(self, gateway: str) -> bool:
        """Whether the gateway has answered a request."""
        try:
            return self.ask(self.gateways[gateway], "hello", 60, max_tokens=8) == 200
        except OSError:  # no key yet
            return False

    @contextmanager
    def load(
        self, name: str, check: bool = True, clients: tuple[int, int, int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Clients all through the block. What they saw is there afterwards; with `check`, none may have failed."""
        short, streams, enough = clients or self.clients
        process = subprocess.Popen(
            [sys.executable, SHARED / "load.py", str(short), str(streams), *self.gateways.values()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        process.stdin.write(self.key() + "\n")
        process.stdin.flush()
        time.sleep(3)
        seen: dict[str, Any] = {}
        try:
            yield seen
            time.sleep(3)
        finally:
            process.terminate()
            output, errors = process.communicate(timeout=400)
            assert not errors
            result = json.loads(output)
            for count in ("sent", "streams", "moves"):
                self.total[count] += result[count]
            for kind in ("failed", "cut"):
                self.total[kind] += len(result[kind])
            seen.update(result)
            nodes = dict(sum(map(Counter, result["visits"].values()), Counter()))
            self.say(f"{name}: {result['sent']} requests, {result['moves']} changes of a node, {nodes}")
        if check:
            assert (result["failed"], result["cut"]) == ([], [])
            assert result["done"] == result["sent"] > enough


@contextmanager
def provided(fleet: Fleet, keep: str, images: list[str]) -> Iterator[Fleet]:
    """Bare machines. What an aborted run left behind goes first; `keep` names the variable that leaves all as it is."""

    def shared(name: str, seconds: int) -> None:
        done = fleet.playbook(playbook=str(SHARED / name), seconds=seconds, testbed_registry_images=images)
        assert done.code == 0, done.output[-3000:] + done.errors

    kept = os.environ.get(keep)
    if not kept:
        shared("destroy.yml", 120)
    shared("create.yml", 3600)  # with the images to be built
    yield fleet
    if not kept:
        shared("destroy.yml", 120)
