"""The edge's configuration: every variant is one that HAProxy takes, and a real HAProxy does what it says."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule
from exposure import MOST, exposure
from loading import load_file

ROOT = Path(__file__).resolve().parents[2]
HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"
KEY = "sk-glm-" + "k" * 43
OTHER_KEY = "sk-glm-" + "o" * 43


def entry(key: str, name: str = "", **limits: int) -> dict[str, Any]:
    """What an edge knows of a key."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    known = {"sha256": digest, "name": name or digest[:8], "requests_per_minute": 0, "concurrent": 0, "expires_at": 0}
    return {**known, **limits}


VARS = yaml.safe_load((ROOT / "roles/gateway/vars/main.yml").read_text())
DEFAULTS: dict[str, Any] = {
    "ansible_managed": "Ansible managed",
    "gateway_bind_address": "*",
    "gateway_port": 8000,
    "gateway_auth": "keys",
    "gateway_tls_certificate_file": "",
    "gateway_max_connections": 512,
    "gateway_source_connections": 400,
    "gateway_source_wrong_keys": 100,
    "gateway_trusted_sources": [],
    "gateway_max_requests": 512,
    "gateway_max_queue": 128,
    "gateway_cors_origins": [],
    "gateway_client_timeout": "60s",
    "gateway_server_timeout": "1h",
    "gateway_servers": [{"name": "node1", "address": "127.0.0.1", "port": 8001}],
    "gateway_edges": False,
    "gateway_session_timeout": "10m",
    "gateway_name": "gw-1",
    "gateway_peers": [],
    "gateway_peers_port": 8003,
    "__gateway_peers_port": 8403,
    "gateway_acme_names": [],
    "gateway_acme_peers": [],
    "__gateway_acme_port": 8402,
    "__gateway_has_tls": False,
    "__gateway_own_address": [],
    "gateway_limit_shares": 1,
    "__gateway_edge_keys": [entry(KEY)],
    "__gateway_certificate_digest": "",
    "__gateway_counts": False,
    "__gateway_lua_digest": "0" * 64,
    "__gateway_log": VARS["__gateway_log_request"],
    "gateway_metrics": False,
    "gateway_metrics_port": 8005,
    "gateway_metrics_sources": [],
    "gateway_metrics_targets": {},
    "__gateway_metrics_connections": VARS["__gateway_metrics_connections"],
    "__gateway_metrics_ipv6": False,
}
TOKEN = "t" * 43
METRICS: dict[str, Any] = {
    "gateway_metrics": True,
    "gateway_metrics_sources": ["198.51.100.9"],
    "__gateway_metrics_digest": hashlib.sha256(TOKEN.encode()).hexdigest(),
    "gateway_metrics_targets": {"node": 9100, "engine": 8001},
}
THREE = [{"name": f"node{number}", "address": f"127.0.0.{number}", "port": 8001} for number in (1, 2, 3)]
PEERS = [{"name": "gw-2", "address": "10.0.0.2"}]
VARIANTS: dict[str, dict[str, Any]] = {
    "keys": {},
    "open": {"gateway_auth": "none"},
    "tls": {"gateway_tls_certificate_file": "x", "__gateway_has_tls": True, "__gateway_certificate_digest": "0" * 64},
    "acme": {"gateway_acme_names": ["llm.example.com"], "__gateway_has_tls": True},
    "acme of several gateways": {
        "gateway_acme_names": ["llm.example.com"],
        "gateway_acme_peers": ["10.0.0.2"],
        "__gateway_has_tls": True,
        "gateway_servers": THREE,
        "gateway_edges": True,
    },
    "a gateway": {"gateway_servers": THREE, "gateway_edges": True},
    "several gateways": {"gateway_servers": THREE, "gateway_edges": True, "gateway_peers": PEERS},
    "several gateways on every address": {
        "gateway_bind_address": "::",
        "gateway_servers": THREE,
        "gateway_edges": True,
        "gateway_peers": [*PEERS, {"name": "gw-3", "address": "2001:db8::3"}],
    },
    "with accounts": {
        "__gateway_counts": True,
        "__gateway_log": VARS["__gateway_log_request"] | VARS["__gateway_log_tokens"],
    },
    "every address": {"gateway_bind_address": "::"},
    "a node behind gateways": {"gateway_limit_shares": 0},
    "without limits": {"gateway_source_connections": 0, "gateway_max_requests": 0},
    "for browsers": {"gateway_cors_origins": ["https://chat.example", "http://localhost:3000"]},
    "one address": {"gateway_bind_address": "127.0.0.1"},
    "with metrics": METRICS,
    "with metrics of several gateways": {
        **METRICS,
        "gateway_servers": THREE,
        "gateway_edges": True,
        "gateway_peers": PEERS,
        "gateway_metrics_sources": ["2001:db8::/64", "198.51.100.9"],
        "__gateway_metrics_ipv6": True,
        "gateway_metrics_targets": {"node": 9100},
    },
    "all at once": {
        "gateway_auth": "none",
        "gateway_tls_certificate_file": "x",
        "__gateway_has_tls": True,
        "gateway_servers": [{**server, "tls": True} for server in THREE],
        "gateway_edges": True,
        "__gateway_certificate_digest": "0" * 64,
    },
}


