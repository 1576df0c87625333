"""node_info's parsers, and its probes against a server of our own."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ansible_collections.glm.fleet.plugins.action import node_info as action
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import cdi
from ansible_collections.glm.fleet.plugins.modules import node_info


class Answers(BaseHTTPRequestHandler):
    """Answers with the status that is the path."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    http = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize(
    ("status", "ok"), [(200, True), (302, True), (401, True), (404, True), (429, True), (503, False)]
)
def test_any_answer_below_500_will_do(server: str, status: int, ok: bool) -> None:
    probe = node_info.probe(f"{server}/{status}", 5, node_info.Way())
    assert (probe["ok"], probe["status"]) == (ok, status)


def test_nobody_answers() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        probe = node_info.probe(f"http://127.0.0.1:{closed.getsockname()[1]}/", 2, node_info.Way())
    assert (probe["ok"], probe["status"], probe["error"]) == (False, None, "Connection refused")


def test_an_address_that_is_none() -> None:
    assert node_info.probe("nonsense", 1, node_info.Way())["ok"] is False


class Hub(BaseHTTPRequestHandler):
    """A hub that sends a client on to a CDN, as it does for large files."""

    cdn = ""
    bytes: str | None = None

    def do_GET(self) -> None:
        Hub.bytes = self.headers["Range"]
        self.send_response(302)
        self.send_header("Location", self.cdn)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_file_is_asked_for_where_the_hub_sends_a_client_on_to(server: str) -> None:
    http = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/file"
    try:
        Hub.cdn = f"{server}/200"
        assert node_info.probe(url, 5, node_info.Way(), follow=True)["ok"]
        assert Hub.bytes == "bytes=0-0", "the file itself may have gigabytes"
        Hub.cdn = f"{server}/503"
        assert node_info.probe(url, 5, node_info.Way(), follow=True)["ok"], "the download waits that out"
        Hub.cdn = "http://127.0.0.1:1/file"
        assert node_info.probe(url, 5, node_info.Way())["ok"], "the hub itself answers"
        said = node_info.probe(url, 5, node_info.Way(), follow=True)["error"]
        assert said == "Connection refused, at 127.0.0.1:1, where it leads to"
    finally:
        http.shutdown()
        http.server_close()


