"""image_digest against a small registry: tags, digests, indexes, tokens, and each way to fail."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.modules import image_digest

INDEX, MANIFEST = image_digest.INDEX_TYPES[1], image_digest.MANIFEST_TYPES[1]


def dump(data: Any) -> bytes:
    return json.dumps(data).encode()


def digest(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


CONFIG = dump(
    {
        "config": {
            "Env": ["PATH=/bin", "CUDA_VERSION=12.9.1", "EMPTY="],
            "Entrypoint": ["vllm", "serve"],
            "Labels": {"a": "b"},
        }
    }
)
LAYERS = [{"digest": f"sha256:{number * 64}", "size": size} for number, size in (("a", 30), ("b", 6), ("b", 6))]
IMAGE = dump({"mediaType": MANIFEST, "config": {"digest": digest(CONFIG), "size": len(CONFIG)}, "layers": LAYERS})
LIST = dump(
    {
        "mediaType": INDEX,
        "manifests": [
            {"digest": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "arm64"}},
            {"digest": digest(IMAGE), "platform": {"os": "linux", "architecture": "amd64"}},
            {"digest": "sha256:" + "1" * 64, "platform": {"os": "unknown", "architecture": "unknown"}},
        ],
    }
)


class Registry(ThreadingHTTPServer):
    """`answers` maps a path to (status, body, headers); `token` is asked for where it is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = ""
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        for name, body in (("single", IMAGE), ("multi", LIST), (digest(IMAGE), IMAGE), (digest(LIST), LIST)):
            headers = {"Docker-Content-Digest": digest(body)}
            self.answers[f"/v2/vllm/vllm-openai/manifests/{name}"] = (200, body, headers)
        self.answers[f"/v2/vllm/vllm-openai/blobs/{digest(CONFIG)}"] = (307, b"", {"Location": f"{self.url}/store"})
        self.answers["/store"] = (200, CONFIG, {})


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server = self.server
        authorization = self.headers.get("Authorization", "")
        server.asked.append((self.path, authorization))
        status, body, headers = server.answers.get(self.path, (404, b"{}", {}))
        if self.path.startswith("/token?"):
            status, body, headers = 200, dump({"token": server.token}), {}
        elif server.token and self.path.startswith("/v2/") and authorization != f"Bearer {server.token}":
            challenge = f'Bearer realm="{server.url}/token",service="registry.docker.io"'
            status, body, headers = 401, b"{}", {"WWW-Authenticate": challenge}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def registry() -> Iterator[Registry]:
    server = Registry()
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def resolve(registry: Registry, ref: str) -> dict[str, Any]:
    return image_digest.resolve(ref, registry.url, "linux/amd64", timeout=5, retries=0)


def test_a_tag_of_a_single_image(registry: Registry) -> None:
    image = resolve(registry, "vllm/vllm-openai:single")
    assert image["digest"] == digest(IMAGE) and image["pull_ref"] == f"vllm/vllm-openai@{digest(IMAGE)}"
    assert (image["registry"], image["repository"], image["tag"]) == ("docker.io", "vllm/vllm-openai", "single")
    assert (image["path"], image["api"]) == ("vllm/vllm-openai", registry.url)
    assert image["config_env"] == {"PATH": "/bin", "CUDA_VERSION": "12.9.1", "EMPTY": ""}
    assert (image["cuda"], image["size_bytes"], image["entrypoint"]) == ("12.9", 42, ["vllm", "serve"])


def test_a_tag_of_an_index_gives_the_digest_that_docker_pull_takes(registry: Registry) -> None:
    image = resolve(registry, "vllm/vllm-openai:multi")
    assert image["digest"] == digest(LIST) and image["cuda"] == "12.9"


def test_the_manifests_and_the_blobs_that_a_pull_takes(registry: Registry) -> None:
    single, multi = (resolve(registry, f"vllm/vllm-openai:{tag}") for tag in ("single", "multi"))
    manifest = {"digest": digest(IMAGE), "media_type": MANIFEST, "content": IMAGE.decode()}
    assert single["manifests"] == [manifest]
    assert multi["manifests"] == [{"digest": digest(LIST), "media_type": INDEX, "content": LIST.decode()}, manifest]
    blobs = [{"digest": digest(CONFIG), "size": len(CONFIG)}, *LAYERS[:2]]
    assert single["blobs"] == multi["blobs"] == blobs


