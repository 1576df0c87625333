"""One file over HTTP into a place on the disk, hashed as it comes, going on from what is there."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

BLOCK = 1 << 20


class Wanted(NamedTuple):
    """A file as the hub lists it: `algorithm` is sha256, or git's sha1 of a blob."""

    path: str
    size: int
    algorithm: str
    digest: str

    def hasher(self) -> Any:
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size)  # noqa: S324 git's


class Unavailable(Exception):
    """The source does not give the file now: `missing` where it says that it has none, `busy` where it asks to wait."""

    def __init__(self, text: str, *, missing: bool = False, busy: bool = False) -> None:
        super().__init__(text)
        self.missing = missing
        self.busy = busy


class Wrong(Exception):
    """What came is not the file that the hub lists; it is no longer there."""


class Slow(Exception):
    """Given up, for another source may be faster; what came is kept."""


class Stopped(Exception):
    """The program is being stopped."""


class PeerOpener:
    """Opens files of one peer. From the node's own address, by which the others know it; never by a proxy."""

    def __init__(self, address: str, port: int, own_address: str = "", timeout: float = 10) -> None:
        self.address = address
        self.port = port
        self.source = (own_address, 0) if own_address else None
        self.timeout = timeout

    @contextlib.contextmanager
    def __call__(self, path: str, offset: int = 0) -> Any:
        connection = http.client.HTTPConnection(self.address, self.port, self.timeout, self.source)
        try:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            connection.request("GET", urllib.parse.quote(path), headers=headers)
            yield connection.getresponse()
        finally:
            connection.close()


class DirectoryOpener:
    """Opens files below a directory, as a server would give them."""

    def __init__(self, base: Path) -> None:
        self.base = base

    @contextlib.contextmanager
    def __call__(self, path: str, offset: int = 0) -> Any:
        try:
            # The hub's own cache consists of links.
            stream = (self.base / path.lstrip("/")).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            yield _Opened(404, None, 0)
            return
        with stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(offset)
            yield _Opened(206 if offset else 200, stream, size - offset)


class _Opened:
    """What of an HTTP response is used here."""

    def __init__(self, status: int, stream: Any, left: int) -> None:
        self.status = status
        self.headers = {"Content-Length": str(left)} if stream else {}
        self.readinto = stream.readinto if stream else None
        self.read = stream.read if stream else bytes


class UrlOpener:
    """Opens files below an address, by the machine's proxy and certificates."""

    def __init__(self, base: str, timeout: float = 30, token: str = "") -> None:
        self.base = base.rstrip("/")
        self.timeout = timeout
        self.token = token

    @contextlib.contextmanager
    def __call__(self, path: str, offset: int = 0) -> Any:
        headers = {"User-Agent": "glm-fleet", **({"Range": f"bytes={offset}-"} if offset else {})}
        request = urllib.request.Request(self.base + "/" + urllib.parse.quote(path.lstrip("/")), headers=headers)  # noqa: S310
        if self.token:  # not for where a large file's address redirects to
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310 an address of the user
                yield response
        except urllib.error.HTTPError as exc:
            with exc:
                yield exc


def digest(
    wanted: Wanted, path: Path, stop: threading.Event, advance: Callable[[int], None] = lambda _count: None
) -> str:
    """The hash of a file that is there. What was read is on the disk afterwards, not only in the page cache."""
    hasher = wanted.hasher()
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            if stop.is_set():
                raise Stopped
            hasher.update(buffer[:count])
            advance(count)
        os.fsync(stream.fileno())
    return str(hasher.hexdigest())


def fetch(
    wanted: Wanted,
    place: Path,
    opener: Callable[..., Any],
    path: str,
    *,
    stop: threading.Event,
    advance: Callable[[int], None] = lambda _count: None,
    too_slow: Callable[[int, float], bool] | None = None,
) -> None:
    """Brings the file to `place`, on the disk and right. What an earlier attempt left in `place` is gone on from.

    `advance` is told of bytes that came; `too_slow` of the bytes and seconds of this attempt, once a second.
    Raises Unavailable, Wrong, Slow, Stopped, or OSError for the disk.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    hasher = wanted.hasher()
    with place.open("r+b" if place.exists() else "w+b") as stream:
        while block := stream.read(BLOCK):
            hasher.update(block)
        have = stream.tell()
        if have > wanted.size:
            stream.truncate(0)
            raise Unavailable("more was there than belongs to the file")
        if have < wanted.size:
            began = looked = time.monotonic()
            with _answer(opener, path, have) as response:
                _check_answer(response, wanted, have)
                for came in _blocks(response, wanted.size - have):
                    hasher.update(came)
                    stream.write(came)
                    advance(len(came))
                    now = time.monotonic()
                    if stop.is_set():
                        raise Stopped
                    if too_slow and now - looked >= 1:
                        looked = now
                        if too_slow(stream.tell() - have, now - began):
                            raise Slow
        stream.flush()
        # What is called right must be on the disk, not only in the page cache.
        os.fsync(stream.fileno())
    found = hasher.hexdigest()
    if found != wanted.digest:
        place.unlink()
        raise Wrong(f"expected {wanted.algorithm} {wanted.digest}, found {found}")


@contextlib.contextmanager
def _answer(opener: Callable[..., Any], path: str, offset: int) -> Any:
    manager = opener(path, offset)
    try:
        response = manager.__enter__()
    except (OSError, http.client.HTTPException) as exc:
        raise Unavailable(str(getattr(exc, "reason", None) or exc)) from exc
    try:
        yield response
    finally:
        manager.__exit__(None, None, None)


def _check_answer(response: Any, wanted: Wanted, offset: int) -> None:
    if response.status in (404, 410):
        raise Unavailable("has no such file", missing=True)
    if response.status in (429, 503):
        raise Unavailable(f"answers {response.status}", busy=True)
    if response.status != (206 if offset else 200):
        raise Unavailable(f"answers {response.status}")
    length = response.headers.get("Content-Length")
    if length is not None and int(length) != wanted.size - offset:
        raise Unavailable(f"has a file of {int(length) + offset} bytes where {wanted.size} are listed", missing=True)


def _blocks(response: Any, left: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK))
    while left:
        try:
            count = response.readinto(buffer[: min(BLOCK, left)])
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(str(exc) or "the connection was lost") from exc
        if not count:
            raise Unavailable("the connection was lost")
        left -= count
        yield buffer[:count]