class Proxy(Answers):
    """A proxy: the request line has the whole address. It counts."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.path = "/200"
        super().do_GET()


def test_an_address_is_tried_by_the_proxy_whatever_the_environment_says(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    proxy = f"http://127.0.0.1:{http.server_port}"
    Proxy.asked.clear()
    try:
        assert node_info.probe("http://hub.example.com/", 5, node_info.Way(proxy))["ok"]
        assert node_info.probe(f"{server}/200", 5, node_info.Way(proxy, "127.0.0.0/8"))["ok"]
        monkeypatch.setenv("http_proxy", proxy)
        assert node_info.probe(f"{server}/200", 5, node_info.Way())["ok"]
    finally:
        http.shutdown()
        http.server_close()
    assert Proxy.asked == ["http://hub.example.com/"]


@pytest.mark.parametrize(
    ("host", "direct"),
    [
        *[("mirror.example.com", True), ("example.com", True), ("notexample.com", False), ("10.1.2.3", True)],
        *[("11.1.2.3", False), ("hub", True), ("2001:db8::1", True)],
    ],
)
def test_hosts_without_a_proxy_are_known_as_docker_knows_them(host: str, direct: bool) -> None:
    assert node_info.without_proxy(host, " .example.com, 10.0.0.0/8,hub,2001:db8::/32") is direct


def test_listening_ports_name_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        seen = node_info.ports([number], {})[str(number)]
    assert (seen["listening"], seen["address"]) == (True, "127.0.0.1")
    assert seen["pid"] is not None and seen["process"]


def test_a_server_that_closes_a_connection_meanwhile_still_holds_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    readlink = os.readlink
    with socket.create_server(("127.0.0.1", 0)) as listener, Path(os.devnull).open() as other:

        def closing(path: str) -> str:
            if path == f"/proc/{os.getpid()}/fd/{other.fileno()}":
                raise FileNotFoundError(path)
            return readlink(path)

        monkeypatch.setattr(os, "readlink", closing)
        number = listener.getsockname()[1]
        seen = node_info.ports([number], {})[str(number)]
    assert seen["pid"] == os.getpid()


def test_free_port() -> None:
    assert node_info.ports([1], {})["1"]["listening"] is False


def test_listener_on_ipv6() -> None:
    table = (
        "heading\n   0: 00000000000000000000000001000000:1F40 00000000000000000000000000000000:0000 0A 0 0 0 0 0 77 1\n"
    )
    assert node_info.parse_listeners(table) == [(8000, "::1", "77")]


def test_unit_of_a_process() -> None:
    assert node_info.parse_unit("0::/system.slice/haproxy.service\n") == "haproxy.service"
    assert node_info.parse_unit(f"0::/docker/{'a' * 64}/system.slice/haproxy.service\n") == "haproxy.service"
    assert node_info.parse_unit("0::/\n") is None


def test_packages_that_are_removed_do_not_count() -> None:
    listing = "haproxy\tinstalled\t2.6.12-1\ndocker.io\tconfig-files\t20.10\nx\tnot-installed\t\n"
    assert node_info.parse_packages(listing) == {"haproxy": "2.6.12-1"}


def test_docker_tells_where_images_lie() -> None:
    assert node_info.docker({"DockerRootDir": "/data/docker"}, {}, False)["image_root"] == "/data/docker"
    assert node_info.docker(None, {}, False)["image_root"] is None


def test_units() -> None:
    shown = node_info.parse_units(
        "Id=glm-engine.service\nLoadState=loaded\nActiveState=activating\nSubState=start\nUnitFileState=enabled\n"
        "Result=success\nStatusText=loading weights = 40 %\nMainPID=99\nNRestarts=1\nStateChangeTimestamp=@1700000000\n"
        "\nId=x.service\nLoadState=not-found\nActiveState=inactive\nSubState=dead\nUnitFileState=\nMainPID=0\n"
    )
    engine = shown["glm-engine.service"]
    assert (engine["active"], engine["main_pid"], engine["n_restarts"]) == ("activating", 99, 1)
    assert (engine["status_text"], engine["since"]) == ("loading weights = 40 %", 1700000000)
    assert (shown["x.service"]["load"], shown["x.service"]["enabled"]) == ("not-found", None)


CDI_YAML = """---
cdiVersion: 0.5.0
containerEdits:
  env:
  - NVIDIA_VISIBLE_DEVICES=void
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: "0"
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: all
kind: nvidia.com/gpu
"""


def test_cdi_devices() -> None:
    assert cdi.parse(CDI_YAML) == ["nvidia.com/gpu=0", "nvidia.com/gpu=all"]
    as_json = {"kind": "nvidia.com/gpu", "devices": [{"name": "all"}]}
    assert cdi.parse(json.dumps(as_json)) == ["nvidia.com/gpu=all"]
    assert cdi.parse("") == []


def test_open_files_limit() -> None:
    assert (
        node_info.parse_open_files("Limit  Soft  Hard  Units\nMax open files            1024   20000   files\n")
        == 20000
    )
    assert node_info.parse_open_files("Max open files            unlimited            unlimited  files\n") is None


def test_capability_to_raise_limits() -> None:
    assert node_info.may_raise_limits("CapEff:\t000001ffffffffff\n") is True
    assert node_info.may_raise_limits("CapEff:\t000001fffeffffff\n") is False
    assert node_info.may_raise_limits("") is False


def test_memory() -> None:
    assert node_info.parse_memory("MemTotal:       2048 kB\nMemFree: 1 kB\n") == 2 * 1024**2


def test_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    disk = node_info.disk(str(tmp_path / "a" / "b"))
    assert disk["total_bytes"] > 0
    assert str(tmp_path).startswith(disk["mount"])
    assert disk["writable"] is True


def test_storage_that_does_not_answer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to it never returns, as with NFS whose server is gone, or ends in an error, as with a stale handle."""
    dead = """
import errno, os, time
real = os.stat
def stat(path):
    if "hung" in path: time.sleep(60)
    if "stale" in path: raise OSError(errno.ESTALE, "Stale file handle")
    return real(path)
os.stat = stat
"""
    monkeypatch.setattr(node_info, "STORAGE_PROBE", dead + node_info.STORAGE_PROBE)
    (tmp_path / "good").touch()
    places = [str(tmp_path / name) for name in ("hung", "stale", "good/absent", "none/at/all")]
    began = time.monotonic()
    assert node_info.dead_storage(places, 2) == {places[0]: "no answer within 2 s", places[1]: "Stale file handle"}
    assert time.monotonic() - began < 20
    assert node_info.dead_storage(places[2:], 20) == {}
    assert node_info.dead_storage([]) == {}


