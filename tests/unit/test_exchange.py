"""Nodes that bring a revision together: the role's program, its nginx configuration and the real client of the hub."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import exchange
from share_server import server_config
from small_hub import REPO, REVISION, SHARDS, SmallHub, model, small_hub
from test_weights_fetch import TOTAL, Node
from testbed import crowd

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"  # tests/programs brings it


class Peer(Node):
    """One of three nodes, each with an address on loopback of its own."""

    def __init__(self, path: Path, hub: SmallHub, place: int, port: int) -> None:
        path.mkdir()
        super().__init__(path, hub)
        self.name = f"node{place}"
        self.addresses = {f"node{each}": f"127.0.77.{each}" for each in (1, 2, 3)}
        self.port = port
        self.patience = 30
        self.server: subprocess.Popen[bytes] | None = None
        self.models.mkdir()

    @property
    def settings(self) -> dict[str, Any]:
        share = {"name": self.name, "addresses": self.addresses, "port": self.port, "patience": self.patience}
        return {"share": share, "stall_timeout": 300}

    def serve(self) -> None:
        (self.path / "run").mkdir(exist_ok=True)
        # Where several nodes are one machine, that for Docker is an address of its own too.
        registry = self.addresses[self.name].replace("127.0.", "127.1.")
        text = server_config(self.path / "run", self.models, self.addresses, self.name, self.port, registry=registry)
        if os.geteuid() == 0:
            text += "user root;\n"  # pytest's directories are their owner's alone
        config = self.path / "nginx.conf"
        config.write_text(text)
        with (self.path / "nginx.log").open("wb") as log:
            self.server = subprocess.Popen([NGINX, "-p", self.path, "-c", config], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self.listens():
            assert time.monotonic() < deadline, (self.path / "nginx.log").read_text()
            time.sleep(0.05)

    def listens(self) -> bool:
        try:
            self.ask("/")
        except OSError:
            return False
        return True

    def ask(self, path: str, source: str = "127.0.77.1", method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.addresses[self.name], self.port, 5, (source, 0))
        connection.request(method, path)
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    def stop(self) -> None:
        if self.server:
            self.server.kill()
            self.server.wait()

    def have(self, content: dict[str, bytes]) -> None:
        """A complete revision, as an earlier run left it."""
        self.configure(**self.settings)
        manifest = json.loads((self.path / "weights.json").read_text())["manifest"]
        target = self.models / REVISION
        target.mkdir()
        for name, data in content.items():
            (target / name).write_bytes(data)
        (target / ".glm-manifest.json").write_text(json.dumps(manifest))


def server_port() -> int:
    """Free at all addresses, and below those that the peers' own connections get from the system."""
    while True:
        port = random.randrange(20_000, 32_000)
        with ExitStack() as stack, suppress(OSError):
            for place in (1, 2, 3):
                stack.enter_context(socket.create_server((f"127.0.77.{place}", port)))
            return port


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with small_hub() as server:
        yield server


@pytest.fixture
def peers(tmp_path: Path, hub: SmallHub) -> Iterator[list[Peer]]:
    port = server_port()
    nodes = [Peer(tmp_path / f"node{place}", hub, place, port) for place in (1, 2, 3)]
    yield nodes
    for node in nodes:
        node.stop()


def finish(nodes: list[Peer]) -> list[str]:
    running = [node.start(**node.settings) for node in nodes]
    said = []
    for node, process in zip(nodes, running):
        _, err = process.communicate(timeout=100 * crowd())
        assert process.returncode == 0, err
        content = node.content()
        del content[".glm-manifest.json"]
        assert content == model()
        assert node.names() == {REVISION}
        said.append(err)
    return said


def test_three_nodes_ask_the_hub_for_each_file_once(peers: list[Peer], hub: SmallHub) -> None:
    for peer in peers:
        peer.serve()
    finish(peers)
    assert dict(hub.downloads) == dict.fromkeys(model(), 1)
    came = [peer.sources() for peer in peers]
    assert [sum(sources.values()) for sources in came] == [TOTAL] * 3
    assert sum(sources.get("hub", 0) for sources in came) == TOTAL
    assert sum(sources["peers"] for sources in came) == 2 * TOTAL


