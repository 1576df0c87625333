"""A registry as a client sees it: blobs by digest, ranges, tokens, and a store that it sends its clients on to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


class SmallRegistry(ThreadingHTTPServer):
    """`token` is what it takes now, empty for none."""

    def __init__(self, *blobs: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.blobs = {digest_of(blob): blob for blob in blobs}
        self.token = ""
        self.realm = f"{self.url}/token"
        self.answer: Any = None  # to who asks for a token, in place of a new one
        self.store: SmallRegistry | None = None
        self.failing: list[int] = []  # the next answers on blobs
        self.asked: list[tuple[str, str, str]] = []

    def paths(self) -> list[str]:
        return [path.partition("?")[0] for path, _authorization, _range in self.asked]

    def blobs_asked(self) -> list[str]:
        """The digests, sorted."""
        return sorted(path.rpartition("/")[2] for path in self.paths() if "/blobs/" in path)


class Handler(BaseHTTPRequestHandler):
    server: SmallRegistry

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server = self.server
        given, wanted_range = self.headers.get("Authorization", ""), self.headers.get("Range", "")
        server.asked.append((self.path, given, wanted_range))
        if self.path.startswith("/token"):
            return self.say(200, json.dumps(server.answer or {"token": server.token}).encode())
        if server.token and given != f"Bearer {server.token}":
            challenge = f'Bearer realm="{server.realm}",service="registry.docker.io",scope="repository:x:pull"'
            return self.say(401, b"{}", **{"WWW-Authenticate": challenge})
        if server.failing:
            return self.say(server.failing.pop(0), b"{}")
        if server.store:
            return self.say(307, b"", Location=f"{server.store.url}{self.path}?signed=yes")
        blob = server.blobs.get(self.path.partition("?")[0].rpartition("/")[2])
        if blob is None:
            return self.say(404, b"{}")
        offset = int(wanted_range.removeprefix("bytes=").rstrip("-") or 0)
        return self.say(206 if offset else 200, blob[offset:])

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def small_registry(*blobs: bytes) -> Iterator[SmallRegistry]:
    server = SmallRegistry(*blobs)
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()
