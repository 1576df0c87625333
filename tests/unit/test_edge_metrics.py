"""What monitoring reads from an edge: a real HAProxy, who may read it, and that clients lose nothing by it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.client
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.metrics import samples
from test_haproxy_template import (
    KEY,
    METRICS,
    TOKEN,
    Edge,
    QuietHandler,
    QuietServer,
    edge,
    free_port,
    start,
    template,
    wait_until,
    write_files,
)

__all__ = ["edge", "start"]  # fixtures
BEARER = {"Authorization": f"Bearer {TOKEN}"}
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
NODE_EXPORTER = "/usr/bin/prometheus-node-exporter"


class Exporter(QuietServer):
    """Tells what it was asked, as an engine or an exporter tells its metrics."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        super().__init__(ExporterHandler)


class ExporterHandler(QuietHandler):
    server: Exporter

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        body = b"# TYPE up gauge\nup 1\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    server = Exporter()
    yield server
    server.shutdown()
    server.server_close()


def offered(port: int, exporter: int, **changes: Any) -> dict[str, Any]:
    return {**METRICS, "gateway_metrics_port": port, "gateway_metrics_targets": {"engine": exporter}, **changes}


def ask(
    port: int, path: str, headers: dict[str, str] | None = None, method: str = "GET", address: str = "127.0.0.1"
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(address, port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, None, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers


def test_metrics_are_read_with_the_token(start: Callable[..., Edge], exporter: Exporter) -> None:
    port = free_port()
    edge = start(**offered(port, exporter.server_port))
    status, text, _ = ask(port, "/engine", BEARER)
    assert (status, samples(text)) == (200, {"up": 1.0})
    path, headers = exporter.asked[0]
    assert path == "/metrics" and "authorization" not in headers
    assert ask(port, "/engine?collect[]=other", {"authorization": f"bearer {TOKEN}"})[0] == 200
    assert exporter.asked[1][0] == "/metrics", "nothing of a query reaches an exporter"
    edge.ask("/v1/models", {"x-api-key": KEY})
    status, text, _ = ask(port, "/haproxy", BEARER)
    assert status == 200
    assert 'haproxy_frontend_http_responses_total{proxy="edge",code="2xx"} 1' in text
    assert 'haproxy_server_status{proxy="engines",server="node0",state="UP"} 1' in text


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        (("/engine", {}, "GET"), 401, "Missing or wrong token"),
        (("/engine", {"Authorization": "Bearer " + "x" * 43}, "GET"), 401, "Missing or wrong token"),
        (("/engine", {"Authorization": f"Basic {TOKEN}"}, "GET"), 401, "Missing or wrong token"),
        (("/engine", {"x-api-key": KEY}, "GET"), 401, "Missing or wrong token"),
        (("/engine", {"Authorization": f"Bearer {KEY}"}, "GET"), 401, "Missing or wrong token"),
        (("/engine", {"Authorization": f"Bearer {DIGEST}"}, "GET"), 401, "Missing or wrong token"),
        (("/nothing", {}, "GET"), 401, "Missing or wrong token"),
        (("/engine", BEARER, "POST"), 405, "read with GET"),
        (("/haproxy", BEARER, "DELETE"), 405, "read with GET"),
        (("/metrics", BEARER, "GET"), 404, "Metrics are at /haproxy, /engine."),
        (("/engine/", BEARER, "GET"), 404, "Metrics are at"),
        (("/engine/../v1/models", BEARER, "GET"), 404, "Metrics are at"),
        (("/v1/models", BEARER, "GET"), 404, "Metrics are at"),
        (("/gpu", BEARER, "GET"), 404, "Metrics are at"),
    ],
)
def test_what_is_refused(
    start: Callable[..., Edge], exporter: Exporter, asked: tuple[str, dict[str, str], str], status: int, said: str
) -> None:
    port = free_port()
    start(**offered(port, exporter.server_port))
    seen = ask(port, *asked)
    assert seen[0] == status and said in seen[1]
    assert exporter.asked == []
    if status == 401:
        assert seen[2]["WWW-Authenticate"] == "Bearer"
    if status == 405:
        assert seen[2]["Allow"] == "GET"


