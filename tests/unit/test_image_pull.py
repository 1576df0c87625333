"""image-pull against a small Docker API: progress, the proof at the end, and each failure in one line."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "roles" / "engine_image" / "files" / "image-pull"
MANIFEST = b'{"schemaVersion": 2}'
DIGEST = "sha256:" + hashlib.sha256(MANIFEST).hexdigest()
IMAGE = f"vllm/vllm-openai@{DIGEST}"


def load() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("image_pull", str(PROGRAM))
    spec = importlib.util.spec_from_loader("image_pull", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["image_pull"] = module
    loader.exec_module(module)
    return module


image_pull = load()


def layer(name: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
    return {"id": name, "status": status, "progressDetail": {"current": current, "total": total} if total else {}}


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Docker(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Each pull answers with the next messages, a number for seconds of silence; `has` is what is there afterwards."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), DockerHandler)
        self.path = str(path)
        self.pulls: list[Any] = []
        self.asked: list[str] = []
        self.has = [IMAGE]
        self.info: dict[str, Any] = {"DockerRootDir": "/data/docker"}
        self.hung_up = threading.Semaphore(0)


class DockerHandler(Quiet):
    server: Docker

    def address_string(self) -> str:
        return "unix"

    def do_GET(self) -> None:
        if self.path == "/info":
            return self.answer(200, json.dumps(self.server.info).encode())
        return self.answer(200, json.dumps({"RepoDigests": self.server.has}).encode())

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        messages = self.server.pulls.pop(0)
        if isinstance(messages, bytes):
            return self.answer(500, messages)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for message in messages:
                if isinstance(message, float):
                    time.sleep(message)
                else:
                    self.chunk(json.dumps(message).encode() + b"\r\n")
            self.chunk(b"")
        except BrokenPipeError:
            self.close_connection = True
            self.server.hung_up.release()
        return None

    def chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))

    def finish(self) -> None:
        with suppress(BrokenPipeError):
            super().finish()


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[Docker]:
    server = Docker(tmp_path / "docker.sock")
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(docker: Docker, mirror: str = "", attempts: int = 1, stall: float = 10, own: str = "") -> None:
    image_pull.fetch(IMAGE, 100, mirror, attempts=attempts, delay=0, stall=stall, own=own, path=docker.path)


def failure(
    docker: Docker, *messages: Any, mirror: str = "", attempts: int = 1, stall: float = 10, own: str = ""
) -> str:
    docker.pulls = list(messages)
    with pytest.raises(image_pull.Failure) as raised:
        fetch(docker, mirror, attempts, stall, own)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def error(text: str) -> list[dict[str, Any]]:
    return [{"error": text, "errorDetail": {"message": text}}]


def test_a_pull_by_digest_is_proven(docker: Docker, capsys: pytest.CaptureFixture[str]) -> None:
    docker.pulls = [[layer("a", "Pulling fs layer"), layer("a", "Downloading", 50, 100), layer("a", "Pull complete")]]
    fetch(docker)
    assert docker.asked == [f"/images/create?fromImage=vllm%2Fvllm-openai%40sha256%3A{DIGEST[7:]}"]
    assert capsys.readouterr().out.splitlines()[-1] == f"present: {IMAGE}"


def test_an_image_under_another_digest_is_no_success(docker: Docker) -> None:
    docker.has = ["vllm/vllm-openai@sha256:0"]
    assert failure(docker, []) == f"Docker has no {IMAGE} after the pull, but vllm/vllm-openai@sha256:0"


def test_progress_tells_bytes_rate_and_time() -> None:
    progress = image_pull.Progress(4_000_000_000, 300)
    texts = [progress.text(0)]
    for now, message in enumerate(
        [
            layer("a", "Pulling fs layer"),
            layer("b", "Pulling fs layer"),
            layer("a", "Downloading", 0, 1_000_000_000),
            layer("a", "Downloading", 500_000_000, 1_000_000_000),
            layer("a", "Download complete"),
            layer("b", "Downloading", 1_000_000_000, 3_000_000_000),
            layer("b", "Verifying Checksum"),
            layer("a", "Extracting", 700_000_000, 1_000_000_000),
            layer("c", "Already exists"),
            layer("a", "Pull complete"),
        ]
    ):
        progress.add(message)
        texts.append(progress.text(now))
    assert texts == [
        "asking the registry",
        "0 B of 4.0 GB",
        "0 B of 4.0 GB",
        "0 B of 4.0 GB",
        "500.0 MB of 4.0 GB, 166.7 MB/s, ETA 21 s",
        "1.0 GB of 4.0 GB, 250.0 MB/s, ETA 12 s",
        "2.0 GB of 4.0 GB, 400.0 MB/s, ETA 5 s",
        "unpacking, 0 B of 4.0 GB",
        "unpacking, 700.0 MB of 4.0 GB",
        "unpacking, 700.0 MB of 4.0 GB",
        "unpacking, 1.0 GB of 4.0 GB",
    ]


@pytest.mark.parametrize(
    "text",
    [
        'Get "https://registry-1.docker.io/v2/": dial tcp 1.2.3.4:443: connect: connection refused',
        "received unexpected HTTP status: 503 Service Unavailable",
        'error parsing HTTP 502 response body: invalid character "<"',
        "failed to copy: httpReadSeeker: failed open: unexpected status from GET request to https://r/v2/x/blobs/"
        "sha256:404: 504 Gateway Timeout",
        "stream error: stream ID 7; INTERNAL_ERROR; received from peer",
        "unexpected EOF",
    ],
)
def test_what_passes_is_tried_again(docker: Docker, text: str) -> None:
    docker.pulls = [error(text), error(text), []]
    fetch(docker, attempts=3)
    assert len(docker.asked) == 3


HALF = layer("a", "Downloading", 50, 100)
WHOLE = [layer("a", "Downloading", 100, 100), layer("a", "Download complete")]


def again_and_again(message: dict[str, Any]) -> Iterable[Any]:
    while True:
        yield message
        yield 0.05


@pytest.mark.parametrize("silence", [[HALF, 0.6, HALF], again_and_again(HALF)], ids=["nothing", "the same"])
def test_a_download_that_stalls_is_begun_again(docker: Docker, silence: Any) -> None:
    docker.pulls = [silence, [HALF, *WHOLE, layer("a", "Pull complete")]]
    fetch(docker, attempts=2, stall=0.2)
    assert docker.hung_up.acquire(timeout=5), "Docker goes on with a pull as long as somebody listens"
    assert len(docker.asked) == 2


@pytest.mark.parametrize(
    "begun",
    [
        [*WHOLE, layer("b", "Waiting")],
        [layer("b", "Downloading", 1, 9), *WHOLE],
    ],
    ids=["waits", "is half there"],
)
def test_one_of_two_layers_that_stalls(docker: Docker, begun: list[Any]) -> None:
    assert "stalled" in failure(docker, [*begun, 0.5, layer("b", "Pull complete")], stall=0.2)


@pytest.mark.parametrize(
    "begun",
    [WHOLE, [layer("a", "Pulling fs layer")], [*WHOLE, layer("a", "Extracting", 1, 100)]],
    ids=["checks", "has all layers", "unpacks"],
)
def test_docker_may_work_in_silence(docker: Docker, begun: list[Any]) -> None:
    docker.pulls = [[*begun, 0.5, layer("a", "Pull complete")]]
    fetch(docker, stall=0.2)


@pytest.mark.parametrize(
    ("store", "says"),
    [
        (None, "Docker will begin with the first layer again"),
        ([["driver-type", "io.containerd.snapshotter.v1"]], "complete layers are kept"),
    ],
)
def test_a_pull_that_stalls_each_time(docker: Docker, store: Any, says: str) -> None:
    docker.info["DriverStatus"] = store
    line = failure(docker, [HALF, 0.4], [HALF, 0.4], attempts=2, stall=0.2)
    assert line.startswith(f"the pull of {IMAGE} stalled: no byte for 0.2 s, 2 times; {says}: ")


def test_a_registry_that_stalls_before_the_first_word(docker: Docker) -> None:
    assert "1 time;" in failure(docker, [0.6], stall=0.1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("write /var/x: no space left on device", "the disk of Docker's directory /data/docker is full"),
        ("filesystem layer verification failed for digest sha256:1", "what the registry sent for vllm/vllm-openai@"),
        ("manifest unknown: manifest unknown", f"the registry has no {IMAGE}"),
        ("toomanyrequests: You have reached your limit", "the registry answers 429"),
        ("unexpected status from GET request to https://r/v2/x: 429 Too Many Requests", "the registry answers 429"),
        ('error parsing HTTP 429 response body: unexpected end of JSON input: ""', "the registry answers 429"),
        (f"failed to resolve vllm@sha256:{'429' * 21}0: not found", f"the registry has no {IMAGE}"),
        ("pull from r:4290 and r:429 denied", "the registry refuses"),
        ("manifest for vllm@sha256:a503b: not found", f"the registry has no {IMAGE}"),
        ("pull access denied for x", "the registry refuses"),
        ("dial tcp: lookup r: no such host", "the registry cannot be reached: dial tcp"),
        ("something new", "something new"),
        ("", "Docker gives no reason"),
    ],
)
def test_what_docker_says_becomes_one_line(docker: Docker, text: str, says: str) -> None:
    assert failure(docker, [{"error": text}]).startswith(says)


@pytest.mark.parametrize(
    ("status", "tries"), [(503, 2), (404, 1)], ids=["an ill mirror is asked again", "one without the image is not"]
)
def test_a_mirror_in_trouble(docker: Docker, mirror: Any, status: int, tries: int) -> None:
    mirror.reply = (status, b"")
    down = error("dial tcp: no such host")
    assert f"{status}" in failure(docker, down, down, mirror=mirror.url, attempts=2)
    assert len(docker.asked) == tries


def test_an_answer_that_is_no_stream(docker: Docker) -> None:
    assert "has no" in failure(docker, b'{"message": "manifest for x not found"}')


class Mirror(Quiet):
    def do_GET(self) -> None:
        status, body = self.server.reply  # type: ignore[attr-defined]
        self.answer(status, body)


@pytest.fixture
def mirror() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((404, b""), "has no vllm/vllm-openai@sha256"),
        ((503, b""), "answers 503 for"),
        ((200, b"{}"), "it is damaged or was tampered with"),
        ((200, MANIFEST), "the registry cannot be reached: dial tcp"),
    ],
)
def test_the_mirror_is_asked_what_docker_does_not_tell(docker: Docker, mirror: Any, reply: Any, says: str) -> None:
    mirror.reply = reply
    assert says in failure(docker, error("dial tcp: lookup registry-1.docker.io: no such host"), mirror=mirror.url)


@pytest.mark.parametrize(
    "first", ["unknown: this node has no such part", 'Get \\"http://127.0.0.1:8004/v2/\\": connect: connection refused']
)
def test_the_node_s_own_registry_is_not_taken_for_the_mirror(
    docker: Docker, mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    said = f"""msg="Attempting next endpoint for pull after error: {first}" a=1
