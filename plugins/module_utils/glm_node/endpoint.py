"""What the modules that ask an endpoint share: a request, its answer with the times of a stream, and what was wrong."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit


class Wrong(Exception):
    """A check failed; its text says what was seen and what was wanted."""


class Response:
    """Status and body of an answer, with the time at which each line of a stream came."""

    def __init__(self, status: int, body: bytes, lines: list[tuple[float, str]]) -> None:
        self.status, self.body, self.lines = status, body, lines

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body)
        except ValueError:
            raise Wrong(f"HTTP {self.status}, not JSON: {shorten(self.body.decode(errors='replace'))}") from None
        if not isinstance(value, dict):
            raise Wrong(f"HTTP {self.status}, not an object: {shorten(self.body.decode(errors='replace'))}")
        return value

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """The JSON events of a stream of server-sent events."""
        for moment, line in self.lines:
            data = line[5:].strip() if line.startswith("data:") else ""
            if data and data != "[DONE]":
                try:
                    yield moment, json.loads(data)
                except ValueError:
                    raise Wrong(f"an event of the stream is not JSON: {shorten(data)}") from None


class Server:
    """One HTTP server; each request has a connection of its own."""

    def __init__(
        self,
        url: str,
        timeout: float,
        headers: dict[str, str] | None = None,
        *,
        own_name: bool = True,
        ca_file: str = "",
    ) -> None:
        """`own_name`: the certificate need not name an address of this machine; `ca_file`: a further authority."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https address")
        self.host, self.tls, self.timeout = parts.hostname, parts.scheme == "https", timeout
        self.own_name, self.ca_file = own_name, ca_file
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.port = parts.port or (443 if self.tls else 80)

    def _connect(self) -> http.client.HTTPConnection:
        if not self.tls:
            return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        context = ssl.create_default_context()
        if self.ca_file:
            context.load_verify_locations(self.ca_file)
        if self.own_name and is_own_address(self.host):  # the certificate is for the name that clients use
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout, context=context)

    def certificate(self) -> bytes:
        """The certificate that is shown, in DER."""
        connection = self._connect()
        try:
            connection.connect()
            shown = connection.sock
            return (shown.getpeercert(binary_form=True) or b"") if isinstance(shown, ssl.SSLSocket) else b""
        except OSError as problem:
            raise Wrong(f"{self.host}:{self.port}: {problem or type(problem).__name__}") from None
        finally:
            connection.close()

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> Response:
        deadline = time.monotonic() + self.timeout
        connection = self._connect()
        try:
            data = json.dumps(body).encode() if body is not None else None
            connection.request(method, path, data, {**self.headers, **(headers or {})})
            answer = connection.getresponse()
            content, rest, lines = b"", b"", []
            while part := answer.read1(65536):
                if time.monotonic() > deadline:
                    raise Wrong(f"{path} was still answering after {self.timeout:.0f} s")
                content += part
                *whole, rest = (rest + part).split(b"\n")
                lines += [(time.monotonic(), line.decode(errors="replace").strip()) for line in whole]
            if rest:
                lines.append((time.monotonic(), rest.decode(errors="replace").strip()))
            return Response(answer.status, content, lines)
        except TimeoutError:
            raise Wrong(f"no answer from {path} within {self.timeout:.0f} s") from None
        except (OSError, http.client.HTTPException) as problem:
            raise Wrong(f"{path} of {self.host}:{self.port}: {problem or type(problem).__name__}") from None
        finally:
            connection.close()


def need(answer: Response, status: int, who: str = "") -> None:
    if answer.status == status:
        return
    text = answer.body.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):  # any other body is told as it is
        text = json.loads(text)["error"]["message"]
    raise Wrong(f"{who and who + ': '}HTTP {answer.status}: {shorten(str(text)) or 'no text'}")


def shorten(text: str, length: int = 160) -> str:
    """One line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def is_own_address(host: str) -> bool:
    """Whether this machine has the address: one can listen only on an address of one's own."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
