"""Reads of Docker's API, over its socket: the command would be a process for each."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

SOCKET = "/var/run/docker.sock"
TIMEOUT = 20  # seconds


class _Connection(http.client.HTTPConnection):
    def __init__(self) -> None:
        super().__init__("localhost", timeout=TIMEOUT)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SOCKET)


def docker_runs() -> bool:
    """Looks for the process first: connecting to the socket would start a socket-activated Docker."""
    return os.path.exists(SOCKET) and any(map(_is_dockerd, Path("/proc").glob("[0-9]*/comm")))


def _is_dockerd(comm: Path) -> bool:
    try:
        return comm.read_text(encoding="utf-8", errors="replace").strip() == "dockerd"
    except OSError:  # gone meanwhile
        return False


def docker_get(path: str) -> Any:
    """The decoded answer of the Docker API, or None."""
    connection = _Connection()
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        return json.loads(body) if answer.status == 200 else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
