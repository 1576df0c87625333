"""A hub with one small model on localhost, and a `docker` whose image is this Python: for the tests of the weights."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = "zai-org/GLM-5.2-FP8"
REVISION = "1" * 40
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
TOKEN = "hf_canary"


def model() -> dict[str, bytes]:
    files = {shard: bytes([n]) * 200_000 for n, shard in enumerate(SHARDS)}
    index = {"weight_map": {f"layer.{n}": shard for n, shard in enumerate(SHARDS)}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["config.json"] = b'{"architectures": ["GlmMoeDsaForCausalLM"], "max_position_embeddings": 1048576}'
    files["README.md"] = b"# GLM\n"
    return files


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class SmallHub(ThreadingHTTPServer):
    """The calls of a hub that the module and huggingface_hub make; `faults` and `served` make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.revisions = {REVISION: model()}
        self.refs = {"main": REVISION}
        self.need_token = False
        self.page_size = 1000
        # What is sent instead of the listed content.
        self.served: dict[str, bytes] = {}
        # Part of a path -> status, headers, and how often.
        self.faults: dict[str, tuple[int, dict[str, str], int]] = {}
        # Seconds between the first bytes of a file and the others.
        self.pause = 0.0
        # What the head of a file gives as its size, where that is not true.
        self.sizes: dict[str, int] = {}
        # Whether the shards are in a Xet store, which takes connections and never answers.
        self.xet = False
        self.downloads: Counter[str] = Counter()
        self.authorizations: list[str] = []

    def entries(self, revision: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = [{"type": "directory", "path": "figures", "oid": "0" * 40, "size": 0}]
        for path, content in self.revisions[revision].items():
            item: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if path.endswith(".safetensors"):
                item["oid"] = git_sha1(b"pointer")
                digest = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            items.append(item)
        return items


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallHub

    def log_message(self, *_args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.pause and "/resolve/" in self.path and len(body) > 1000:
            self.wfile.write(body[:100])
            time.sleep(self.server.pause)
            body = body[100:]
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:  # noqa: PLR0911 one return an address
        hub = self.server
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if authorization := self.headers.get("Authorization"):
            hub.authorizations.append(authorization)
        for part, (status, headers, left) in hub.faults.items():
            if part in path and left:
                hub.faults[part] = (status, headers, left - 1)
                return self.answer(status, b"{}", headers)
        if hub.need_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"{}")
        if path == "/xet/token":
            access = {"Cas-Url": f"{hub.endpoint}/xet/store", "Access-Token": "x", "Token-Expiration": "9999999999"}
            return self.answer(200, b"{}", {f"X-Xet-{name}": value for name, value in access.items()})
        if path.startswith("/xet/store"):
            time.sleep(30)
            return self.answer(503)
        if path == f"/api/models/{REPO}":
            return self.answer(200, b"{}")
        if path.startswith(f"/api/models/{REPO}/revision/"):
            ref = path.rsplit("/", 1)[1]
            commit = hub.refs.get(ref, ref)
            if commit not in hub.revisions:
                return self.answer(404, b"{}")
            return self.answer(200, json.dumps({"sha": commit}).encode())
        if path.startswith(f"/api/models/{REPO}/tree/"):
            entries = hub.entries(path.rsplit("/", 1)[1])
            start = int(query.get("cursor", 0))
            end = start + hub.page_size
            more = {"Link": f'<{hub.endpoint}{path}?cursor={end}>; rel="next"'} if end < len(entries) else {}
            return self.answer(200, json.dumps(entries[start:end]).encode(), more)
        if path.startswith(f"/{REPO}/resolve/"):
            return self.resolve(*path.removeprefix(f"/{REPO}/resolve/").split("/", 1))
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def resolve(self, revision: str, path: str) -> None:
        files = self.server.revisions.get(revision, {})
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.server.served.get(path, files[path])
        etag = hashlib.sha256(files[path]).hexdigest() if path.endswith(".safetensors") else git_sha1(files[path])
        if self.command == "GET" and self.headers["User-Agent"] != "glm-fleet":  # that asks for the manifest
            self.server.downloads[path] += 1
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision}
        if self.server.xet and path.endswith(".safetensors"):
            headers.update({"X-Xet-Hash": etag, "X-Xet-Refresh-Route": f"{self.server.endpoint}/xet/token"})
        if path in self.server.sizes:
            headers["X-Linked-Size"] = str(self.server.sizes[path])
        return self.answer(200, content, headers)


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    with SmallHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# `docker run --entrypoint python3 IMAGE PROGRAM ...`, with this Python and its huggingface_hub, and `docker rm`.
DOCKER = (
    rf"""#!{sys.executable}
"""
    + r"""
import json, os, pathlib, sys

args = sys.argv[1:]
with open(os.environ["DOCKER_LOG"], "a") as log:
    log.write(json.dumps(args) + "\n")
pid = pathlib.Path(os.environ["DOCKER_LOG"] + ".pid")
if args[0] == "rm":
    command = pathlib.Path("/proc", pid.read_text(), "cmdline") if pid.exists() else pid
    if command.exists() and "hub-download" in command.read_text():
        os.kill(int(pid.read_text()), 9)
    sys.exit(0)
if os.environ.get("DOCKER_SAYS"):
    code, _, lines = os.environ["DOCKER_SAYS"].partition(" ")
    print(lines, file=sys.stderr)
    sys.exit(int(code))
pid.write_text(str(os.getpid()))
environment, mounted = {}, {}
while args[0] != "--entrypoint":
    option = args.pop(0)
    if option == "--env":
        name, _, environment[name] = args[0].partition("=")
    if option == "--volume":
        source, target = args[0].split(":")[:2]
        mounted[target] = source
environment = {name: mounted.get(value, value) for name, value in environment.items()}
argv = [sys.executable, *(mounted.get(word, word) for word in args[3:])]
os.execve(sys.executable, argv, {**os.environ, **environment, "HF_HOME": os.environ["DOCKER_LOG"] + ".hf"})
"""
)