def test_nothing_is_read_of_dead_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, state = str(tmp_path / "dead"), str(tmp_path / "dead/state.json")
    (tmp_path / "dead").mkdir()
    monkeypatch.setattr(node_info, "dead_storage", lambda places: dict.fromkeys(set(places) & {dead, state}, "hung"))
    patterns = [f"{tmp_path}/*", f"{dead}/x", "/etc/glm/*"]
    seen = node_info.collect(options(paths=[dead, "/"], models=[dead], state_file=state, managed=patterns))
    assert seen["storage"] == {dead: "hung"}
    assert (dead in seen["disks"], "/" in seen["disks"]) == (False, True)
    assert (seen["models"], seen["state"]) == ({}, None)
    assert seen["managed"]["patterns"] == ["/etc/glm/*"]


@pytest.mark.parametrize(
    ("pattern", "comes"),
    [
        ("/var/lib/glm/*/", True),
        ("/var/lib/glm/models", True),
        ("/var/lib/glm/models/zai--x/*", True),
        ("/var/lib/glm/modelsx", False),
        ("/etc/glm/*", False),
    ],
)
def test_patterns_that_come_to_a_place(pattern: str, comes: bool) -> None:
    assert node_info.comes_to(pattern, "/var/lib/glm/models") is comes
    assert node_info.comes_to(pattern, "/")


def test_names_are_resolved() -> None:
    assert node_info.resolve("192.0.2.7") == ["192.0.2.7"]
    assert node_info.resolve("localhost") == ["127.0.0.1"]
    assert node_info.resolve("no-such-host.invalid") == []


def test_model(tmp_path: Path) -> None:
    directory = tmp_path / "revision"
    assert node_info.model(str(directory)) == {
        "complete": False,
        "manifest_sha256": None,
        "revision": None,
        "partial_bytes": 0,
    }
    partial = tmp_path / "revision.partial"
    partial.mkdir()
    (partial / "shard").write_bytes(b"x" * 65536)
    assert node_info.model(str(directory))["partial_bytes"] >= 65536
    directory.mkdir()
    files = [{"path": "shard", "size": 3}, {"path": "more/config", "size": 2}]
    (directory / ".glm-manifest.json").write_text(json.dumps({"sha256": "abc", "revision": "r", "files": files}))
    assert not node_info.model(str(directory))["complete"]
    (directory / "more").mkdir()
    (directory / "more/config").write_bytes(b"{}")
    (directory / "shard").write_bytes(b"ab")
    assert not node_info.model(str(directory))["complete"]
    beside = node_info.model(str(directory))["partial_bytes"] - 2  # what is whole needs no room again
    assert beside == sum(path.lstat().st_blocks * 512 for path in partial.iterdir())
    (directory / "shard").write_bytes(b"abc")
    seen = node_info.model(str(directory))
    assert (seen["complete"], seen["manifest_sha256"], seen["revision"]) == (True, "abc", "r")
    (directory / "stray").touch()
    assert not node_info.model(str(directory))["complete"]


def test_release(tmp_path: Path) -> None:
    assert node_info.release(str(tmp_path)) == {"current": None, "previous": None, "ids": []}
    (tmp_path / "releases" / "abc").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/abc")
    assert node_info.release(str(tmp_path)) == {"current": "abc", "previous": None, "ids": ["abc"]}


def test_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert node_info.sha256(str(tmp_path / "x")) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert node_info.sha256(str(tmp_path / "y")) is None


