"""Where gateways place sessions: real HAProxys in front of engines."""

from __future__ import annotations

import collections
import contextlib
import http.client
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.haproxy import HAProxy
from test_haproxy_template import KEY, Edge, free_port, in_background, wait_until, write_files

SESSIONS = [f"session-{number}" for number in range(30)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Edge]]:
    with contextlib.ExitStack() as stack:

        def start_edge(name: str = "gw-1", **options: Any) -> Edge:
            directory = tmp_path / name
            directory.mkdir()
            edge = Edge(directory, gateway_edges=True, gateway_name=name, **options)
            stack.callback(edge.stop)
            return edge

        yield start_edge


@pytest.fixture
def pair(start: Callable[..., Edge]) -> tuple[Edge, Edge]:
    """Two gateways in front of the same three nodes, each at an address of its own."""
    port, addresses = free_port(), {"gw-1": "127.0.0.1", "gw-2": "127.0.0.2"}

    def gateway(name: str, **options: Any) -> Edge:
        peers = [{"name": other, "address": address} for other, address in addresses.items() if other != name]
        options = {"gateway_peers": peers, "gateway_peers_port": port, **options}
        return start(name, gateway_bind_address=addresses[name], **options)

    first = gateway("gw-1", engines=3)
    second = gateway("gw-2", engines=0, gateway_servers=first.changes["gateway_servers"])
    # The second one calls from 127.0.0.1 too, which is not its address: the door of the first one stays shut.
    wait_until(lambda: "last_status=ESTA" in second.admin("show peers"), "the gateways to meet")
    return first, second


def ask(edge: Edge, session: str = "", header: str = "x-session-id") -> str:
    """The node that answered."""
    status, _, headers = edge.ask("/v1/models", {"x-api-key": KEY} | ({header: session} if session else {}))
    assert status == 200
    return str(headers["X-Glm-Node"])


def homes(edge: Edge, sessions: list[str] = SESSIONS) -> dict[str, str]:
    return {session: ask(edge, session) for session in sessions}


def rotate(edge: Edge, node: str, rotation: str) -> None:
    haproxy = HAProxy(str(edge.directory / "haproxy/admin.sock"))
    haproxy.rotate(node, rotation)
    wait_until(lambda: haproxy.servers()[node]["up"] == (rotation == "in"), f"{node} to be {rotation}")


def table(edge: Edge) -> dict[str, str]:
    """The node of each session, by the session's hash."""
    rows = [line.split() for line in edge.admin("show table engines").splitlines() if " key=" in line]
    return {row[1]: row[-1].removeprefix("server_key=") for row in rows}


def reload(edge: Edge) -> None:
    """A process that has just begun waits 10 s for somebody who tells it what is known, and tells nothing itself."""
    wait_until(lambda: bool(int(re.findall(r" flags=0x(\w+) ", edge.admin("show peers"))[0], 16) & 2), "its peers", 15)
    known = table(edge)
    assert edge.reload() is None
    wait_until(lambda: table(edge) == known, "the new process to be told")


def stream(edge: Edge, session: str) -> http.client.HTTPResponse:
    connection = edge.connect()
    connection.request("POST", "/v1/stream", b"{}", {"x-api-key": KEY, "x-session-id": session})
    return connection.getresponse()


@pytest.mark.parametrize("header", ["X-Claude-Code-Session-Id", "session-id", "x-session-id"])
def test_sessions_spread_evenly_and_stay(start: Callable[..., Edge], header: str) -> None:
    edge = start(engines=3)
    first, *later = [{session: ask(edge, session, header) for session in SESSIONS} for _ in range(3)]
    assert collections.Counter(first.values()) == {"node0": 10, "node1": 10, "node2": 10}
    assert later == [first, first]


def test_a_new_session_goes_to_the_node_with_the_fewest_requests(start: Callable[..., Edge]) -> None:
    edge = start(engines=2)
    answers: list[int] = []
    held = [in_background(edge, "/v1/held", answers) for _ in range(6)]
    wait_until(lambda: sum(len(engine.asked()) for engine in edge.engines) == 6, "the engines to be asked")
    edge.engines[0].held.set()
    wait_until(lambda: len(answers) == 3, "one node to be idle")
    assert set(homes(edge).values()) == {"node0"}
    edge.engines[1].held.set()
    for thread in held:
        thread.join(10)


def test_a_request_without_a_session_leaves_nothing_behind(start: Callable[..., Edge]) -> None:
    edge = start(engines=3)
    assert {ask(edge) for _ in range(9)} == {"node0", "node1", "node2"}
    assert table(edge) == {}


def test_a_session_that_was_silent_for_long_is_new(start: Callable[..., Edge]) -> None:
    edge = start(engines=2, gateway_session_timeout="1s")
    ask(edge, "one")
    wait_until(lambda: table(edge) == {}, "the session to be forgotten")


def test_no_id_of_a_session_is_in_the_table(start: Callable[..., Edge]) -> None:
    """They may be long, and are not the other gateways' concern."""
    edge = start(engines=1)
    for last in ("a", "b"):
        ask(edge, "x" * 200 + last)
    assert len(table(edge)) == 2 and "78787878" not in edge.admin("show table engines")


