"""HAProxy's runtime interface: which servers of a backend take requests, and how many each holds."""

from __future__ import annotations

import csv
import socket
from typing import Any

SOCKET = "/run/haproxy/admin.sock"
BACKEND = "engines"
RUNNING = 2  # srv_op_state
MAINTENANCE, DRAINED = 0x01 | 0x02 | 0x04 | 0x20, 0x08 | 0x10  # srv_admin_state


class Unavailable(Exception):
    """HAProxy does not answer; its text says why."""


class HAProxy:
    """One HAProxy, by its socket."""

    def __init__(self, path: str = SOCKET, backend: str = BACKEND, timeout: float = 10) -> None:
        self.path, self.backend, self.timeout = path, backend, timeout

    def ask(self, command: str) -> str:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self.timeout)
                connection.connect(self.path)
                connection.sendall(command.encode() + b"\n")
                parts = []
                while part := connection.recv(65536):
                    parts.append(part)
        except OSError as problem:
            raise Unavailable(f"HAProxy does not answer at {self.path}: {problem.strerror or problem}") from None
        return b"".join(parts).decode(errors="replace")

    def servers(self) -> dict[str, dict[str, Any]]:
        """By name: rotation (in, out), up, sessions (requests that it holds or that wait for it), port, tls."""
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
        """Offers a server to new requests, or to none; those that it holds go on."""
        answer = self.ask(
            f"set server {self.backend}/{server} state {'ready' if rotation == 'in' else 'drain'}"
        ).strip()
        if answer:
            raise Unavailable(f"HAProxy refuses to take {server} {rotation}: {answer}")
