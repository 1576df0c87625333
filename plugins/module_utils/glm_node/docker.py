"""Docker's API, over its socket: the command would be a process for each read."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_text

SOCKET = "/var/run/docker.sock"
TIMEOUT = 20  # seconds
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
CONTAINERD_CONFIG = "/etc/containerd/config.toml"
CONTAINERD_ROOT = "/var/lib/containerd"


class Connection(http.client.HTTPConnection):
    """HTTP on Docker's socket."""

    def __init__(self, path: str, timeout: float | None = TIMEOUT) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def docker_runs() -> bool:
    """Looks for the process first: connecting to the socket would start a socket-activated Docker."""
    return os.path.exists(SOCKET) and any(map(_is_dockerd, Path("/proc").glob("[0-9]*/comm")))


def _is_dockerd(comm: Path) -> bool:
    try:
        return comm.read_text(encoding="utf-8", errors="replace").strip() == "dockerd"
    except OSError:  # gone meanwhile
        return False


def docker_get(path: str, at: str = "") -> Any:
    """The decoded answer of the Docker API at a socket, or None."""
    connection = Connection(at or SOCKET)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        return json.loads(body) if answer.status == 200 else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def has_containerd_store(info: Mapping[str, Any]) -> bool:
    """Whether images are containerd's, as on a new Docker 29; `info` is the API's /info."""
    return ["driver-type", "io.containerd.snapshotter.v1"] in (info.get("DriverStatus") or [])


def image_root(info: Mapping[str, Any]) -> str:
    """The directory that images fill."""
    root = str(info.get("DockerRootDir") or "/var/lib/docker")
    if not has_containerd_store(info):
        return root
    if not os.path.exists(CONTAINERD_SOCKET):
        return f"{root}/containerd"  # of the containerd that Docker starts where the system has none
    # Only what stands before the first table is containerd's own.
    settings = re.split(r"^\s*\[", read_text(CONTAINERD_CONFIG), maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(r"""^\s*root\s*=\s*["']([^"']+)["']""", settings, re.MULTILINE)
    return found.group(1) if found else CONTAINERD_ROOT