def test_a_new_node_gets_everything_from_those_that_serve(peers: list[Peer], hub: SmallHub) -> None:
    for peer in peers:
        peer.serve()
    for peer in peers[:2]:
        peer.have(model())
    finish(peers[2:])
    assert not hub.downloads
    assert peers[2].sources() == {"peers": TOTAL}


def test_a_peer_that_lies_is_named_and_the_file_fetched_elsewhere(peers: list[Peer], hub: SmallHub) -> None:
    for peer in peers:
        peer.serve()
    shard = "model-00002-of-00003.safetensors"
    wrong = model()[shard][:-1] + b"!"
    for peer in peers[:2]:
        peer.have({**model(), shard: wrong})
    (said,) = finish(peers[2:])
    assert f"gave a wrong {shard} (expected sha256" in said
    assert "peer node1 (127.0.77.1)" in said and "peer node2 (127.0.77.2)" in said
    assert dict(hub.downloads) == {shard: 1}
    assert peers[2].sources() == {"hub": len(wrong), "peers": TOTAL - len(wrong)}


def test_peers_that_are_not_there_cost_some_patience_alone(peers: list[Peer], hub: SmallHub) -> None:
    peers[0].serve()
    peers[0].patience = 3
    finish(peers[:1])
    assert dict(hub.downloads) == dict.fromkeys(model(), 1)


def test_what_a_peer_gets_slowly_is_waited_for(peers: list[Peer], hub: SmallHub) -> None:
    """Longer than the patience with a peer that gives no sign of life."""
    for peer in peers:
        peer.serve()
        peer.patience = 4
    hub.pause = 8  # the client waits for 10 s
    finish(peers)
    assert dict(hub.downloads) == dict.fromkeys(model(), 1)


def test_a_peer_with_another_list_of_files_has_nothing(peers: list[Peer], hub: SmallHub) -> None:
    for peer in peers[:2]:
        peer.serve()
    peers[1].have(model())
    marker = peers[1].models / REVISION / ".glm-manifest.json"
    peers[0].patience = 3
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "sha256": "0" * 64}))
    finish(peers[:1])
    assert dict(hub.downloads) == dict.fromkeys(model(), 1)


def test_a_node_whose_file_is_damaged_still_offers_the_others(peers: list[Peer], hub: SmallHub) -> None:
    """Also after a repair that has failed."""
    for peer in peers[:2]:
        peer.serve()
    shard = "model-00002-of-00003.safetensors"
    peers[0].have({**model(), shard: b"damaged"})
    hub.faults["/resolve/"] = (503, {}, 999)
    peers[0].patience = peers[1].patience = 3
    process = peers[0].start(**peers[0].settings)
    _, err = process.communicate(timeout=100 * crowd())
    assert process.returncode == 1 and f"1 of 1 files could not be downloaded, first {shard}" in err, err
    hub.faults.clear()
    finish(peers[1:2])
    assert dict(hub.downloads) == {shard: 1}


def test_what_was_right_is_neither_fetched_nor_hashed_again(peers: list[Peer], hub: SmallHub) -> None:
    """The file is among those that this node brings, so that it comes beside the first shard."""
    node, name = peers[0], "model.safetensors.index.json"
    node.serve()
    hub.pause = 60
    process = node.start(**node.settings)
    offered = node.models / ".glm-offer" / REVISION / "files" / name
    deadline = time.monotonic() + 50
    while not offered.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    # It is taken as right without a look into it: only so this test can tell.
    offered.write_bytes(model()[name].replace(b" ", b"\n"))
    hub.pause = 0
    before = hub.downloads[name]
    running = node.start(**node.settings)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert hub.downloads[name] == before == 1