def own_address() -> str:
    """One of this machine that is not loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("ipv6", [False, True])
def test_another_address_reads_nothing_and_takes_no_room(
    start: Callable[..., Edge], exporter: Exporter, ipv6: bool
) -> None:
    other = own_address()
    if other.startswith(("127.", "0.")):
        pytest.skip("this machine has no address but loopback's")
    port = free_port()
    start(**offered(port, exporter.server_port, __gateway_metrics_ipv6=ipv6))
    status, said, _ = ask(port, "/engine", BEARER, address=other)
    assert status == 403 and "see glm_metrics_sources" in said
    held, closed = [], 0
    for _ in range(100):
        try:
            held.append(socket.create_connection((other, port), 5))
        except ConnectionResetError:
            closed += 1
    assert ask(port, "/engine", BEARER)[0] == 200, "who may read finds room"
    # HAProxy closes some only after they were opened: those can be read, to their end.
    wait_until(lambda: closed + len(select.select(held, [], [], 0)[0]) > 50, "more than half to be closed")
    for connection in held:
        connection.close()


@pytest.mark.parametrize(("sources", "status"), [(["198.51.100.9"], 403), (["OWN"], 200)])
def test_an_address_of_the_list_may_read(
    start: Callable[..., Edge], exporter: Exporter, sources: list[str], status: int
) -> None:
    other = own_address()
    if other.startswith(("127.", "0.")):
        pytest.skip("this machine has no address but loopback's")
    port = free_port()
    given = [other if source == "OWN" else source for source in sources]
    start(**offered(port, exporter.server_port, gateway_metrics_sources=given))
    assert ask(port, "/engine", BEARER, address=other)[0] == status


def test_scrapes_take_no_connection_of_clients(start: Callable[..., Edge], exporter: Exporter) -> None:
    port = free_port()
    edge = start(**offered(port, exporter.server_port), gateway_max_connections=20)
    # The kernel holds as many again until there is room for them.
    held = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(60)]
    wait_until(lambda: current(edge) >= 32, "HAProxy to take its share")
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200
    # They are closed after 5 s without a request, and others take their place.
    assert max(current(edge) for _ in range(50)) == 32
    for connection in held:
        connection.close()


def current(edge: Edge) -> int:
    """Connections of the metrics, as HAProxy counts them."""
    rows = csv.DictReader(edge.admin("show stat").lstrip("# ").splitlines())
    return next(int(row["scur"]) for row in rows if (row["pxname"], row["svname"]) == ("metrics", "FRONTEND"))


def test_an_exporter_that_is_gone_is_told_at_once(start: Callable[..., Edge]) -> None:
    port, nobody = free_port(), free_port()
    start(**offered(port, nobody))
    began = time.monotonic()
    assert ask(port, "/engine", BEARER)[0] == 503
    assert time.monotonic() - began < 5


def test_scrapes_are_not_logged(start: Callable[..., Edge], exporter: Exporter) -> None:
    port = free_port()
    edge = start(**offered(port, exporter.server_port))
    for headers in ({}, BEARER):
        ask(port, "/engine", headers)
    edge.ask("/v1/models", {"x-api-key": KEY})
    log = edge.log_lines("/v1/models")
    assert "/engine" not in log and TOKEN not in log


def test_no_file_of_the_node_holds_the_token() -> None:
    text = template("haproxy.cfg.j2", **METRICS)
    assert TOKEN not in text and METRICS["__gateway_metrics_digest"].upper() in text
    assert "frontend metrics" not in template("haproxy.cfg.j2")


def test_metrics_come_and_go_without_a_cut(start: Callable[..., Edge], exporter: Exporter) -> None:
    port = free_port()
    edge = start()
    changes = dict(edge.changes)
    for given, reachable in ((offered(port, exporter.server_port), True), ({}, False)):
        stream = edge.connect()
        stream.request("POST", "/v1/stream", b"{}", {"x-api-key": KEY})
        answer = stream.getresponse()
        write_files(edge.directory, **{**changes, **given})
        assert edge.reload() is None
        assert answer.read().count(b"data:") == 5
        if reachable:
            assert ask(port, "/engine", BEARER)[0] == 200
        else:
            wait_until(lambda: refuses(port), "the port to be closed")


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_of_metrics_is_no_server_of_the_state_file(start: Callable[..., Edge], exporter: Exporter) -> None:
    """A node may have the name that a server of another backend has."""
    port = free_port()
    edge = start(engines=2, gateway_edges=True)
    servers = [
        {**server, "name": name}
        for server, name in zip(edge.changes["gateway_servers"], ("exporter", "node1"), strict=True)
    ]
    write_files(edge.directory, **{**edge.changes, "gateway_servers": servers}, **offered(port, exporter.server_port))
    assert edge.reload() is None
    edge.admin("set server engines/exporter state maint")
    assert edge.reload() is None
    rows = {line.split()[3]: line.split() for line in edge.admin("show servers state engines").splitlines()[2:] if line}
    assert int(rows["exporter"][18]) == servers[0]["port"] and int(rows["exporter"][6]) & 1


def test_node_exporters_own_metrics_pass(start: Callable[..., Edge], tmp_path: Path) -> None:
    """The distribution's exporter, with the arguments of our unit."""
    port, own = free_port(), free_port()
    directory = tmp_path / "textfile"
    directory.mkdir()
    (directory / "glm.prom").write_text('glm_phase_info{phase="serving"} 1\n')
    unit = template(
        "prometheus-node-exporter.conf.j2",
        metrics_node_exporter_port=own,
        __metrics_textfiles=directory,
    )
    command = unit.partition("ExecStart=/usr/bin")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    assert command[0] in NODE_EXPORTER
    exporter = subprocess.Popen([NODE_EXPORTER, *command[1:]], stderr=subprocess.PIPE, text=True)
    try:
        start(**METRICS | {"gateway_metrics_port": port, "gateway_metrics_targets": {"node": own}})
        wait_until(lambda: not refuses(own), "node-exporter to listen")
        status, text, _ = ask(port, "/node", BEARER)
        assert status == 200
        seen = samples(text)
        assert seen["glm_phase_info"] == 1
        assert seen["node_textfile_scrape_error"] == 0
        assert seen["node_memory_MemTotal_bytes"] > 1e8
        with socket.socket() as probe:  # 127.0.0.2 would be in use if it listened at every address
            probe.bind(("127.0.0.2", own))
    finally:
        exporter.terminate()
        exporter.wait(10)
        assert exporter.stderr
        exporter.stderr.close()
