"""Keys of a real HAProxy: changed while it serves, limited and expired, in the file and in every worker."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import haproxy
from test_haproxy_template import KEY, OTHER_KEY, RELOAD, Edge, edge, entry, start, template, wait_until

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["edge", "start"]  # fixtures
THIRD_KEY = "sk-glm-" + "t" * 43
ALICE, BOB, CAROL = {"x-api-key": KEY}, {"x-api-key": OTHER_KEY}, {"x-api-key": THIRD_KEY}
BOTH = [entry(KEY, "alice"), entry(OTHER_KEY, "bob")]


def keys_map(*entries: dict[str, Any]) -> str:
    return template("gateway-keys.map.j2", __gateway_edge_keys=list(entries))


def path_of(edge: Edge) -> Path:
    return edge.directory / "gateway/keys.map"


def edge_keys(edge: Edge, *entries: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The module as Ansible runs it."""
    arguments = {
        "content": keys_map(*entries),
        "path": str(path_of(edge)),
        "socket": str(edge.directory / "haproxy/admin.sock"),
        "master": str(edge.directory / "master.sock"),
        "lock": str(edge.directory / "lock"),
        "_ansible_check_mode": check,
        "_ansible_diff": True,
    }
    done = subprocess.run(
        [sys.executable, "-m", "ansible_collections.glm.fleet.plugins.modules.edge_keys"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert KEY not in done.stdout and hashlib.sha256(KEY.encode()).hexdigest() not in done.stdout.lower()
    answer: dict[str, Any] = json.loads(done.stdout or json.dumps({"failed": True, "msg": done.stderr}))
    return answer


def status(edge: Edge, headers: dict[str, str]) -> int:
    return edge.ask("/v1/models", headers)[0]


@pytest.fixture
def two(start: Callable[..., Edge]) -> Edge:
    """An edge that alice and bob use."""
    edge = start(__gateway_edge_keys=BOTH)
    path_of(edge).chmod(0o600)
    return edge


def test_a_key_is_revoked_at_once_and_other_streams_go_on(two: Edge) -> None:
    streams = []
    for headers in (ALICE, BOB):
        connection = two.connect()
        connection.request("POST", "/v1/stream", b"{}", headers)
        streams.append((connection, connection.getresponse()))
    pid = RELOAD.worker(str(two.directory / "haproxy/admin.sock"))
    said = edge_keys(two, entry(OTHER_KEY, "bob"), entry(THIRD_KEY, "carol"))
    assert (said["changed"], said["added"], said["removed"]) == (True, ["carol"], ["alice"]), said
    assert [status(two, headers) for headers in (ALICE, BOB, CAROL)] == [401, 200, 200]
    assert [answer.read().count(b"data:") for _, answer in streams] == [5, 5]
    assert RELOAD.worker(str(two.directory / "haproxy/admin.sock")) == pid, "it was reloaded"
    # A connection that is open already is no way around it.
    streams[0][0].request("GET", "/v1/models", headers=ALICE)
    assert streams[0][0].getresponse().status == 401


def test_it_is_done_once(two: Edge) -> None:
    assert edge_keys(two, *BOTH)["changed"] is False
    assert edge_keys(two, entry(KEY, "alice"))["changed"] is True
    assert edge_keys(two, entry(KEY, "alice"))["changed"] is False
    assert path_of(two).stat().st_mode & 0o777 == 0o600


def test_check_mode_tells_and_changes_nothing(two: Edge) -> None:
    before = path_of(two).read_text()
    said = edge_keys(two, entry(OTHER_KEY, "bob", concurrent=2), check=True)
    assert said["changed"] and said["removed"] == ["alice", "bob"] and said["added"] == ["bob"]
    digest = hashlib.sha256(KEY.encode()).hexdigest()[:8]
    assert f"alice:0:0:0 ({digest})" in said["diff"]["before"] and "alice" not in said["diff"]["after"]
    assert path_of(two).read_text() == before
    assert status(two, ALICE) == 200


def test_what_was_not_handed_over_is(two: Edge) -> None:
    """As after a run that died, or a hand at the socket."""
    path_of(two).write_text(keys_map(entry(OTHER_KEY, "bob")))
    assert edge_keys(two, entry(OTHER_KEY, "bob"))["removed"] == ["alice"]
    assert status(two, ALICE) == 401


def close_each(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def test_the_file_is_written_last(two: Edge) -> None:
    """One that is as it shall be is what tells the next run that HAProxy has the keys too."""
    before = path_of(two).read_text()
    admin = two.directory / "haproxy/admin.sock"
    admin.rename(two.directory / "hidden")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(admin))
        silent.listen()
        threading.Thread(target=close_each, args=(silent,), daemon=True).start()
        said = edge_keys(two, entry(OTHER_KEY, "bob"))
    assert said["failed"] and "the keys were not changed" in said["msg"], said
    assert path_of(two).read_text() == before
    admin.unlink()
    (two.directory / "hidden").rename(admin)


def test_a_stopped_edge_gets_its_file(two: Edge) -> None:
    two.process.kill()
    two.process.wait(10)
    wait_until(lambda: two.admin("show info") == "", "HAProxy to be gone")
    said = edge_keys(two, entry(OTHER_KEY, "bob"))
    assert (said["changed"], said["running"]) == (True, False), said
    two.process = two.run(two.directory / "haproxy.cfg")
    assert [status(two, headers) for headers in (ALICE, BOB)] == [401, 200]


def test_a_host_that_is_no_edge_is_left_alone(two: Edge) -> None:
    path_of(two).unlink()
    assert edge_keys(two, *BOTH)["edge"] is False
    assert not path_of(two).exists()


def test_many_keys_in_one_go(two: Edge) -> None:
    many = [entry(f"sk-glm-{number:043}", f"user-{number}") for number in range(300)]
    assert edge_keys(two, *many, entry(OTHER_KEY, "bob"))["removed"] == ["alice"]
    assert status(two, {"x-api-key": f"sk-glm-{299:043}"}) == 200
    assert [status(two, headers) for headers in (ALICE, BOB)] == [401, 200]


def slow_stream(edge: Edge, headers: dict[str, str]) -> http.client.HTTPConnection:
    """A request that the engine holds until the test lets it go."""
    connection = edge.connect(30)
    connection.request("GET", "/v1/held", headers=headers)
    wait_until(lambda: any(request[1] == "/v1/held" for request in edge.engine.asked()), "the engine to have it")
    return connection


def test_a_worker_that_a_reload_left_behind_refuses_it_too(two: Edge) -> None:
    held = slow_stream(two, BOB)
    assert two.reload() is None
    old = haproxy.workers(str(two.directory / "haproxy/admin.sock"), str(two.directory / "master.sock"))[1:]
    assert len(old) == 1, "the old worker is gone"
    edge_keys(two, entry(OTHER_KEY, "bob"))
    path = str(path_of(two))
    assert [value for _, value in old[0].map(path) or []] == ["bob:0:0:0"]
    assert status(two, ALICE) == 401
    two.engine.held.set()
    assert held.getresponse().read() == b"{}"


def test_a_reload_and_a_change_wait_for_each_other(two: Edge) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with haproxy.locked(str(two.directory / "lock")):
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    change = threading.Thread(target=edge_keys, args=(two, entry(OTHER_KEY, "bob")))
    change.start()
    change.join(2)
    assert change.is_alive() and status(two, ALICE) == 200
    done.set()
    change.join(30)
    assert status(two, ALICE) == 401


# --- limits ---


def test_a_key_may_ask_so_often_in_a_minute_and_the_others_as_before(start: Callable[..., Edge]) -> None:
    edge = start(__gateway_edge_keys=[entry(KEY, "alice", requests_per_minute=3), entry(OTHER_KEY, "bob")])
    assert [status(edge, ALICE) for _ in range(5)] == [200, 200, 200, 429, 429]
    _, body, headers = edge.ask("/v1/models", ALICE)
    assert body["type"] == "error" and body["error"]["type"] == "rate_limit_error"
    assert body["error"]["code"] == "rate_limit_exceeded" and headers["Retry-After"] == "10"
    assert status(edge, BOB) == 200
    # At once, and without a reload.
    edge_keys(edge, entry(KEY, "alice", requests_per_minute=5), entry(OTHER_KEY, "bob"))
    assert [status(edge, ALICE) for _ in range(3)] == [200, 200, 429]


def test_a_key_has_so_many_requests_at_once(start: Callable[..., Edge]) -> None:
    edge = start(__gateway_edge_keys=[entry(KEY, "alice", concurrent=1), entry(OTHER_KEY, "bob")])
    held = slow_stream(edge, ALICE)
    answer, body, headers = edge.ask("/v1/models", ALICE)
    assert (answer, body["error"]["code"], headers["Retry-After"]) == (429, "concurrency_limit_exceeded", "5")
    assert status(edge, BOB) == 200
    edge.engine.held.set()
    held.getresponse().read()
    wait_until(lambda: status(edge, ALICE) == 200, "the place to be free")


def test_a_node_behind_gateways_does_not_count_again(start: Callable[..., Edge]) -> None:
    edge = start(gateway_limit_shares=0, __gateway_edge_keys=[entry(KEY, "alice", requests_per_minute=1)])
    assert [status(edge, ALICE) for _ in range(3)] == [200] * 3


def test_a_rollouts_checks_do_not_count(start: Callable[..., Edge]) -> None:
    edge = start(__gateway_edge_keys=[entry(KEY, "alice", requests_per_minute=1, concurrent=1)])
    assert [status(edge, {**ALICE, "X-Glm-Probe": "1"}) for _ in range(3)] == [200] * 3
    assert [status(edge, ALICE) for _ in range(2)] == [200, 429]


def test_a_key_ends_at_its_second(start: Callable[..., Edge]) -> None:
    edge = start()
    ends = int(time.time()) + 3
    edge_keys(edge, entry(KEY, "alice", expires_at=ends), entry(OTHER_KEY, "bob", expires_at=int(time.time()) - 1))
    answer, body, _ = edge.ask("/v1/models", BOB)
    assert (answer, body["error"]["code"]) == (401, "expired_api_key") and "has expired" in body["error"]["message"]
    seen: dict[int, set[int]] = {}
    while (now := time.time()) < ends + 1:
        before = status(edge, ALICE)
        if int(now) == int(time.time()):  # the whole request within one second
            seen.setdefault(int(now), set()).add(before)
        time.sleep(0.1)
    assert seen.pop(ends) == {401}
    assert set().union(*seen.values()) == {200}


def test_the_log_names_the_key(two: Edge) -> None:
    status(two, ALICE)
    assert '"path":"/v1/models"' in two.log_lines('"key":"alice"')


# --- connections to a worker that ends: whoever is on one cannot go on with a key that was revoked ---


def test_an_idle_connection_ends_with_its_worker(two: Edge) -> None:
    connection = two.connect()
    connection.request("GET", "/v1/models", headers=ALICE)
    connection.getresponse().read()
    assert two.reload() is None
    edge_keys(two, entry(OTHER_KEY, "bob"))
    try:
        connection.request("GET", "/v1/models", headers=ALICE)
        assert connection.getresponse().status == 401
    except (http.client.HTTPException, OSError):
        pass  # closed: the next one goes to the new worker


@pytest.mark.parametrize("revoked", ["before", "after"])
def test_a_request_behind_a_stream_of_an_old_worker_is_judged_anew(two: Edge, revoked: str) -> None:
    """By HTTP/1.1 pipelining: the second request waits in the old worker while the first one streams."""
    raw = socket.create_connection(("127.0.0.1", two.port), timeout=20)
    ask = b"GET /v1/%s HTTP/1.1\r\nHost: edge\r\nx-api-key: " + KEY.encode() + b"\r\n\r\n"
    raw.sendall(ask % b"held")
    wait_until(lambda: any(request[1] == "/v1/held" for request in two.engine.asked()), "the engine to have it")
    if revoked == "after":
        raw.sendall(ask % b"second")
    assert two.reload() is None
    edge_keys(two, entry(OTHER_KEY, "bob"))
    if revoked == "before":
        raw.sendall(ask % b"second")
    two.engine.held.set()
    answer = b""
    while part := raw.recv(65536):
        answer += part
        if answer.count(b"HTTP/1.1 ") > 1:
            break
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 200" not in answer[12:]
    assert not any(request[1] == "/v1/second" for request in two.engine.asked())
