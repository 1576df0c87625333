"""Taking servers of a real HAProxy out of rotation and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.haproxy import HAProxy, Unavailable
from ansible_collections.glm.fleet.plugins.modules import backend_state as MODULE
from test_haproxy_template import KEY, Edge, wait_until


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    running = Edge(tmp_path, engines=2, gateway_edges=True)
    yield running
    running.stop()


@pytest.fixture
def haproxy(edge: Edge) -> HAProxy:
    return HAProxy(str(edge.directory / "haproxy/admin.sock"))


def nodes(edge: Edge, requests: int = 20) -> set[str]:
    """Which nodes answer."""
    return {edge.ask("/v1/models", {"x-api-key": KEY})[2]["X-Glm-Node"] for _ in range(requests)}


def test_a_server_that_is_out_takes_no_request(edge: Edge, haproxy: HAProxy) -> None:
    assert nodes(edge) == {"node0", "node1"}
    haproxy.rotate("node0", "out")
    assert nodes(edge) == {"node1"}
    servers = haproxy.servers()
    assert {name: server["rotation"] for name, server in servers.items()} == {"node0": "out", "node1": "in"}
    assert {name: server["up"] for name, server in servers.items()} == {"node0": False, "node1": True}
    haproxy.rotate("node0", "in")
    assert not haproxy.servers()["node0"]["up"], "no check has seen it yet"
    wait_until(lambda: bool(haproxy.servers()["node0"]["up"]), "a check to see it")
    assert nodes(edge) == {"node0", "node1"}


def test_a_stream_goes_on_and_is_counted(edge: Edge, haproxy: HAProxy) -> None:
    haproxy.rotate("node1", "out")
    connection = edge.connect()
    connection.request("POST", "/v1/stream", b"{}", {"x-api-key": KEY})
    answer = connection.getresponse()
    haproxy.rotate("node0", "out")
    assert haproxy.servers()["node0"]["sessions"] == 1
    assert answer.read().count(b"data:") == 5
    wait_until(lambda: haproxy.servers()["node0"]["sessions"] == 0, "the stream to be counted off")


def test_an_unknown_server_is_refused(haproxy: HAProxy) -> None:
    with pytest.raises(Unavailable, match="refuses to take nobody out: No such server"):
        haproxy.rotate("nobody", "out")


def test_no_haproxy_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"HAProxy does not answer at .*: No such file or directory"):
        HAProxy(str(tmp_path / "none")).servers()


def test_a_backend_that_is_not_there_has_no_server(edge: Edge, haproxy: HAProxy) -> None:
    assert HAProxy(haproxy.path, "nothing").servers() == {}


class Module:
    """In the place of AnsibleModule."""

    def __init__(self, **params: Any) -> None:
        self.params = {"server": "node0", "wait": 0, "absent_ok": False, "socket": "", "backend": "engines", **params}
        self.check_mode = False
        self.answer: dict[str, Any] = {}
        self.commands: list[list[str]] = []

    def exit_json(self, **answer: Any) -> None:
        self.answer = answer

    def run_command(self, command: list[str], check_rc: bool) -> None:
        assert check_rc
        self.commands.append(command)


@pytest.mark.parametrize("rotation", ["out", "in"])
def test_what_is_so_already_is_kept_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rotation: str
) -> None:
    """The run before may have drained it, and failed to write that down."""
    servers = {"node0": {"rotation": "out", "up": True, "sessions": 0}}
    monkeypatch.setattr(HAProxy, "servers", lambda _: servers)
    monkeypatch.setattr(HAProxy, "rotate", lambda *_: None)
    monkeypatch.setattr(MODULE, "KEEP", str(tmp_path))
    module = Module(rotation=rotation)
    monkeypatch.setattr(MODULE, "AnsibleModule", lambda **_: module)
    MODULE.main()
    assert (module.answer["changed"], module.commands) == (rotation == "in", [[str(tmp_path), "--save"]])
