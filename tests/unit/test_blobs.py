"""Nodes that bring an image together: the program's part, nginx as it is configured, and a registry that counts."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import blobs
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.registry import BlobOpener
from share_server import server_config
from small_registry import SmallRegistry, digest_of, small_registry
from test_registry import INDEX_TYPE, MANIFEST_TYPE, NGINX, PATH

RANDOM = random.Random(7)
BLOBS = [RANDOM.randbytes(size) for size in (300_000, 200_000, 150_000, 70_000, 1_000)]
NAMES = ("node1", "node2", "node3")


def image_of(*layers: bytes) -> dict[str, Any]:
    """What image_digest says of an image."""
    sizes = [{"digest": digest_of(layer), "size": len(layer)} for layer in layers]
    manifest = json.dumps({"mediaType": MANIFEST_TYPE, "config": sizes[0], "layers": sizes[1:]}, indent=3)
    index = json.dumps({"mediaType": INDEX_TYPE, "manifests": [{"digest": digest_of(manifest.encode())}]})
    kinds = ((index, INDEX_TYPE), (manifest, MANIFEST_TYPE))
    return {
        "manifests": [
            {"digest": digest_of(text.encode()), "media_type": kind, "content": text} for text, kind in kinds
        ],
        "blobs": sizes,
    }


IMAGE = image_of(*BLOBS)
REVISION = IMAGE["manifests"][0]["digest"].removeprefix("sha256:")


class Node:
    """One of three, with an address on loopback of its own, and another one for its Docker."""

    def __init__(self, path: Path, place: int, port: int, registry: SmallRegistry) -> None:
        self.path, self.place, self.port, self.registry = path, place, port, registry
        self.addresses = {name: f"127.0.78.{number}" for number, name in enumerate(NAMES, 1)}
        self.docker = f"127.1.78.{place + 1}"
        self.images = path / "images"
        self.images.mkdir(parents=True)
        self.release = path / "current"
        self.server: subprocess.Popen[bytes] | None = None

    def image(self, image: dict[str, Any] = IMAGE, patience: float = 20) -> blobs.Image:
        share = {"name": NAMES[self.place], "addresses": self.addresses, "port": self.port, "patience": patience}
        config = {
            "registry": self.registry.url,
            "repository": PATH,
            "directory": str(self.images),
            "share": share,
            "releases": [str(self.release)],
            **image,
        }
        return blobs.Image(config, delay=0.01)

    def gather(self, image: dict[str, Any] = IMAGE, patience: float = 20) -> str:
        return self.image(image, patience).gather(threading.Event())

    def serve(self) -> None:
        served = {"path": PATH, "tag": "", "directory": self.images / REVISION, "manifests": IMAGE["manifests"]}
        text = server_config(
            self.path, self.images, self.addresses, NAMES[self.place], self.port, registry=self.docker, images=[served]
        )
        if os.geteuid() == 0:
            text += "user root;\n"  # pytest's directories are their owner's alone
        config = self.path / "nginx.conf"
        config.write_text(text)
        with (self.path / "nginx.log").open("wb") as log:
            self.server = subprocess.Popen([NGINX, "-p", self.path, "-c", config], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((self.docker, self.port), 5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.path / "nginx.log").read_text()
                time.sleep(0.05)

    def has(self) -> set[str]:
        """Right blobs and manifests of the complete image."""
        files = [path for path in (self.images / REVISION / "sha256").glob("*") if path.is_file()]
        return {path.name for path in files if hashlib.sha256(path.read_bytes()).hexdigest() == path.name}

    def flip(self, blob: bytes) -> None:
        place = self.images / REVISION / digest_of(blob).replace(":", "/")
        place.write_bytes(bytes([blob[0] ^ 255]) + blob[1:])


ALL = {each["digest"].removeprefix("sha256:") for each in IMAGE["manifests"] + IMAGE["blobs"]}
ONCE = sorted(blob["digest"] for blob in IMAGE["blobs"])


@pytest.fixture
def registry() -> Iterator[SmallRegistry]:
    with small_registry(*BLOBS) as server:
        yield server


@pytest.fixture
def nodes(tmp_path: Path, registry: SmallRegistry) -> Iterator[list[Node]]:
    with socket.socket() as free:
        free.bind(("127.0.78.1", 0))
        port = free.getsockname()[1]
    found = [Node(tmp_path / name, place, port, registry) for place, name in enumerate(NAMES)]
    with ExitStack() as stack:
        for node in found:
            node.serve()
            assert node.server
            stack.callback(node.server.wait)
            stack.callback(node.server.kill)
        yield found


def together(*nodes: Node, patience: float = 20) -> list[str]:
    said: dict[int, str] = {}

    def work(node: Node) -> None:
        said[node.place] = node.gather(patience=patience)

    threads = [threading.Thread(target=work, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [said[node.place] for node in nodes]


def test_each_blob_leaves_the_registry_once(nodes: list[Node], registry: SmallRegistry) -> None:
    registry.token = "anonymous"
    said = together(*nodes)
    assert Counter(path for path, given, _range in registry.asked if given and "/blobs/" in path) == Counter(
        f"/v2/{PATH}/blobs/{digest}" for digest in ONCE
    )
    for node, words in zip(nodes, said, strict=True):
        assert node.has() == ALL
        assert words.startswith("complete: 7 blobs, ") and "from the registry, " in words and "from peers" in words
        assert not list(node.images.glob(".glm-offer")) and not list(node.images.glob("*.partial"))
        assert sorted(path.name for path in (node.images / REVISION).iterdir()) == [".glm-manifest.json", "sha256"]


def test_the_node_s_docker_finds_it_all_there(nodes: list[Node]) -> None:
    opener = BlobOpener(f"http://{nodes[0].docker}:{nodes[0].port}", PATH)
    with opener(ONCE[0]) as response:
        assert response.status == 404  # not before it is complete
    together(*nodes)
    for blob in BLOBS:
        with opener(digest_of(blob)) as response:
            assert response.read() == blob


def test_a_node_that_joins_asks_the_registry_for_nothing(nodes: list[Node], registry: SmallRegistry) -> None:
    together(*nodes[:2], patience=2)
    registry.asked.clear()
    assert "0 B from the registry" in nodes[2].gather()
    assert not registry.asked and nodes[2].has() == ALL


def test_a_flipped_byte_at_a_peer_is_found(
    nodes: list[Node], registry: SmallRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    together(*nodes[:2], patience=2)
    for node in nodes[:2]:
        node.flip(BLOBS[1])
    registry.asked.clear()
    nodes[2].gather()
    assert registry.blobs_asked() == [digest_of(BLOBS[1])] and nodes[2].has() == ALL
    assert f"gave a wrong sha256/{digest_of(BLOBS[1])[7:]} (expected sha256 " in capsys.readouterr().err


def test_what_docker_has_lost_is_hashed_before_it_is_given_to_it_again(
    nodes: list[Node], registry: SmallRegistry
) -> None:
    together(*nodes)
    nodes[0].flip(BLOBS[2])
    registry.asked.clear()
    nodes[0].gather()
    assert nodes[0].has() == ALL and not registry.asked


def test_neither_registry_nor_peers(nodes: list[Node], registry: SmallRegistry) -> None:
    del registry.blobs[digest_of(BLOBS[0])]
    with pytest.raises(blobs.Incomplete, match="1 of 7 blobs were given neither by the registry nor by a peer"):
        nodes[0].gather(patience=0.5)
    assert not (nodes[0].images / REVISION).exists()
    registry.blobs[digest_of(BLOBS[0])] = BLOBS[0]
    registry.asked.clear()
    nodes[0].gather(patience=0.5)
    assert registry.blobs_asked() == [digest_of(BLOBS[0])]  # what came is kept


def test_a_registry_in_trouble_is_asked_again(nodes: list[Node], registry: SmallRegistry) -> None:
    registry.failing = [503, 429]
    nodes[0].gather(patience=0.5)
    assert nodes[0].has() == ALL


def test_a_registry_that_is_down_is_given_up(nodes: list[Node], registry: SmallRegistry) -> None:
    registry.failing = [500] * 1000
    with pytest.raises(blobs.Incomplete, match="5 of 7 blobs"):
        nodes[0].gather(patience=0.5)
    assert len(registry.asked) <= 5 * blobs.ATTEMPTS


def test_a_full_disk_is_said_before_anything_comes(
    nodes: list[Node], registry: SmallRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "DISK_RESERVE", 1 << 60)
    with pytest.raises(blobs.Incomplete, match=r"no space left in .*/images for the image's blobs: .* needed, .* free"):
        nodes[0].gather()
    assert not registry.asked


def test_a_new_image_takes_what_it_has_in_common_from_the_old_one(nodes: list[Node], registry: SmallRegistry) -> None:
    nodes[0].gather(patience=0.5)
    new = RANDOM.randbytes(40_000)
    registry.blobs[digest_of(new)] = new
    registry.asked.clear()
    nodes[0].gather(image_of(*BLOBS[:4], new), patience=0.5)
    assert registry.blobs_asked() == [digest_of(new)]


def test_the_images_of_the_releases_are_kept(nodes: list[Node]) -> None:
    node = nodes[0]
    node.release.mkdir()
    (node.release / "release.json").write_text(json.dumps({"image_digest": f"sha256:{REVISION}"}))
    old, given_up = "1" * 64, f"{'2' * 64}.partial"
    for name in (old, given_up, "of-somebody-else"):
        (node.images / name / "sha256").mkdir(parents=True)
    node.gather(patience=0.5)
    node.gather(image_of(*BLOBS[:2]), patience=0.5)
    left = {path.name for path in node.images.iterdir()}
    assert left == {REVISION, "of-somebody-else", node.image(image_of(*BLOBS[:2])).revision}
