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