def test_only_the_fleet_is_answered_and_only_what_is_right_is_given(peers: list[Peer]) -> None:
    node = peers[0]
    node.serve()
    node.have(model())
    partial = node.models / f"{'2' * 40}.partial"
    partial.mkdir()
    (partial / "config.json").write_bytes(b"not checked")
    (node.models / REVISION / "link").symlink_to("/etc/hostname")
    digest = hashlib.sha256(node.ask(f"/{REVISION}/files/config.json")[1]).digest()
    assert digest == hashlib.sha256(model()["config.json"]).digest()
    assert node.ask(f"/{REVISION}/state")[0] == 200
    assert node.ask(f"/{REVISION}/files/config.json", source="127.0.77.9")[0] == 403
    assert node.ask(f"/{REVISION}/state", source="127.0.77.9")[0] == 403
    assert node.ask(f"/{REVISION}/files/config.json", method="PUT")[0] == 405
    for path in (
        "/",
        f"/{REVISION}/files/",
        f"/{'2' * 40}/files/config.json",
        f"/{'2' * 40}.partial/files/config.json",
        f"/{REVISION}/files/link",
        f"/{REVISION}/files/../../../weights.json",
        f"/{REVISION}/files/%2e%2e/%2e%2e/weights.json",
    ):
        assert node.ask(path)[0] in (400, 403, 404), path


def test_addresses_may_be_of_ipv6(tmp_path: Path) -> None:
    text = server_config(tmp_path, tmp_path, {"node1": "fd00::1", "node2": "fd00::2"}, "node1", 8004)
    assert "    listen [fd00::1]:8004;\n" in text and "    allow fd00::2;\n" in text


def test_a_node_that_is_not_of_the_fleet_is_refused(peers: list[Peer]) -> None:
    node = peers[0]
    share = {**node.settings["share"], "name": "node9"}
    assert "node9 is not among the nodes that share the weights" in node.error(share=share)
    assert REPO in json.loads((node.path / "weights.json").read_text())["repo"]


def test_each_nodes_share_comes_from_a_source_of_the_user_first(peers: list[Peer], hub: SmallHub) -> None:
    source = peers[0].path / "source"
    source.mkdir()
    lacking = "model-00003-of-00003.safetensors"
    for name, data in model().items():
        if name != lacking:
            (source / name).write_bytes(data)
    for peer in peers:
        peer.serve()
    running = [peer.start(**peer.settings, sources=[str(source)]) for peer in peers]
    said = ""
    for process in running:
        _, err = process.communicate(timeout=100 * crowd())
        assert process.returncode == 0, err
        said += err
    assert f"from {source}" in said
    assert dict(hub.downloads) == {lacking: 1}
    came = [peer.sources() for peer in peers]
    assert sum(sources.get("hub", 0) for sources in came) == len(model()[lacking])
    assert sum(sources.get(str(source), 0) for sources in came) == TOTAL - len(model()[lacking])


def test_what_a_source_gave_is_not_hashed_again_nor_taken_for_the_hubs(tmp_path: Path) -> None:
    content = model()[SHARDS[0]]
    root, stop = tmp_path / "root", threading.Event()
    root.mkdir()
    entry = {"path": SHARDS[0], "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "git_sha1": None}
    job = exchange.Exchange(
        exchange.Settings("a", {"a": "127.0.77.1"}, 1), tmp_path, root,
        manifest={"revision": REVISION, "sha256": "", "files": [entry]},
        hub=lambda _paths, _stop: None, hub_begun=lambda: 0, stop=stop,
    )  # fmt: skip
    job.take_stock({SHARDS[0]}, None)
    job.from_hub = {0}

    class Scratch(type(tmp_path)):  # type: ignore[misc]
        """Somebody looks just after it has been put into its place."""

        def replace(self, target: Path) -> None:
            super().replace(target)
            looking.start()
            looking.join(0.3)

    with ThreadPoolExecutor() as pool:
        looking = threading.Thread(target=job.check_arrivals, args=(pool,))
        scratch = Scratch(tmp_path / "scratch")
        scratch.write_bytes(content)
        job.deliver(scratch, root / SHARDS[0], "/mnt")
        looking.join()
        assert not job.checks
    assert job.bytes == {"hub": 0, "peers": 0, "/mnt": len(content)}
