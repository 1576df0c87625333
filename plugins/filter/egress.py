"""The way of a node to the outside: what is wrong with its settings, and what they mean to a program."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Never asked of a proxy: the engine, the edge and the checks of both.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(r"\.?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9A-Fa-f:]+")
CERTIFICATE = "-----BEGIN CERTIFICATE-----"


def egress_problems(proxy: str, no_proxy: Iterable[str], ca_file: str) -> list[str]:
    """A line for each setting that cannot be used; ca_file lies on the controller."""
    return [*_proxy(proxy), *_no_proxy(no_proxy), *_ca_file(ca_file)]


def _proxy(proxy: str) -> list[str]:
    if not proxy:
        return []
    try:
        parts = urlsplit(proxy)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port or parts.path.strip("/"):
        return [f"glm_http_proxy: {proxy} is no proxy: write http://HOST:PORT"]
    if parts.username or parts.password:
        return [
            "glm_http_proxy: a name and a password in it would be readable in the files of apt and Docker: use a proxy "
            "that knows the nodes by their addresses"
        ]
    return []


def _no_proxy(hosts: Iterable[str]) -> list[str]:
    return [
        f"glm_no_proxy: {host} is no host or domain: write mirror.example.com, .example.com or an address"
        for host in map(str, hosts)
        if not HOST.fullmatch(host)
    ]


def _ca_file(path: str) -> list[str]:
    if not path:
        return []
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="ascii", errors="replace")
    except OSError as problem:
        return [f"glm_ca_file: {path} cannot be read on the controller ({problem.strerror})"]
    if "PRIVATE KEY" in text:
        return [f"glm_ca_file: {path} holds a private key, which no node needs: give it the certificates alone"]
    return [] if CERTIFICATE in text else [f"glm_ca_file: {path} holds no certificate in PEM ({CERTIFICATE})"]


def egress_environment(proxy: str, no_proxy: Iterable[str]) -> dict[str, str]:
    """The variables that programs read, in both spellings; none without a proxy."""
    if not proxy:
        return {}
    direct = ",".join([*LOOPBACK, *map(str, no_proxy)])
    values = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": direct}
    return {**values, **{name.upper(): value for name, value in values.items()}}


def docker_proxies(proxy: str, no_proxy: Iterable[str]) -> dict[str, str]:
    """The same as `proxies` of Docker's daemon.json."""
    names = {"http_proxy": "http-proxy", "https_proxy": "https-proxy", "no_proxy": "no-proxy"}
    return {names[name]: value for name, value in egress_environment(proxy, no_proxy).items() if name in names}


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "docker_proxies": docker_proxies,
            "egress_environment": egress_environment,
            "egress_problems": egress_problems,
        }
