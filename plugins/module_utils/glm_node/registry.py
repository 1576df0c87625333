"""Blobs of one repository of a registry, over its HTTP API."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from .transfer import Unavailable


class BlobOpener:
    """Opens blobs by their digest, by the node's proxy and certificates, with a token where one is wanted."""

    def __init__(self, base: str, path: str, timeout: float = 30) -> None:
        """`path` is the repository's, as library/debian."""
        self.base = base.rstrip("/")
        self.path = path
        self.timeout = timeout
        self.client = urllib.request.build_opener()
        self.token = ""
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, digest: str, offset: int = 0) -> Any:
        try:
            with self._get(digest, offset) as response:
                yield response
        except urllib.error.HTTPError as exc:
            with exc:
                yield exc

    def _get(self, digest: str, offset: int) -> Any:
        url = f"{self.base}/v2/{self.path}/blobs/{digest}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        token = self.token
        try:
            return self._open(url, headers, token)
        except urllib.error.HTTPError as exc:
            challenge = exc.headers.get("WWW-Authenticate", "")
            # Not of the store that the registry sends its clients on to.
            if exc.code != 401 or exc.url != url or not challenge.lower().startswith("bearer "):
                raise
            exc.close()
        return self._open(url, headers, self._authorise(challenge, token))

    def _authorise(self, challenge: str, refused: str) -> str:
        """A token, as the challenge says where to get it; what another thread got after the refused one will do."""
        with self.lock:
            if self.token == refused:
                fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
                realm = fields.get("realm", "")
                if not realm.startswith(("http://", "https://")):
                    raise Unavailable(f"{self.base} wants a token and does not say from where")
                query = {"service": fields.get("service", ""), "scope": f"repository:{self.path}:pull"}
                try:
                    with self._open(f"{realm}?{urllib.parse.urlencode(query)}", {}) as response:
                        answer = json.loads(response.read(1 << 20))
                    self.token = str(answer.get("token") or answer["access_token"])
                except (ValueError, KeyError, AttributeError) as exc:
                    raise Unavailable(f"{realm} gave no token") from exc
            return self.token

    def _open(self, url: str, headers: dict[str, str], token: str = "") -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "glm-fleet", **headers})  # noqa: S310 a registry's
        if token:
            # Never sent on to where the answer redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return self.client.open(request, timeout=self.timeout)