def test_a_manifest_without_its_type_has_that_of_the_answer(registry: Registry) -> None:
    kind = image_digest.MANIFEST_TYPES[0]
    body = dump({key: value for key, value in json.loads(IMAGE).items() if key != "mediaType"}) + b"\n"
    registry.answers["/v2/vllm/vllm-openai/manifests/oci"] = (200, body, {"Content-Type": f"{kind}; charset=utf-8"})
    (manifest,) = resolve(registry, "vllm/vllm-openai:oci")["manifests"]
    assert manifest == {"digest": digest(body), "media_type": kind, "content": body.decode()}


def test_a_digest_stays_what_it_is(registry: Registry) -> None:
    image = resolve(registry, f"vllm/vllm-openai@{digest(LIST)}")
    assert image["digest"] == digest(LIST) and image["tag"] == ""


def test_a_token_is_fetched_and_not_sent_on_to_the_store(registry: Registry) -> None:
    registry.token = "anonymous-1"
    assert resolve(registry, "vllm/vllm-openai:single")["cuda"] == "12.9"
    asked = dict(registry.asked)
    assert "/token?service=registry.docker.io&scope=repository%3Avllm%2Fvllm-openai%3Apull" in asked
    assert asked["/store"] == ""


def fails(registry: Registry, ref: str) -> str:
    with pytest.raises(image_digest.Problem) as raised:
        resolve(registry, ref)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_tag_that_moved_from_its_pin(registry: Registry) -> None:
    assert f"is {digest(IMAGE)} by now" in fails(registry, f"vllm/vllm-openai:single@{digest(LIST)}")


def test_a_body_that_is_not_what_was_asked_for(registry: Registry) -> None:
    registry.answers[f"/v2/vllm/vllm-openai/manifests/{digest(LIST)}"] = (200, IMAGE, {})
    assert "damaged or was tampered with" in fails(registry, f"vllm/vllm-openai@{digest(LIST)}")
    registry.answers["/store"] = (200, b"{}", {})
    assert "with another digest than" in fails(registry, "vllm/vllm-openai:single")


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (404, "has no vllm/vllm-openai:single (404)"),
        (401, "it does not exist there, or needs a login"),
        (429, "too many requests: try later, or set glm_registry_mirror"),
        (503, "answers 503 for vllm/vllm-openai:single"),
    ],
)
def test_answers_that_are_errors(registry: Registry, status: int, says: str) -> None:
    registry.answers["/v2/vllm/vllm-openai/manifests/single"] = (status, b"", {})
    assert says in fails(registry, "vllm/vllm-openai:single")


def test_a_web_page_is_no_registry(registry: Registry) -> None:
    registry.answers["/v2/vllm/vllm-openai/manifests/single"] = (200, b"<html>", {})
    assert "does not answer as a registry does" in fails(registry, "vllm/vllm-openai:single")


def test_an_index_without_the_platform(registry: Registry) -> None:
    with pytest.raises(image_digest.Problem, match=r"linux/s390x, only for linux/amd64, linux/arm64: set glm_image"):
        image_digest.resolve("vllm/vllm-openai:multi", registry.url, "linux/s390x", 5, 0)


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9", "not a url"])
def test_a_registry_that_is_down(mirror: str) -> None:
    with pytest.raises(image_digest.Problem, match=r"mirror .* cannot be reached \(.*\): .*glm_registry_mirror"):
        image_digest.resolve("vllm/vllm-openai:x", mirror, "linux/amd64", 2, 0)


@pytest.mark.parametrize(
    ("ref", "registry", "path", "tag"),
    [
        ("ubuntu", "docker.io", "library/ubuntu", "latest"),
        ("vllm/vllm-openai:glm52-cu129", "docker.io", "vllm/vllm-openai", "glm52-cu129"),
        ("localhost:5000/a/b:1", "localhost:5000", "a/b", "1"),
        ("ghcr.io/a/b", "ghcr.io", "a/b", "latest"),
        (f"a/b@sha256:{'0' * 64}", "docker.io", "a/b", ""),
    ],
)
def test_references(ref: str, registry: str, path: str, tag: str) -> None:
    found = image_digest.Reference(ref)
    assert (found.registry, found.path, found.tag) == (registry, path, tag)


@pytest.mark.parametrize("ref", ["", "Upper/case", "a/b:", "a/b@sha256:12", "a b", "a/b:c:d"])
def test_what_is_no_reference(ref: str) -> None:
    with pytest.raises(image_digest.Problem, match="is no image reference"):
        image_digest.Reference(ref)