def template(name: str, **variables: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "templates"),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(FilterModule().filters())
    # As Ansible does it, which drops the last line break of what is included, too.
    return environment.get_template(name).render({**DEFAULTS, **variables}).rstrip("\n") + "\n"


def write_files(directory: Path, **changes: Any) -> Path:
    """The files of a node below `directory`, for a HAProxy that stays the user it is."""
    text = template("haproxy.cfg.j2", **changes)
    text = text.replace("/opt/glm/lib/gateway/", f"{ROOT}/roles/gateway/files/")
    for path in ("/etc/glm/gateway", "/run/haproxy", "/var/lib/haproxy/server-state", "/dev/log"):
        assert path in text or path == "/etc/glm/gateway"
        text = text.replace(path, f"{directory}/{Path(path).name}")
    config = directory / "haproxy.cfg"
    config.write_text(
        "".join(
            line + "\n" for line in text.splitlines() if not line.strip().startswith(("user ", "group ", "chroot "))
        )
    )
    for name in ("gateway", "haproxy"):
        (directory / name).mkdir(exist_ok=True)
    (directory / "gateway/keys.map").write_text(template("gateway-keys.map.j2", **changes))
    return config


def make_certificate(path: Path) -> None:
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=edge.example",
            "-keyout",
            path,
            "-out",
            f"{path}.crt",
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(Path(f"{path}.crt").read_text() + path.read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_haproxy_takes_every_variant(tmp_path: Path, variant: str) -> None:
    config = write_files(tmp_path, **VARIANTS[variant])
    make_certificate(tmp_path / "gateway/tls.pem")
    done = subprocess.run([HAPROXY, "-c", "-f", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A first start has no state to read; nothing else is worth a warning.
    warnings = [line for line in done.stderr.splitlines() if "[WARNING]" in line and "server state file" not in line]
    assert warnings == []


def test_variants_differ_where_they_should() -> None:
    plain, several = template("haproxy.cfg.j2"), template("haproxy.cfg.j2", **VARIANTS["a gateway"])
    opened, tls = template("haproxy.cfg.j2", **VARIANTS["open"]), template("haproxy.cfg.j2", **VARIANTS["tls"])
    # The engine is there twice: in rotation, and for the checks of a rollout. A gateway has itself as a peer.
    assert "balance leastconn" in several and several.count("\n    server ") == 3 + 1
    assert "balance" not in plain and plain.count("\n    server ") == 2
    assert "deny_status 401" in plain and "deny_status 401" not in opened and "deny_status 403" in opened
    assert " ssl crt " in tls and " ssl crt " not in plain


def test_no_file_of_the_node_holds_a_key() -> None:
    text = template("haproxy.cfg.j2") + template("gateway-keys.map.j2")
    assert KEY not in text
    assert hashlib.sha256(KEY.encode()).hexdigest().upper() in text


def test_other_keys_make_no_other_configuration() -> None:
    """HAProxy is told of them as it runs: a reload would leave a worker behind for each long stream."""
    assert template("haproxy.cfg.j2") == template("haproxy.cfg.j2", __gateway_edge_keys=[entry(OTHER_KEY)])


# --- a real HAProxy in front of an engine ---


class QuietServer(ThreadingHTTPServer):
    """Serves from the start, on loopback."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is part of the tests."""


class QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""


class Engine(QuietServer):
    """Answers as an engine does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], int]] = []
        self.client_left = threading.Event()
        self.refuses = False  # as a node's edge does that has no engine
        self.hangs = threading.Event()  # takes connections, and answers nothing
        self.held = threading.Event()  # until then a request of /v1/held waits
        super().__init__(EngineHandler)

    def asked(self) -> list[tuple[str, str, dict[str, str], int]]:
        return [request for request in self.requests if request[1] != "/health"]


class EngineHandler(QuietHandler):
    server: Engine

    def do_GET(self) -> None:
        size = len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        headers = {name.lower(): value for name, value in self.headers.items()}
        while self.server.hangs.is_set():
            time.sleep(0.05)
        self.server.requests.append((self.command, self.path, headers, size))
        if self.server.refuses and self.path != "/health":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/v1/stream":
            self.stream()
        elif self.path == "/v1/slow":
            self.slow()
        elif self.path == "/v1/death":
            self.close_connection = True
        elif self.path == "/v1/full":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/v1/held":
            self.server.held.wait(20)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        else:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    do_POST = do_GET

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(5):
            event = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            time.sleep(0.1)
        self.wfile.write(b"0\r\n\r\n")

    def slow(self) -> None:
        """Reads the prompt for ten seconds, unless nobody waits any more."""
        self.connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert self.connection.recv(1) == b""
        self.server.client_left.set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Edge:
    """A running HAProxy and the engines behind it."""

    def __init__(self, directory: Path, engines: int = 1, **changes: Any) -> None:
        self.directory, self.port = directory, free_port()
        self.engines = [Engine() for _ in range(engines)]
        self.changes = {
            "gateway_bind_address": "127.0.0.1",
            "gateway_port": self.port,
            "__gateway_peers_port": free_port(),
            "gateway_servers": [
                {"name": f"node{number}", "address": "127.0.0.1", "port": engine.server_port}
                for number, engine in enumerate(self.engines)
            ],
            **changes,
        }
        config = write_files(directory, **self.changes)
        if self.changes.get("__gateway_has_tls"):
            make_certificate(directory / "gateway/tls.pem")
        self.logs = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.logs.bind(str(directory / "log"))
        self.logs.settimeout(2)
        self.process = self.run(config)

    def run(self, config: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [HAPROXY, "-W", "-S", self.directory / "master.sock", "-f", config],
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "stderr").open("w"),
        )
        wait_until(lambda: self.admin("show info") != "", "HAProxy to answer")
        # Before its own loop the master loses a signal to reload; systemd waits for its word that it is ready.
        wait_until(lambda: "worker" in self.admin("show proc", "master.sock"), "its master to listen")
        return process

    def restart(self) -> None:
        """As after a power cut: the state file is all that is left."""
        self.process.kill()
        self.process.wait(10)
        wait_until(lambda: self.admin("show info") == "", "HAProxy to be gone")
        self.process = self.run(self.directory / "haproxy.cfg")

    def rows(self) -> dict[str, list[str]]:
        """By name, the state of each server."""
        rows = [line.split() for line in self.admin("show servers state engines").splitlines() if "node" in line]
        return {row[3]: row for row in rows}

    def drained(self) -> set[str]:
        # Field 7 is the administrative state, whose bit 0x01 says "in maintenance by the operator's word".
        return {name for name, row in self.rows().items() if int(row[6]) & 0x01}

    @property
    def engine(self) -> Engine:
        return self.engines[0]

    def admin(self, command: str, socket: str = "haproxy/admin.sock") -> str:
        try:
            return str(RELOAD.HAProxy(str(self.directory / socket)).ask(command))
        except RELOAD.Unavailable:
            return ""

    def reload(self, **options: Any) -> str | None:
        socket, config = (str(self.directory / name) for name in ("haproxy/admin.sock", "haproxy.cfg"))
        problem: str | None = RELOAD.reload(self.process.pid, socket, self.files, config, **options)
        return problem

    @property
    def files(self) -> tuple[str, str]:
        return str(self.directory / "server-state"), str(self.directory / "copy")

    def connect(self, timeout: float = 10) -> http.client.HTTPConnection:
        if self.changes.get("__gateway_has_tls"):
            context = ssl._create_unverified_context()
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=context)
        return http.client.HTTPConnection(self.changes["gateway_bind_address"], self.port, timeout=timeout)

    def ask(
        self, path: str, headers: dict[str, str] | None = None, body: bytes | None = None, method: str | None = None
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        connection = self.connect()
        connection.request(method or ("POST" if body is not None else "GET"), path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content or b"{}"), answer.headers

    def log_lines(self, holding: str) -> str:
        """Everything logged up to a line that holds the text."""
        seen = ""
        while holding not in seen:
            seen += self.logs.recv(65536).decode() + "\n"
        return seen

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        for engine in self.engines:
            engine.shutdown()
            engine.server_close()
        self.logs.close()


RELOAD = load_file(ROOT / "roles/gateway/files/gateway-reload.py", "gateway_reload")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Edge]]:
    edges: list[Edge] = []

    def start_edge(**options: Any) -> Edge:
        edges.append(Edge(tmp_path, **options))
        return edges[-1]

    yield start_edge
    for edge in edges:
        edge.stop()


@pytest.fixture
def edge(start: Callable[..., Edge]) -> Edge:
    return start()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
        {"x-api-key": "dummy", "Authorization": f"Bearer {KEY}"},
    ],
)
def test_a_known_key_is_let_through_and_taken_off(edge: Edge, headers: dict[str, str]) -> None:
    assert edge.ask("/v1/models", headers)[0] == 200
    ((_, path, seen, _),) = edge.engine.asked()
    assert path == "/v1/models"
    assert KEY not in str(seen) and "authorization" not in seen and "x-api-key" not in seen
    assert seen["x-forwarded-for"] == "127.0.0.1"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {OTHER_KEY}"},
        {"x-api-key": OTHER_KEY},
        {"x-api-key": ""},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
        {"x-api-key": hashlib.sha256(KEY.encode()).hexdigest().upper()},
        {"x-api-key": KEY[:-1]},
    ],
)
def test_another_key_is_refused_as_both_apis_do(edge: Edge, headers: dict[str, str]) -> None:
    status, body, answer = edge.ask("/v1/chat/completions", headers, b"{}")
    assert status == 401
    assert answer["Content-Type"] == "application/json" and answer["WWW-Authenticate"] == "Bearer"
    assert body["type"] == "error"
    assert body["error"]["code"] == "invalid_api_key" and body["error"]["type"] == "authentication_error"
    assert edge.engine.asked() == []


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/tokenize",
        "/invocations",
        "/",
        "/v1",
        "/v2/models",
        "/health/",
        "/v1/../metrics",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/loads",
        "/v1//loads",
        "/v1/%6coads",
        "//v1/loads",
        "/v1/%2e%2e/metrics",
        "/v1/%2E%2E%2Fmetrics",
        "//metrics",
        "/v1/..",
        "/load",
    ],
)
@pytest.mark.parametrize("auth", ["keys", "none"])
def test_other_paths_are_refused_even_with_the_key(start: Callable[..., Edge], path: str, auth: str) -> None:
    edge = start(gateway_auth=auth)
    status, body, _ = edge.ask(path, {"x-api-key": KEY})
    assert (status, body["error"]["code"]) == (403, "path_not_allowed")
    assert edge.engine.asked() == []


def test_an_open_edge_asks_for_no_key(start: Callable[..., Edge]) -> None:
    edge = start(gateway_auth="none")
    assert edge.ask("/v1/models")[0] == 200
    assert edge.ask("/v1/models", {"x-api-key": "dummy"})[0] == 200


def test_health_needs_no_key_and_is_answered_by_the_edge(edge: Edge) -> None:
    assert edge.ask("/health")[:2] == (200, {"status": "ok"})


def test_a_node_out_of_rotation_takes_the_checks_of_a_rollout_alone(edge: Edge) -> None:
    edge.admin("set server engines/node0 state drain")
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 503
    assert edge.ask("/health")[0] == 503
    probe = {"X-Glm-Probe": "1"}
    wait_until(lambda: edge.ask("/health", probe)[0] == 200, "the engine to be up")
    assert edge.ask("/v1/models", {"x-api-key": KEY, **probe})[0] == 200
    assert edge.ask("/v1/models", probe)[0] == 401
    assert "x-glm-probe" not in edge.engine.asked()[-1][2]


class Agent(socketserver.ThreadingTCPServer):
    """Answers HAProxy's agent-check, as engine-launch does."""

    daemon_threads = True
    says = b"down #warming up\n"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), AgentHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class AgentHandler(socketserver.StreamRequestHandler):
    server: Agent

    def handle(self) -> None:
        self.wfile.write(self.server.says)


def test_an_engine_that_is_not_warm_takes_the_checks_of_a_rollout_alone(start: Callable[..., Edge]) -> None:
    with Agent() as agent, Engine() as engine:
        node = {"name": "node0", "address": "127.0.0.1", "port": engine.server_port}
        edge = start(engines=0, gateway_servers=[{**node, "agent_port": agent.server_address[1]}])
        wait_until(lambda: edge.ask("/health")[0] == 503, "the agent's word")
        assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 503
        probe = {"X-Glm-Probe": "1"}
        wait_until(lambda: edge.ask("/health", probe)[0] == 200, "the engine to be up")
        assert edge.reload() is None
        wait_until(lambda: edge.ask("/health")[0] == 503, "the new worker to ask the agent")
        agent.says = b"up\n"
        wait_until(lambda: edge.ask("/health")[0] == 200, "the agent's word")
        assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200
        agent.shutdown()
        engine.shutdown()


def test_without_an_agent_the_health_alone_counts(start: Callable[..., Edge]) -> None:
    """The launcher that runs an engine may be of before."""
    with Engine() as engine:
        node = {"name": "node0", "address": "127.0.0.1", "port": engine.server_port, "agent_port": free_port()}
        edge = start(engines=0, gateway_servers=[node])
        wait_until(lambda: "L4CON" in edge.admin("show stat"), "a check by the agent")
        assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200
        engine.shutdown()


def test_a_gateway_asks_another_node_where_one_has_no_engine(start: Callable[..., Edge]) -> None:
    edge = start(engines=2, gateway_edges=True)
    edge.engines[0].refuses = True
    answers = [edge.ask("/v1/models", {"x-api-key": KEY}) for _ in range(20)]
    assert {status for status, _, _ in answers} == {200}
    assert {answer["X-Glm-Node"] for _, _, answer in answers} == {"node1"}
    # The node's own edge asks for the key again.
    assert edge.engines[1].asked()[0][2]["x-api-key"] == KEY


@pytest.mark.parametrize(("path", "status"), [("/v1/death", 502), ("/v1/full", 502)])
def test_what_an_engine_has_taken_is_sent_to_no_other(start: Callable[..., Edge], path: str, status: int) -> None:
    """A request that kills its engine would kill one after another."""
    with Engine() as first, Engine() as second:
        node = start(engines=1, gateway_servers=[{"name": "n", "address": "127.0.0.1", "port": first.server_port}])
        assert node.ask(path, {"x-api-key": KEY}, b"{}")[0] == status
        assert len(first.asked()) == 1
        for engine in (first, second):
            engine.requests.clear()
        servers = [
            {"name": f"n{n}", "address": "127.0.0.1", "port": e.server_port} for n, e in enumerate((first, second))
        ]
        write_files(node.directory, **{**node.changes, "gateway_servers": servers, "gateway_edges": True})
        assert node.reload() is None
        if path == "/v1/death":  # a 503 would be a node's own word here
            assert node.ask(path, {"x-api-key": KEY}, b"{}")[0] == status
            assert len(first.asked() + second.asked()) == 1
        first.shutdown()
        second.shutdown()


# --- limits ---


def in_background(edge: Edge, path: str, answers: list[int], session: str = "") -> threading.Thread:
    def ask() -> None:
        headers = {"x-api-key": KEY} | ({"x-session-id": session} if session else {})
        answers.append(edge.ask(path, headers, b"{}")[0])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


def test_an_engine_gets_as_many_requests_as_it_may_have_and_few_wait(start: Callable[..., Edge]) -> None:
    edge = start(gateway_max_requests=3, gateway_max_queue=2)
    answers: list[int] = []
    threads = [in_background(edge, "/v1/held", answers) for _ in range(3)]
    wait_until(lambda: len(edge.engine.asked()) == 3, "the engine to be asked")
    threads += [in_background(edge, "/v1/held", answers) for _ in range(2)]
    wait_until(lambda: "engines,BACKEND,2," in edge.admin("show stat"), "two to wait")
    status, body, headers = edge.ask("/v1/models", {"x-api-key": KEY})
    assert (status, body["error"]["code"], body["error"]["type"]) == (503, "overloaded", "overloaded_error")
    assert headers["Retry-After"] == "5"
    # A rollout's own checks, health and the admin socket are not held up.
    assert edge.ask("/v1/models", {"x-api-key": KEY, "X-Glm-Probe": "1"})[0] == 200
    assert edge.ask("/health")[0] == 200
    edge.engine.held.set()
    for thread in threads:
        thread.join(10)
    assert answers == [200] * 5 and len([path for _, path, *_ in edge.engine.asked() if path == "/v1/held"]) == 5


def test_one_source_cannot_take_all_connections(start: Callable[..., Edge]) -> None:
    """Loopback is trusted, as a rollout's checks come from there: another address of this machine is asked."""
    address = own_address()
    edge = start(gateway_bind_address=address, gateway_source_connections=20)
    idle = [attempt(address, edge.port) for _ in range(60)]
    time.sleep(0.2)
    assert len([connection for connection in idle if is_open(connection)]) == 20
    assert health(address, edge.port) == 0 and edge.admin("show info")
    for connection in idle:
        connection.close()
    wait_until(lambda: health(address, edge.port) == 200, "the places to be free again")


def attempt(address: str, port: int) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(5)
    with contextlib.suppress(ConnectionError):
        connection.connect((address, port))
    return connection


def own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.18.0.2", 9))
        return str(probe.getsockname()[0])


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def health(address: str, port: int) -> int:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def test_a_source_that_goes_on_with_a_wrong_key_is_told_to_wait(start: Callable[..., Edge]) -> None:
    """Others behind the same address go on."""
    address = own_address()
    edge = start(gateway_bind_address=address, gateway_source_wrong_keys=10)

    def ask(key: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(address, edge.port, timeout=5)
        connection.request("GET", "/v1/models", headers={"x-api-key": key})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer

    seen = [ask(OTHER_KEY) for _ in range(15)]
    assert [answer.status for answer in seen] == [401] * 10 + [429] * 5
    assert seen[-1].headers["Retry-After"] == "10"
    assert ask(KEY).status == 200 and health(address, edge.port) == 200


def test_connections_without_a_byte_end(start: Callable[..., Edge]) -> None:
    """With a bound of seconds, where a real one is a minute; a client that waits for its answer may be silent."""
    edge = start(gateway_client_timeout="1s", __gateway_has_tls=True, __gateway_certificate_digest="0" * 64)
    answers: list[int] = []
    waiting = in_background(edge, "/v1/held", answers)
    silent = socket.create_connection(("127.0.0.1", edge.port), timeout=10)
    assert silent.recv(1) == b""  # no ClientHello came
    time.sleep(2)
    edge.engine.held.set()
    waiting.join(10)
    assert answers == [200]


def test_a_request_with_many_headers_passes(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not HTTP at all gets HAProxy's own 400, whose HTML cannot be changed."""
    monkeypatch.setattr(http.client, "_MAXHEADERS", 300)  # of Python's own server
    assert edge.ask("/v1/models", {"x-api-key": KEY, **{f"x-{number}": "1" for number in range(150)}})[0] == 200
    with socket.create_connection(("127.0.0.1", edge.port), timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert len(edge.engine.asked()) == 1


def test_a_client_of_http2_may_wait_for_its_answer_too(start: Callable[..., Edge]) -> None:
    edge = start(gateway_client_timeout="1s", __gateway_has_tls=True, __gateway_certificate_digest="0" * 64)
    command = ["curl", "-sk", "--http2", "-w", "%{http_version} %{http_code}", "-H", f"x-api-key: {KEY}", "-d", "{}"]
    with subprocess.Popen([*command, f"https://127.0.0.1:{edge.port}/v1/held"], stdout=subprocess.PIPE) as client:
        wait_until(lambda: bool(edge.engine.asked()), "the engine to be asked")
        time.sleep(3)
        edge.engine.held.set()
        assert client.communicate(timeout=20)[0] == b"{}2 200"


# --- browsers ---

ORIGIN = "https://chat.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


def test_a_browser_may_ask_from_an_allowed_origin_alone(start: Callable[..., Edge]) -> None:
    edge = start(gateway_cors_origins=["http://localhost:3000", ORIGIN])
    status, _, headers = edge.ask("/v1/chat/completions", PREFLIGHT, method="OPTIONS")
    assert status == 204 and headers["Access-Control-Allow-Origin"] == ORIGIN
    assert headers["Access-Control-Allow-Headers"] == "authorization" and headers["Vary"] == "Origin"
    assert edge.engine.asked() == []
    # An answer and a refusal carry it too, or the page could not read them.
    assert edge.ask("/v1/models", {"Origin": ORIGIN, "x-api-key": KEY})[2]["Access-Control-Allow-Origin"] == ORIGIN
    assert edge.ask("/v1/models", {"Origin": ORIGIN})[2]["Access-Control-Allow-Origin"] == ORIGIN
    assert "origin" not in edge.engine.asked()[-1][2]
    other = edge.ask("/v1/models", {"Origin": "https://evil.example", "x-api-key": KEY})[2]
    assert other["Access-Control-Allow-Origin"] is None
    assert edge.ask("/v1/models", {**PREFLIGHT, "Origin": "https://evil.example"}, method="OPTIONS")[0] == 401


def test_without_a_setting_no_browser_may_ask(edge: Edge) -> None:
    status, _, headers = edge.ask("/v1/chat/completions", PREFLIGHT, method="OPTIONS")
    assert status == 401 and headers["Access-Control-Allow-Origin"] is None


def test_an_engine_that_is_down_gives_503_with_a_time_to_come_back(start: Callable[..., Edge]) -> None:
    edge = start()
    edge.engine.shutdown()
    edge.engine.server_close()
    wait_until(lambda: edge.ask("/health")[0] == 503, "the health check to see it", 20)
    status, body, answer = edge.ask("/v1/models", {"x-api-key": KEY})
    assert (status, body["error"]["code"], answer["Retry-After"]) == (503, "engine_unavailable", "30")


def test_a_stream_passes_as_it_comes(edge: Edge) -> None:
    connection = edge.connect()
    connection.request("POST", "/v1/stream", b"{}", {"x-api-key": KEY})
    answer = connection.getresponse()
    moments = []
    while answer.read1(65536):
        moments.append(time.monotonic())
    assert len(moments) >= 5
    assert moments[4] - moments[0] > 0.25


def test_a_body_of_many_megabytes_passes(edge: Edge) -> None:
    assert edge.ask("/v1/messages", {"x-api-key": KEY}, b"x" * (48 << 20))[0] == 200
    assert edge.engine.asked()[0][3] == 48 << 20


def test_a_client_that_leaves_frees_the_engine(edge: Edge) -> None:
    connection = edge.connect()
    connection.request("POST", "/v1/slow", b"{}", {"x-api-key": KEY})
    wait_until(lambda: bool(edge.engine.asked()), "the engine to be asked")
    connection.close()
    assert edge.engine.client_left.wait(5)


def test_no_log_holds_a_key_or_a_query(edge: Edge) -> None:
    edge.ask(f"/v1/models?api_key={KEY}", {"Authorization": f"Bearer {KEY}"})
    edge.ask("/v1/models", {"x-api-key": OTHER_KEY})
    edge.ask("/v1/last", {"x-api-key": KEY})
    seen = edge.log_lines("/v1/last")
    assert KEY not in seen and OTHER_KEY not in seen and "api_key" not in seen
    # Whose key it was can still be told.
    lines = [json.loads(line[line.index("{") :]) for line in seen.splitlines() if "{" in line]
    known = hashlib.sha256(KEY.encode()).hexdigest()[:8]
    assert [(line["key"], line["path"]) for line in lines] == [
        (known, "/v1/models"), ("-", "/v1/models"), (known, "/v1/last")
    ]  # fmt: skip
    assert KEY not in (edge.directory / "stderr").read_text()


def test_tls(start: Callable[..., Edge]) -> None:
    edge = start(__gateway_has_tls=True, __gateway_certificate_digest="0" * 64)
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200
    for name, taken in (
        ("AES128-SHA", False),
        ("ECDHE-ECDSA-AES128-SHA", False),
        ("ECDHE-ECDSA-AES128-GCM-SHA256", True),
    ):
        context = ssl._create_unverified_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(f"{name}:@SECLEVEL=0")
        with socket.create_connection(("127.0.0.1", edge.port), timeout=5) as raw:
            try:
                with context.wrap_socket(raw):
                    assert taken, name
            except ssl.SSLError:
                assert not taken, name
    plain = http.client.HTTPConnection("127.0.0.1", edge.port, timeout=5)
    plain.request("GET", "/health")
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.getresponse()


def test_a_reload_keeps_what_was_drained_and_takes_new_keys_without_a_cut(start: Callable[..., Edge]) -> None:
    edge = start(engines=2, gateway_edges=True)
    edge.admin("set server engines/node1 state maint")
    stream = edge.connect()
    stream.request("POST", "/v1/stream", b"{}", {"x-api-key": KEY})
    answer = stream.getresponse()
    write_files(edge.directory, **edge.changes, __gateway_edge_keys=[entry(OTHER_KEY)])
    problem = edge.reload()
    assert problem is None
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 401
    assert edge.ask("/v1/models", {"x-api-key": OTHER_KEY})[0] == 200
    assert edge.drained() == {"node1"}
    assert answer.read().count(b"data:") == 5


def test_a_reload_takes_a_new_port_and_keeps_what_was_drained(start: Callable[..., Edge]) -> None:
    """HAProxy would go on with the port and the TLS of the state that it is given."""
    edge = start(engines=2, gateway_edges=True)
    edge.admin("set server engines/node1 state maint")
    servers = edge.changes["gateway_servers"]
    servers[0]["port"], servers[1]["port"] = servers[1]["port"], servers[0]["port"]
    servers[1]["tls"] = True
    write_files(edge.directory, **edge.changes)
    assert edge.reload() is None
    assert {name: (int(row[18]), row[20]) for name, row in edge.rows().items()} == {
        "node0": (servers[0]["port"], "0"),
        "node1": (servers[1]["port"], "1"),
    }
    assert edge.drained() == {"node1"}
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200


# --- the state of the servers, on the disk ---

DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut off": lambda text: text[:-40],
    "a row short": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    "another bit": lambda text: text.replace(" 0 1 1 1 ", " 0 0 1 1 "),
    "zeroes": lambda text: "\0" * len(text),
}


class State:
    """The files, of two servers, one of them drained."""

    def __init__(self, directory: Path) -> None:
        (directory / "lib").mkdir()
        self.file, self.copy, self.config = (
            directory / "server-state",
            directory / "lib/copy",
            directory / "haproxy.cfg",
        )
        self.config.write_text("backend engines\n    server node0 10.0.0.1:80\n    server node1 a.example:81 check\n")
        rows = RELOAD.drained(self.config.read_text()).replace(" node0 - 0 1 ", " node0 - 2 0 ")
        self.files = str(self.file), str(self.copy)
        self.text = rows.replace("1\n", "1\n# be_id be_name\n", 1)

    def keep(self) -> None:
        RELOAD.keep(self.text, self.files)

    def check(self) -> str | None:
        problem: str | None = RELOAD.check_state(self.files, str(self.config))
        return problem

    def drained(self) -> list[bool]:
        return [row.split()[6] == "1" for row in self.file.read_text().splitlines() if " engines " in row]


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path)


def test_a_state_that_is_whole_is_left_alone(state: State) -> None:
    assert state.check() is None
    assert not state.file.exists()
    state.keep()
    before = state.file.read_text()
    state.copy.unlink()
    assert (state.check(), state.file.read_text()) == (None, before)


def test_a_state_of_a_release_before_is_whole_without_a_seal(state: State) -> None:
    state.file.write_text(state.text)
    assert (state.check(), state.file.read_text()) == (None, state.text)
    state.file.write_text(state.text[:-20])
    assert "all servers are drained" in str(state.check())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_taken_from_its_copy(state: State, damage: str) -> None:
    state.keep()
    state.file.write_text(DAMAGES[damage](state.file.read_text()))
    assert state.check() == f"{state.file} was damaged: taken from {state.copy}"
    assert state.drained() == [False, True]
    state.file.unlink()
    assert state.check() == f"{state.file} was lost: taken from {state.copy}"
    assert state.drained() == [False, True]


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_nobody_knows_who_was_drained_all_are(state: State, damage: str) -> None:
    state.keep()
    for file in (state.file, state.copy):
        file.write_text(DAMAGES[damage](file.read_text()))
    assert "all servers are drained. Put them back with playbooks/undrain.yml" in str(state.check())
    assert state.drained() == [True, True]
    assert state.check() is None


def test_the_state_is_on_the_disk_before_a_drain_is_done(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    state.keep()
    places = [path for file in (state.file, state.copy) for path in (f"{file}.new", str(file.parent))]
    assert synced == places


def test_what_was_drained_stays_so_after_a_power_cut(start: Callable[..., Edge]) -> None:
    edge = start(engines=2, gateway_edges=True)
    config = str(edge.directory / "haproxy.cfg")
    edge.admin("set server engines/node1 state maint")
    RELOAD.save_state(str(edge.directory / "haproxy/admin.sock"), edge.files, config)
    edge.restart()
    assert edge.drained() == {"node1"}
    for damaged, drained in ((1, {"node1"}), (2, {"node0", "node1"})):
        for file in edge.files[:damaged]:
            Path(file).write_text("1\n")
        assert RELOAD.check_state(edge.files, config)
        edge.restart()
        assert edge.drained() == drained
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 503
    edge.admin("set server engines/node0 state ready")
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200


def test_a_name_is_looked_up_anew(start: Callable[..., Edge]) -> None:
    """HAProxy by itself would go on with the address of the state file for ever."""
    names = {"node0": "localhost", "node1": "gone.invalid", "node2": "new.invalid"}
    edge = start(
        engines=1, gateway_edges=True, gateway_servers=[{"name": n, "address": a, "port": 9} for n, a in names.items()]
    )
    rows = {
        row.split()[3]: row for row in RELOAD.drained((edge.directory / "haproxy.cfg").read_text()).splitlines()[1:]
    }
    known = [rows[name].replace(" - ", " 127.0.0.9 ", 1) for name in ("node0", "node1")]
    RELOAD.keep("\n".join(["1", *known]) + "\n", edge.files)
    edge.restart()
    assert edge.rows()["node0"][4] in ("127.0.0.1", "::1")
    assert edge.rows()["node1"][4] == "127.0.0.9"
    assert edge.rows()["node2"][4] == "-"


# --- connections without a byte ---


def keepalive(local: int = 0, remote: int = 0) -> list[float]:
    """Of the connections of a port, in how many seconds the kernel sends a keep-alive."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = [row for row in rows if row[3] == "01" and (local or remote) in (int(row[1][9:], 16), int(row[2][9:], 16))]
    timers = [row[5].split(":") for row in found if int(row[1 if local else 2][9:], 16) == (local or remote)]
    return [int(left, 16) / os.sysconf("SC_CLK_TCK") for kind, left in timers if kind == "02"]


def test_a_connection_without_a_byte_is_kept_alive_on_both_sides(edge: Edge) -> None:
    connection = edge.connect()
    connection.request("POST", "/v1/slow", b"{}", {"x-api-key": KEY})
    wait_until(lambda: bool(edge.engine.asked()), "the engine to be asked")
    for timers in (keepalive(local=edge.port), keepalive(remote=edge.engine.server_port)):
        assert timers and max(timers) <= 30
    connection.close()


def test_a_node_that_hangs_is_seen_by_a_gateway_before_long(start: Callable[..., Edge]) -> None:
    edge = start(engines=2, gateway_edges=True)
    wait_until(lambda: len([path for _, path, *_ in edge.engine.requests if path == "/health"]) > 0, "a check")
    edge.engine.hangs.set()
    wait_until(lambda: edge.rows()["node0"][5] == "0", "the health check to see it", 25)
    edge.engine.hangs.clear()


def test_an_engine_has_its_time_to_answer_a_check() -> None:
    assert "timeout check 30s" in template("haproxy.cfg.j2")
    assert "timeout check 3s" in template("haproxy.cfg.j2", **VARIANTS["a gateway"])


def test_a_configuration_that_haproxy_refuses_leaves_the_old_one(edge: Edge) -> None:
    config = edge.directory / "haproxy.cfg"
    config.write_text(config.read_text().replace("default_backend engines", "default_backend nowhere"))
    problem = edge.reload(timeout=2)
    assert problem and "old configuration" in problem
    assert edge.ask("/v1/models", {"x-api-key": KEY})[0] == 200


def test_the_program_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(RELOAD, "CONFIG", str(tmp_path / "absent"))
    monkeypatch.setattr("sys.argv", ["gateway-reload", str(2**22 - 1)])
    assert RELOAD.main() == 1
    assert capsys.readouterr().err.startswith("glm: error: HAProxy: it was not reloaded: ")


def test_the_unit_takes_our_settings(tmp_path: Path) -> None:
    unit = Path("/usr/lib/systemd/system/haproxy.service")
    lines = template("haproxy-glm.conf.j2").replace("/opt/glm/bin/gateway-reload", "/bin/true")
    (tmp_path / "haproxy.service").write_text(unit.read_text() + lines)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "haproxy.service"], capture_output=True, text=True, check=False
    )
    assert "haproxy.service" not in done.stderr.replace("Failed to create", ""), done.stderr
    assert exposure(tmp_path / "haproxy.service") <= MOST


def test_the_last_one_to_ask_is_the_last_one_to_write(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nodes of one wave are taken out at once: each asks for all servers, and writes all of them."""
    monkeypatch.setattr(RELOAD, "SOCKET", str(edge.directory / "haproxy/admin.sock"))
    monkeypatch.setattr(RELOAD, "STATE_FILES", edge.files)
    monkeypatch.setattr(RELOAD, "CONFIG", str(edge.directory / "haproxy.cfg"))
    monkeypatch.setattr(RELOAD, "locked", partial(RELOAD.locked, str(tmp_path / "lock")))
    monkeypatch.setattr("sys.argv", ["gateway-reload", "--save"])
    with ThreadPoolExecutor(8) as pool:
        codes = [run.result() for run in [pool.submit(RELOAD.main) for _ in range(100)]]
    assert codes == [0] * 100
    assert RELOAD.kept(edge.files[0]) == RELOAD.kept(edge.files[1]) != ""