msg="Attempting next endpoint for pull after error: layer verification failed" a=1"""
    (tmp_path / "journalctl").write_text(f"#!/bin/sh\ncat <<'EOF'\n{said}\nEOF\n")
    (tmp_path / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    says = failure(docker, error("dial tcp: no such host"), mirror=mirror.url, own="//127.0.0.1:8004/")
    assert says.endswith("(layer verification failed)")


def test_dockers_journal_knows_more_of_the_mirror(
    docker: Docker, mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.reply = (200, MANIFEST)
    (tmp_path / "journalctl").write_text(
        # Docker's message may be of the same second as the pull's begin.
        "#!/bin/sh\ncase \"$*\" in *--since=@1000\\ *) ;; *) exit ;; esac\ncat <<'EOF'\n"
        + (
            'level=info msg="Attempting next endpoint for pull after error: '
            'layer \\"a\\" verification failed" spanID=1\n'
            'level=info msg="Attempting next endpoint for pull after error: no such host"\n'
        )
        + "EOF\n"
    )
    (tmp_path / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(image_pull.time, "time", lambda: 1000.7)
    says = failure(docker, error("dial tcp: no such host"), mirror=mirror.url)
    assert says.endswith('(layer "a" verification failed)') and "has another digest" in says


def test_a_mirror_that_is_down(docker: Docker) -> None:
    down = error("dial tcp: lookup registry-1.docker.io: no such host")
    says = failure(docker, down, mirror="http://127.0.0.1:9")
    assert says.startswith("the registry mirror http://127.0.0.1:9 cannot be reached")


def test_no_docker(tmp_path: Path) -> None:
    with pytest.raises(image_pull.Failure, match="Docker does not answer"):
        image_pull.fetch(IMAGE, 0, "", attempts=1, delay=0, stall=10, path=str(tmp_path / "none"))


def test_a_docker_that_refuses_is_not_taken_for_the_registry(tmp_path: Path) -> None:
    path = str(tmp_path / "docker.sock")
    socketserver.UnixStreamServer(path, DockerHandler).server_close()
    with pytest.raises(image_pull.Failure, match=r"^Docker does not answer \(.*refused\)"):
        image_pull.fetch(IMAGE, 0, "", attempts=1, delay=0, stall=10, path=path)


@pytest.mark.parametrize("problem", [image_pull.Incomplete("no space left"), OSError(28, "No space left on device")])
def test_what_the_nodes_do_not_give_each_other_docker_fetches(
    docker: Docker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, problem: Any
) -> None:
    def gather(_image: Any, _stop: Any) -> str:
        raise problem

    config = tmp_path / "image.json"
    share = {"name": "a", "addresses": {"a": "127.0.0.1"}, "port": 8004}
    manifests = [{"digest": DIGEST, "content": MANIFEST.decode()}]
    config.write_text(
        json.dumps(
            {"registry": "http://127.0.0.1:9", "repository": "x", "directory": str(tmp_path), "share": share,
             "releases": [], "manifests": manifests, "blobs": []}
        )
    )  # fmt: skip
    monkeypatch.setattr(image_pull.Image, "gather", gather)
    monkeypatch.setattr(image_pull.fetch, "__kwdefaults__", {**image_pull.fetch.__kwdefaults__, "path": docker.path})
    monkeypatch.setattr(sys, "argv", ["image-pull", "--share", str(config), IMAGE])
    docker.pulls = [[]]
    image_pull.main()
    assert "o space left" in (said := capsys.readouterr().err) and said.endswith(": Docker asks the registry itself\n")
    assert len(docker.asked) == 1


def test_the_program_wants_a_digest() -> None:
    command = [sys.executable, str(PROGRAM), "vllm/vllm-openai:x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("glm: error: vllm/vllm-openai:x has no digest")
