"""The reads of Docker's API, against a socket of our own."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import docker

ANSWERS = {"/info": (200, b'{"ServerVersion": "28.0"}'), "/broken": (200, b"{"), "/absent": (404, b'{"message": "no"}')}


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = str(tmp_path / "docker.sock")
    monkeypatch.setattr(docker, "SOCKET", path)
    with socketserver.ThreadingUnixStreamServer(path, Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "wanted"), [("/info", {"ServerVersion": "28.0"}), ("/broken", None), ("/absent", None)]
)
def test_only_a_whole_answer_counts(engine: None, path: str, wanted: Any) -> None:
    assert docker.docker_get(path) == wanted


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "SOCKET", str(tmp_path / "docker.sock"))
    assert docker.docker_get("/info") is None
    assert docker.docker_runs() is False


CONTAINERD = {"DockerRootDir": "/data/docker", "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}


@pytest.fixture
def containerd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's containerd: its socket and its configuration."""
    for name in ("SOCKET", "CONFIG"):
        monkeypatch.setattr(docker, f"CONTAINERD_{name}", str(tmp_path / name))
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("status", [None, [["Backing Filesystem", "extfs"]]])
def test_images_are_in_dockers_directory(containerd: Path, status: Any) -> None:
    assert docker.image_root({"DockerRootDir": "/data/docker", "DriverStatus": status}) == "/data/docker"
    assert docker.image_root({}) == "/var/lib/docker"


@pytest.mark.parametrize(
    ("config", "root"),
    [
        ("", "/var/lib/containerd"),
        ("version = 3\n# root = '/no'\nroot = '/data/containerd'\n", "/data/containerd"),
        ('[plugins]\n  root = "/of/a/plugin"\n', "/var/lib/containerd"),
    ],
)
def test_images_are_in_containerds_directory(containerd: Path, config: str, root: str) -> None:
    (containerd / "CONFIG").write_text(config)
    assert docker.image_root(CONTAINERD) == root


def test_docker_may_have_a_containerd_of_its_own(containerd: Path) -> None:
    (containerd / "SOCKET").unlink()
    assert docker.image_root(CONTAINERD) == "/data/docker/containerd"