@pytest.mark.parametrize(
    ("begun", "ended", "found"),
    [
        (1000.0, 1001.0, 0.0),
        (1013.0, 1014.0, 0.0),  # asked long before it could be reached
        (1017.0, 1018.0, 3.0),
        (990.0, 991.0, -10.0),
        (986.0, 1001.0, -14.0),  # late, and slow
    ],
)
def test_clock_offset(begun: float, ended: float, found: float) -> None:
    """Asked at 1000, answered at 1015."""
    assert action.offset(begun, ended, 1000.0, 1015.0) == found


def test_a_node_without_cloud_init_is_not_delayed(tmp_path: Path) -> None:
    done = {"finished": True, "waited_seconds": 0}
    assert node_info.cloud_init(600, str(tmp_path / "none")) == done
    (tmp_path / "status.json").touch()
    (tmp_path / "disabled").touch()
    assert node_info.cloud_init(600, str(tmp_path)) == done
    (tmp_path / "disabled").unlink()
    (tmp_path / "result.json").touch()
    assert node_info.cloud_init(600, str(tmp_path)) == done


def test_cloud_init_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "status.json").touch()
    seen = node_info.cloud_init(0.1, str(tmp_path), interval=0.05)
    assert (seen["finished"], seen["waited_seconds"] >= 0.1) == (False, True)
    assert node_info.cloud_init(0, str(tmp_path)) == {"finished": False, "waited_seconds": 0}
    threading.Timer(0.2, (tmp_path / "result.json").touch).start()
    seen = node_info.cloud_init(30, str(tmp_path), interval=0.05)
    assert (seen["finished"], 0 < seen["waited_seconds"] < 30) == (True, True)


def test_gateways_and_name_servers() -> None:
    routes = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth1\t000011AC\t020011AC\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
        "wg0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n"
    )
    assert node_info.parse_gateways(routes) == ["172.17.0.1"]
    assert node_info.parse_gateways("") == []
    text = "# nameserver 10.0.0.1\nnameserver 172.17.0.2\nsearch x\nnameserver  fe80::1%eth0\n"
    assert node_info.parse_name_servers(text) == ["172.17.0.2", "fe80::1%eth0"]


def test_the_controller_is_found_above_sudo(tmp_path: Path) -> None:
    for pid, parent, environment in (
        (30, 20, "SUDO_UID=1000\0"),
        (20, 10, "TERM=x\0SSH_CONNECTION=172.17.8.9 4 5 22\0"),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_text(environment)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 1 1")
    assert node_info.controller_address(str(tmp_path), 30) == "172.17.8.9"
    (tmp_path / "20/environ").write_text("NOT_SSH_CLIENT=1\0")
    assert node_info.controller_address(str(tmp_path), 30) is None


def test_docker_of_a_snap_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert node_info.docker(None, {}, snap=True)["snap"] is True
    assert node_info.docker(None, {}, snap=False)["snap"] is False
    monkeypatch.setattr("shutil.which", lambda name, **_: f"/usr/bin/{name}")
    assert node_info.docker(None, {}, snap=True)["snap"] is False, "Docker's own is there beside"


def options(**given: Any) -> dict[str, Any]:
    lists = ("paths", "ports", "docker_urls", "followed_urls", "no_proxy", "peers", "packages", "images")
    nothing = "/no/such/path"
    return {
        **{name: [] for name in (*lists, "models", "units", "files", "managed")},
        "urls": {},
        "url_timeout": 1,
        "unneeded_urls": {},
        "proxy": "",
        "ca": "",
        "cloud_init_timeout": 0,
        "release_directory": nothing,
        "state_file": nothing,
        **given,
    }


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    seen = node_info.collect(
        options(
            paths=[nothing],
            ports=[1],
            packages=["no-such-package"],
            images=["no/such:image"],
            models=[nothing],
            units=["no-such.service"],
            files=[nothing],
            managed=[nothing],
        )
    )
    assert seen["storage"] == {}
    assert set(seen["units"]) == {"no-such.service"}
    assert isinstance(seen["apt"]["sources"], list)
    assert seen["state"] is None
    assert seen["packages"] == {"no-such-package": None}
    assert seen["images"]["no/such:image"]["present"] is False
    assert seen["units"]["no-such.service"]["active"] in (None, "inactive")
    assert seen["memory_bytes"] > 0
    json.dumps(seen)
