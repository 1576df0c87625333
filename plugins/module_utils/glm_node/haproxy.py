"""HAProxy's runtime interface: which servers of a backend take requests, and how many each holds."""

from __future__ import annotations

import csv
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SOCKET = "/run/haproxy/admin.sock"
MASTER = "/run/haproxy-master.sock"  # of the distributions' units
LOCK = "/run/haproxy/glm.lock"  # of whoever reloads HAProxy or changes its maps
BACKEND = "engines"
RUNNING = 2  # srv_op_state
MAINTENANCE, DRAINED = 0x01 | 0x02 | 0x04 | 0x20, 0x08 | 0x10  # srv_admin_state


class Unavailable(Exception):
    """HAProxy does not answer; its text says why."""


class HAProxy:
    """One HAProxy, by its socket."""

    def __init__(self, path: str = SOCKET, backend: str = BACKEND, timeout: float = 10, worker: str = "") -> None:
        """worker: the process id of the worker that is meant, where the socket is the master's"""
        self.path, self.backend, self.timeout = path, backend, timeout
        self.prefix = f"@!{worker} " if worker else ""

    def ask(self, *commands: str) -> str:
        command = "; ".join(self.prefix + command for command in commands)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self.timeout)
                connection.connect(self.path)
                connection.sendall(command.encode() + b"\n")
                connection.shutdown(socket.SHUT_WR)  # the master would wait for another one
                parts = []
                while part := connection.recv(65536):
                    parts.append(part)
        except OSError as problem:
            raise Unavailable(f"HAProxy does not answer at {self.path}: {problem.strerror or problem}") from problem
        return b"".join(parts).decode(errors="replace")

    def info(self) -> dict[str, str]:
        """What the process says of itself, such as Pid and DroppedLogs."""
        return dict(line.split(": ", 1) for line in self.ask("show info").splitlines() if ": " in line)

    def servers(self) -> dict[str, dict[str, Any]]:
        """By name: rotation (in, out), up (by its checks; one that is out has none), sessions, port, tls.

        sessions: requests that it holds or that wait for it.
        """
        held = {
            row["svname"]: int(row["scur"] or 0) + int(row["qcur"] or 0)
            for row in csv.DictReader(self.ask("show stat").lstrip("# ").splitlines())
            if row["pxname"] == self.backend
        }
        _version, header, *lines = [*self.ask(f"show servers state {self.backend}").splitlines(), "", ""]
        servers = {}
        for line in filter(None, lines):
            row = dict(zip(header.lstrip("# ").split(), line.split()))
            administered = int(row["srv_admin_state"])
            servers[row["srv_name"]] = {
                "rotation": "out" if administered & (MAINTENANCE | DRAINED) else "in",
                "up": int(row["srv_op_state"]) == RUNNING,
                "sessions": held.get(row["srv_name"], 0),
                "port": int(row["srv_port"]),
                "tls": row["srv_use_ssl"] == "1",
            }
        return servers

    def rotate(self, server: str, rotation: str) -> None:
        """Offers a server to new requests, or to none; those that it holds go on.

        Out is maintenance: a server that HAProxy drains would still get the sessions that stick to it. It is not
        checked meanwhile, so one that comes back is down until a check says otherwise.
        """
        name = f"{self.backend}/{server}"
        if rotation == "in":
            answer = self.ask(f"set server {name} state ready", f"set server {name} health down").strip()
        else:
            answer = self.ask(f"set server {name} state maint").strip()
        if answer:
            raise Unavailable(f"HAProxy refuses to take {server} {rotation}: {answer}")

    def map(self, path: str) -> list[tuple[str, str]] | None:
        """The entries of a map, in order; None where there is no such map."""
        answer = self.ask(f"show map {path}")
        lines = [line.split(" ", 2) for line in answer.splitlines() if line]
        if any(not words[0].startswith("0x") for words in lines):
            # A configuration without it; a worker that has served its last connection by now.
            if "Unknown map" in answer or "Can't find the target PID" in answer:
                return None
            raise Unavailable(f"HAProxy does not show its map {path}: {answer.strip()}")
        return [(words[1], words[2]) for words in lines]

    def replace_map(self, path: str, entries: list[tuple[str, str]]) -> None:
        """All entries at once: no request sees some of the old and some of the new ones."""
        said = self.ask(f"prepare map {path}").strip()
        version = said.rpartition(" ")[2]
        if not version.isdigit():
            raise Unavailable(f"HAProxy does not change its map {path}: {said} (it takes HAProxy 2.4 or newer)")
        commands = [f"add map @{version} {path} {key} {value}" for key, value in entries]
        try:
            for first in range(0, len(commands), CHUNK):
                self._silent(*commands[first : first + CHUNK])
            self._silent(f"commit map @{version} {path}")
        except Unavailable:
            self.ask(f"clear map @{version} {path}")
            raise

    def _silent(self, *commands: str) -> None:
        said = self.ask(*commands).strip()
        if said:
            raise Unavailable(f"HAProxy does not change its map: {said.splitlines()[0]}")


CHUNK = 20  # entries in a line: HAProxy takes one of 16 kB


def workers(path: str = SOCKET, master: str = MASTER) -> list[HAProxy]:
    """Whoever may still be asked: the worker that takes connections, and those that serve their last ones."""
    found = [HAProxy(path)]
    if os.path.exists(master):
        listed = patiently(HAProxy(master), "show proc").partition("# old workers")[2].partition("# programs")[0]
        found += [
            HAProxy(master, worker=fields[0])
            for line in listed.splitlines()
            if (fields := line.split())[1:2] == ["worker"]
        ]
    return found


def patiently(master: HAProxy, command: str, seconds: float = 5) -> str:
    """The answer of a master that may just be reloading: its socket refuses for a moment, while the workers serve."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return master.ask(command)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@contextmanager
def locked(path: str = LOCK) -> Iterator[None]:
    """While maps change no worker begins, which would read them from files; and the other way round."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