def test_a_drain_moves_its_own_sessions_alone_and_cuts_nothing(start: Callable[..., Edge]) -> None:
    edge = start(engines=3)
    before = homes(edge)
    answers = [stream(edge, session) for session in SESSIONS[:3]]
    rotate(edge, "node1", "out")
    drained = homes(edge)
    assert {session for session in SESSIONS if drained[session] != before[session]} == {
        session for session, node in before.items() if node == "node1"
    }
    assert [answer.read().count(b"data:") for answer in answers] == [5, 5, 5]
    # Nothing comes back by itself: its conversation is cached where it is now.
    rotate(edge, "node1", "in")
    assert homes(edge) == drained
    assert "node1" in homes(edge, ["another", "and another", "and one more"]).values()


def test_a_request_that_waits_for_a_node_moves_when_it_is_drained(start: Callable[..., Edge]) -> None:
    edge = start(engines=2, gateway_max_requests=1)
    home = ask(edge, "one")
    engine = edge.engines[int(home[-1])]
    answers: list[int] = []
    held = in_background(edge, "/v1/held", answers, "one")
    wait_until(lambda: len(engine.asked()) == 2, "the engine to be asked")
    waiting = in_background(edge, "/v1/models", answers, "one")
    wait_until(lambda: f"engines,{home},1," in edge.admin("show stat"), "the second request to wait")
    HAProxy(str(edge.directory / "haproxy/admin.sock")).rotate(home, "out")
    waiting.join(10)
    assert answers == [200] and len(engine.asked()) == 2
    engine.held.set()
    held.join(10)
    assert answers == [200, 200]


def test_sessions_of_a_node_that_is_gone_move(start: Callable[..., Edge]) -> None:
    edge = start(engines=3)
    before = homes(edge)
    edge.engines[2].shutdown()
    edge.engines[2].server_close()
    after = homes(edge)
    assert "node2" not in after.values()
    assert {session: node for session, node in before.items() if node != "node2"} == {
        session: after[session] for session, node in before.items() if node != "node2"
    }
    assert homes(edge) == after


def test_gateways_agree(pair: tuple[Edge, Edge]) -> None:
    first, second = pair
    before = homes(first)
    wait_until(lambda: table(second) == table(first), "the second gateway to be told")
    assert homes(second) == before
    later = homes(second, ["one of the second"])
    wait_until(lambda: table(second) == table(first), "the first gateway to be told")
    assert homes(first, ["one of the second"]) == later


def test_a_gateway_that_has_not_drained_yet_takes_no_session_back(pair: tuple[Edge, Edge]) -> None:
    """Gateways are drained one after the other: until then the second one goes on with what it knows, and says so."""
    first, second = pair
    before = homes(first)
    moving = [session for session, node in before.items() if node == "node1"]
    wait_until(lambda: table(second) == table(first), "the second gateway to be told")
    rotate(first, "node1", "out")
    assert homes(second) == before  # and now the first one has all entries of node1 anew
    wait_until(lambda: table(second) == table(first), "the gateways to agree")
    moved = homes(first)
    assert "node1" not in moved.values()
    wait_until(lambda: table(second) == table(first), "the second gateway to be told")
    # What the first one has moved stays moved, whatever the second one thinks of node1.
    assert homes(second) == moved == homes(first)
    assert {session for session in SESSIONS if moved[session] != before[session]} == set(moving)
    rotate(second, "node1", "out")
    assert homes(second) == moved == homes(first)
    for gateway in pair:
        rotate(gateway, "node1", "in")
        assert homes(gateway) == moved


def test_a_reload_keeps_where_sessions_are(start: Callable[..., Edge]) -> None:
    edge = start(engines=3)
    before = homes(edge)
    rotate(edge, "node1", "out")
    reload(edge)
    assert edge.drained() == {"node1"}
    after = homes(edge)
    assert {session for session in SESSIONS if after[session] != before[session]} == {
        session for session, node in before.items() if node == "node1"
    }


def test_a_reload_with_another_node_in_front_moves_no_session(start: Callable[..., Edge]) -> None:
    """Entries go by the names of servers; their numbers have changed."""
    edge = start(engines=3)
    before = homes(edge)
    servers = edge.changes["gateway_servers"]
    edge.changes["gateway_servers"] = [{**servers[0], "name": "node-a"}, *servers]
    write_files(edge.directory, **edge.changes)
    reload(edge)
    assert homes(edge) == before


def test_a_gateway_that_was_away_is_told_by_the_other(pair: tuple[Edge, Edge]) -> None:
    first, second = pair
    before = homes(first)
    wait_until(lambda: table(second) == table(first), "the second gateway to be told")
    second.restart()
    wait_until(lambda: table(second) == table(first), "the second gateway to be told again")
    assert homes(second) == before


def test_only_other_gateways_pass_the_door(pair: tuple[Edge, Edge]) -> None:
    port = pair[0].changes["gateway_peers_port"]

    def said(source: str) -> bytes:
        with contextlib.suppress(ConnectionError), socket.socket() as connection:
            connection.settimeout(5)
            connection.bind((source, 0))
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"HAProxyS 2.1\ngw-1\ngw-2 1 0\n")
            return connection.recv(3)
        return b""

    assert (said("127.0.0.3"), said("127.0.0.2")) == (b"", b"200")
