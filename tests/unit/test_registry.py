"""Blobs from a registry that wants tokens and redirects, and the registry that nginx makes of a directory of blobs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.registry import BlobOpener
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.transfer import Unavailable, Wanted, fetch
from small_registry import SmallRegistry, digest_of, small_registry

TEMPLATE = Path(__file__).resolve().parents[2] / "templates/image-registry.conf.j2"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"  # tests/programs brings it
BLOB = bytes(range(256)) * 100
HEX = hashlib.sha256(BLOB).hexdigest()
DIGEST = f"sha256:{HEX}"
PATH = "vllm/vllm-openai"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def registry() -> Iterator[SmallRegistry]:
    with small_registry(BLOB) as server:
        yield server


@pytest.fixture
def store() -> Iterator[SmallRegistry]:
    with small_registry(BLOB) as server:
        yield server


def read(opener: BlobOpener, offset: int = 0, digest: str = DIGEST) -> tuple[int, bytes]:
    with opener(digest, offset) as response:
        return response.status, response.read()


def test_a_blob_and_the_rest_of_one(registry: SmallRegistry) -> None:
    opener = BlobOpener(registry.url + "/", PATH)
    assert read(opener) == (200, BLOB)
    assert read(opener, 25_000) == (206, BLOB[25_000:])
    assert registry.asked[0] == (f"/v2/{PATH}/blobs/{DIGEST}", "", "")
    assert read(opener, digest=f"sha256:{'0' * 64}")[0] == 404


def test_a_token_is_fetched_once_and_not_sent_on(registry: SmallRegistry, store: SmallRegistry) -> None:
    registry.token, registry.store = "one", store
    opener = BlobOpener(registry.url, PATH)
    assert read(opener) == (200, BLOB)
    assert read(opener, 100) == (206, BLOB[100:])
    assert registry.paths() == [f"/v2/{PATH}/blobs/{DIGEST}", "/token", *[f"/v2/{PATH}/blobs/{DIGEST}"] * 2]
    assert registry.asked[1][0] == "/token?service=registry.docker.io&scope=repository%3Avllm%2Fvllm-openai%3Apull"
    assert registry.asked[1][1] == ""
    assert [given for _path, given, _range in store.asked] == ["", ""]
    assert store.asked[1][2] == "bytes=100-"


def test_a_token_that_has_expired_is_fetched_again(registry: SmallRegistry) -> None:
    registry.token = "one"
    opener = BlobOpener(registry.url, PATH)
    read(opener)
    registry.token = "two"
    assert read(opener) == (200, BLOB)
    assert registry.paths().count("/token") == 2


def test_threads_share_a_token(registry: SmallRegistry) -> None:
    registry.token = "one"
    opener = BlobOpener(registry.url, PATH)
    threads = [threading.Thread(target=read, args=(opener,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.paths().count("/token") == 1


def test_a_token_that_is_refused_is_an_answer_and_no_loop(registry: SmallRegistry) -> None:
    registry.token, registry.answer = "one", {"access_token": "another"}
    assert read(BlobOpener(registry.url, PATH))[0] == 401
    assert registry.paths().count("/token") == 1


@pytest.mark.parametrize(
    ("realm", "answer", "says"),
    [
        ("file:///etc/passwd", None, "does not say from where"),
        ("", {"detail": "none for you"}, "gave no token"),
        ("", ["one"], "gave no token"),
    ],
)
def test_no_token_to_be_had(registry: SmallRegistry, realm: str, answer: Any, says: str) -> None:
    registry.token, registry.realm, registry.answer = "one", realm or registry.realm, answer
    with pytest.raises(Unavailable, match=says):
        read(BlobOpener(registry.url, PATH))


def test_a_store_that_wants_a_token_gets_none(registry: SmallRegistry, store: SmallRegistry) -> None:
    registry.store, store.token = store, "of the store"
    assert read(BlobOpener(registry.url, PATH))[0] == 401
    assert "/token" not in store.paths() + registry.paths()


def test_the_proxy_of_the_environment(registry: SmallRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", registry.url)
    monkeypatch.setenv("no_proxy", "")
    assert read(BlobOpener("http://registry.example", PATH)) == (200, BLOB)
    assert registry.paths() == [f"http://registry.example/v2/{PATH}/blobs/{DIGEST}"]


def test_a_transfer_goes_on_from_what_is_there(registry: SmallRegistry, store: SmallRegistry, tmp_path: Path) -> None:
    registry.token, registry.store = "one", store
    place = tmp_path / "sha256" / HEX
    place.parent.mkdir()
    place.write_bytes(BLOB[:1000])
    wanted = Wanted(f"sha256/{HEX}", len(BLOB), "sha256", HEX)
    fetch(wanted, place, BlobOpener(registry.url, PATH), DIGEST, stop=threading.Event())
    assert place.read_bytes() == BLOB and store.asked[-1][2] == "bytes=1000-"
    other = f"sha256:{'0' * 64}"
    with pytest.raises(Unavailable, match="has no such file"):
        fetch(wanted, tmp_path / "0", BlobOpener(registry.url, PATH), other, stop=threading.Event())


# --- what nginx serves ----------------------------------------------------------------------------------------------


def image(directory: Path, path: str, tag: str, blob: bytes) -> dict[str, Any]:
    """An image of one blob, in a directory of its own, as the template takes it."""
    manifest = json.dumps({"mediaType": MANIFEST_TYPE, "layers": [{"digest": digest_of(blob)}]}).encode()
    index = json.dumps({"mediaType": INDEX_TYPE, "manifests": [{"digest": digest_of(manifest)}]}, indent=3).encode()
    for body in (index, manifest, blob):
        (directory / "sha256").mkdir(parents=True, exist_ok=True)
        (directory / digest_of(body).replace(":", "/")).write_bytes(body)
    manifests = [
        {"digest": digest_of(index), "media_type": INDEX_TYPE},
        {"digest": digest_of(manifest), "media_type": MANIFEST_TYPE},
    ]
    return {"path": path, "tag": tag, "directory": directory, "manifests": manifests}


class Nginx:
    def __init__(self, path: Path, images: list[dict[str, Any]]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        snippet = jinja2.Environment(trim_blocks=True).from_string(TEMPLATE.read_text())
        config = path / "nginx.conf"
        config.write_text(
            f"daemon off; pid {path}/pid; error_log stderr; {'user root;' if os.geteuid() == 0 else ''} events {{}}\n"
            f"http {{ access_log off; server {{ listen 127.0.0.1:{self.port};\n"
            f"{snippet.render(registry_images=images)} }} }}\n"
        )
        with (path / "log").open("wb") as log:
            self.process = subprocess.Popen([NGINX, "-p", path, "-c", config], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.ask("/")
                break
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None, (path / "log").read_text()
                time.sleep(0.05)

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method, headers=headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.headers, answer.read()


@pytest.fixture
def images(tmp_path: Path) -> list[dict[str, Any]]:
    """Two of one repository, which share nothing, and the first one again under another name."""
    one = image(tmp_path / "one", PATH, "new", b"layer one")
    two = image(tmp_path / "two", PATH, "", b"layer two")
    return [one, two, {**one, "tag": ""}]


@pytest.fixture
def nginx(tmp_path: Path, images: list[dict[str, Any]]) -> Iterator[Nginx]:
    server = Nginx(tmp_path, images)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_nginx_serves_manifests_as_a_registry(nginx: Nginx, images: list[dict[str, Any]], method: str) -> None:
    assert nginx.ask("/v2/")[0] == 200
    assert nginx.ask("/v2/")[1]["Docker-Distribution-Api-Version"] == "registry/2.0"
    for each in images:
        for manifest in each["manifests"]:
            content = (each["directory"] / manifest["digest"].replace(":", "/")).read_bytes()
            status, headers, body = nginx.ask(f"/v2/{PATH}/manifests/{manifest['digest']}", method)
            assert (status, headers["Content-Type"]) == (200, manifest["media_type"])
            assert headers["Docker-Content-Digest"] == manifest["digest"]
            assert headers["Content-Length"] == str(len(content))
            assert body == (content if method == "GET" else b"")
    assert nginx.ask(f"/v2/{PATH}/manifests/new", method)[1]["Docker-Content-Digest"] == digest_of(
        (images[0]["directory"] / images[0]["manifests"][0]["digest"].replace(":", "/")).read_bytes()
    )


def test_nginx_serves_the_blobs_of_all_images(nginx: Nginx) -> None:
    opener = BlobOpener(f"http://127.0.0.1:{nginx.port}", PATH)
    for blob in (b"layer one", b"layer two"):
        assert read(opener, digest=digest_of(blob)) == (200, blob)
        assert read(opener, 6, digest_of(blob)) == (206, blob[6:])
        headers = nginx.ask(f"/v2/{PATH}/blobs/{digest_of(blob)}")[1]
        assert headers["Docker-Content-Digest"] == digest_of(blob)


@pytest.mark.parametrize(
    "path",
    [
        f"{PATH}/manifests/latest",
        f"{PATH}/manifests/sha256:{'0' * 64}",
        f"{PATH}/blobs/sha256:{'0' * 64}",
        f"{PATH}/blobs/../../../etc/passwd",
        "other/name/manifests/new",
    ],
)
def test_what_is_not_there_is_said_as_a_registry_does(nginx: Nginx, path: str) -> None:
    status, headers, body = nginx.ask(f"/v2/{path}")
    assert (status, headers["Content-Type"]) == (404, "application/json")
    assert json.loads(body)["errors"][0]["code"] == "UNKNOWN"


def test_a_manifest_whose_file_is_gone(nginx: Nginx, images: list[dict[str, Any]]) -> None:
    digest = images[0]["manifests"][0]["digest"]
    (images[0]["directory"] / digest.replace(":", "/")).unlink()
    status, headers, body = nginx.ask(f"/v2/{PATH}/manifests/{digest}")
    assert (status, headers["Content-Type"]) == (404, "application/json") and json.loads(body)["errors"]
