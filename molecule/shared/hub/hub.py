#!/usr/bin/env python3
"""A hub for the tests: the part of the Hugging Face API that `hf download` uses, over a folder, with faults on demand.

The folder holds one checkpoint; REVISIONS names the commits under which it is served. Faults are read at each
request from faults.json, so a test switches them by writing one file:

    {"api": 401, "file": 429, "truncate": "model-00002*", "flip": "model-00002*", "bytes_per_second": 100000}

api/file   HTTP status for the listing, or for the files (429 and 503 carry Retry-After)
truncate   files of this pattern end after half of their bytes, and say that they are that long
flip       files of this pattern have one byte flipped, at the same size
xet        files of this pattern are in a Xet store too, which takes connections and never answers

/downloads tells how often the real client asked for each file, and from which address.
README.md beside this file says what was compared with the real client.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

REPO = "zai-org/GLM-5.2-FP8"
# Made-up commits: the first is the checkpoint, the second the same weights with another README.
REVISIONS = {"1" * 40: b"", "2" * 40: b"\nSecond revision.\n"}
BRANCHES = {"main": "1" * 40}
LARGE = ("*.safetensors", "tokenizer.json")  # what the hub keeps in LFS, listed with its sha256
CHUNK = 1 << 16


@dataclass
class File:
    """One file of a revision, as the hub lists it."""

    path: Path
    extra: bytes
    size: int
    git_sha1: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_sha1

    def content(self) -> bytes:
        return self.path.read_bytes() + self.extra


def listing(folder: Path, extra: bytes) -> dict[str, File]:
    """Every file of the folder with its size and hashes; `extra` is added to the README."""
    files = {}
    for path in sorted(p for p in folder.rglob("[!.]*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        tail = extra if name == "README.md" else b""
        data = path.read_bytes() + tail
        large = any(fnmatch.fnmatch(name, pattern) for pattern in LARGE)
        files[name] = File(
            path,
            tail,
            len(data),
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            hashlib.sha256(data).hexdigest() if large else None,
        )
    return files


def refusal(status: int, code: str = "", message: str = "") -> web.Response:
    headers = {"X-Error-Message": message or f"HTTP {status}"}
    if code:
        headers["X-Error-Code"] = code
    if status in (429, 503):
        headers["Retry-After"] = "2"
    return web.json_response({"error": message or f"HTTP {status}"}, status=status, headers=headers)


class Hub:
    """The request handlers."""

    def __init__(self, folder: Path, faults: Path) -> None:
        self.folder, self.faults_file = folder, faults
        self.inputs = ""
        self.revisions: dict[str, dict[str, File]] = {}
        self.downloads: Counter[tuple[str, str]] = Counter()

    def read(self) -> None:
        """Lists the checkpoint, again after it was trained anew."""
        inputs = (self.folder / ".inputs").read_text()
        if inputs != self.inputs:
            self.revisions = {commit: listing(self.folder, extra) for commit, extra in REVISIONS.items()}
            self.inputs = inputs

    def faults(self) -> dict[str, Any]:
        try:
            faults: dict[str, Any] = json.loads(self.faults_file.read_text())
        except FileNotFoundError:
            return {}
        return faults

    def commit(self, request: web.Request, kind: str) -> str | web.Response:
        """The commit that a request means, or the answer that refuses it."""
        self.read()
        if status := self.faults().get(kind):
            return refusal(int(status))
        if f"{request.match_info['org']}/{request.match_info['name']}" != REPO:
            return refusal(404, "RepoNotFound", "Repository not found")
        revision = request.match_info["revision"]
        commit = BRANCHES.get(revision, revision)
        if commit not in self.revisions:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    async def info(self, request: web.Request) -> web.Response:
        commit = self.commit(request, "api")
        if isinstance(commit, web.Response):
            return commit
        siblings = [{"rfilename": name} for name in self.revisions[commit]]
        return web.json_response(
            {"id": REPO, "modelId": REPO, "sha": commit, "private": False, "gated": False, "siblings": siblings}
        )

    async def tree(self, request: web.Request) -> web.Response:
        commit = self.commit(request, "api")
        if isinstance(commit, web.Response):
            return commit
        entries = []
        for name, file in self.revisions[commit].items():
            entry = {"type": "file", "oid": file.git_sha1, "size": file.size, "path": name}
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 135}
            entries.append(entry)
        return web.json_response(entries)

    async def file(self, request: web.Request) -> web.StreamResponse:
        commit = self.commit(request, "file")
        if isinstance(commit, web.Response):
            return commit
        name = request.match_info["path"]
        file = self.revisions[commit].get(name)
        if file is None:
            return refusal(404, "EntryNotFound", f"{name} does not exist")
        faults = self.faults()
        data = bytearray(file.content())
        if fnmatch.fnmatch(name, faults.get("flip", "")):
            data[len(data) // 2] ^= 0xFF
        if fnmatch.fnmatch(name, faults.get("truncate", "")):
            del data[len(data) // 2 :]
        start = request.http_range.start or 0
        stop = request.http_range.stop or len(data)
        headers = {
            "ETag": f'"{file.etag}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Length": str(stop - start),
            "Content-Type": "application/octet-stream",
        }
        if file.sha256:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(data))}
        if fnmatch.fnmatch(name, faults.get("xet", "")):
            headers |= {"X-Xet-Hash": file.etag, "X-Xet-Refresh-Route": f"{request.url.origin()}/xet/token"}
        partial = "Range" in request.headers
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if partial else 200, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if "hf_hub" in request.headers.get("User-Agent", ""):  # others look whether it can be reached
            self.downloads[(name, request.remote or "")] += 1
        rate = faults.get("bytes_per_second")
        for begin in range(start, stop, CHUNK):
            chunk = bytes(data[begin : min(begin + CHUNK, stop)])
            await response.write(chunk)
            if rate:
                await asyncio.sleep(len(chunk) / rate)
        await response.write_eof()
        return response

    async def count(self, _request: web.Request) -> web.Response:
        return web.json_response([[*which, times] for which, times in self.downloads.items()])

    async def xet_token(self, request: web.Request) -> web.Response:
        store = {"Cas-Url": f"{request.url.origin()}/xet/store", "Access-Token": "x", "Token-Expiration": "9999999999"}
        return web.json_response({}, headers={f"X-Xet-{name}": value for name, value in store.items()})

    async def xet_store(self, _request: web.Request) -> web.Response:
        await asyncio.sleep(600)
        return refusal(503)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self.info)
        app.router.add_get("/api/models/{org}/{name}/tree/{revision}", self.tree)
        app.router.add_get("/downloads", self.count)
        app.router.add_get("/xet/token", self.xet_token)
        app.router.add_route("*", "/xet/store/{path:.*}", self.xet_store)
        app.router.add_get("/{org}/{name}/resolve/{revision}/{path:.+}", self.file)  # and HEAD
        return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--faults", type=Path, default=Path("/etc/hub/faults.json"))
    options = parser.parse_args()
    web.run_app(Hub(options.folder, options.faults).application(), port=options.port)


if __name__ == "__main__":
    main()
