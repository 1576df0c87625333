"""weights-fetch: complete means checked, nothing is downloaded twice, and a failure leaves all as it was."""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import mounts
from ansible_collections.glm.fleet.plugins.modules.hub_manifest import Hub
from small_hub import DOCKER, REPO, REVISION, SHARDS, TOKEN, SmallHub, model, small_hub
from testbed import crowd

PROGRAM = Path(__file__).resolve().parents[2] / "roles" / "model_weights" / "files" / "weights-fetch"
SECOND = "2" * 40
THIRD = "3" * 40
TOTAL = sum(map(len, model().values()))


def load(name: str = "weights-fetch") -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(PROGRAM.with_name(name)))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


class Node:
    """A directory that stands for a node, with the program's configuration and a `docker`."""

    def __init__(self, path: Path, hub: SmallHub) -> None:
        self.path = path
        self.hub = hub
        self.models = path / "models"
        self.docker_log = path / "docker.log"
        self.runtime = path / "runtime"
        self.runtime.mkdir()
        self.releases = [path / "current", path / "previous"]
        binary = path / "bin" / "docker"
        binary.parent.mkdir()
        binary.write_text(DOCKER)
        binary.chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
            "PATH": f"{binary.parent}:{os.environ['PATH']}",
            "DOCKER_LOG": str(self.docker_log),
            "RUNTIME_DIRECTORY": str(self.runtime),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def configure(self, revision: str = REVISION, **settings: Any) -> Path:
        manifest = Hub(self.hub.endpoint, TOKEN).manifest(REPO, revision)
        config = {
            "repo": REPO,
            "revision": revision,
            "endpoint": self.hub.endpoint,
            "image": "vllm/vllm-openai@sha256:" + "a" * 64,
            "directory": str(self.models),
            "attempts": 2,
            "retry_delay": 0,
            "releases": [str(release) for release in self.releases],
            "manifest": manifest,
            **settings,
        }
        path = self.path / "weights.json"
        path.write_text(json.dumps(config))
        return path

    def start(self, revision: str = REVISION, **settings: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, PROGRAM, self.configure(revision, **settings)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, revision: str = REVISION, **settings: Any) -> tuple[int, str, str]:
        process = self.start(revision, **settings)
        out, err = process.communicate(timeout=60 * crowd())
        return process.returncode, out, err

    def ok(self, revision: str = REVISION, **settings: Any) -> str:
        code, out, err = self.run(revision, **settings)
        assert code == 0, err
        return out + err

    def error(self, revision: str = REVISION, **settings: Any) -> str:
        code, _, err = self.run(revision, **settings)
        assert code == 1
        lines = [line for line in err.splitlines() if line.startswith("glm: error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    def content(self, revision: str = REVISION) -> dict[str, bytes]:
        root = self.models / revision
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def sources(self) -> dict[str, int]:
        """What the last run has left for the role."""
        result = json.loads((self.runtime / "result.json").read_text())
        assert result.keys() == {"bytes", "seconds", "sources"} and 0 <= result["seconds"] < 60 * crowd()
        assert result["bytes"] == sum(result["sources"].values())
        return dict(result["sources"])

    def names(self) -> set[str]:
        return {path.name for path in self.models.iterdir()} - {".glm-lock"}

    def docker_runs(self) -> list[list[str]]:
        calls = [json.loads(line) for line in self.docker_log.read_text().splitlines()]
        return [call for call in calls if call[0] == "run"]


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with small_hub() as server:
        server.revisions[SECOND] = {**model(), "README.md": b"# Second\n"}
        server.revisions[THIRD] = {**model(), "README.md": b"# Third\n"}
        yield server


@pytest.fixture
def node(tmp_path: Path, hub: SmallHub) -> Node:
    return Node(tmp_path, hub)


def flip(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


def test_a_clean_download_holds_the_listed_files_and_nothing_else(node: Node) -> None:
    assert f"complete: 6 files, {TOTAL / 1000:.1f} kB: {TOTAL / 1000:.1f} kB from the hub\n" in node.ok()
    assert node.sources() == {"hub": TOTAL}
    content = node.content()
    marker = json.loads(content.pop(".glm-manifest.json"))
    assert content == model()
    assert marker == Hub(node.hub.endpoint).manifest(REPO, REVISION)
    assert node.names() == {REVISION}


def test_the_command_line_is_the_documented_one(node: Node) -> None:
    token = node.path / "hf-token"
    token.write_text(TOKEN + "\n")
    node.hub.need_token = True
    node.ok(token_file=str(token), environment={"HTTPS_PROXY": "http://proxy"})
    (argv,) = node.docker_runs()
    line = " ".join(argv)
    assert "run --rm --name glm-weights --pull never --network host" in line
    assert f"--env HF_ENDPOINT={node.hub.endpoint}" in line
    assert "--env HF_XET_HIGH_PERFORMANCE=1" in line
    assert "--env HTTPS_PROXY=http://proxy" in line
    assert f"--volume {PROGRAM.parent}/hub-download:/run/hub-download:ro" in line
    image = f"vllm/vllm-openai@sha256:{'a' * 64}"
    assert f"--entrypoint python3 {image} /run/hub-download {REPO} {REVISION} /weights " in line
    assert sorted(argv[-6:]) == sorted(model())
    assert set(node.hub.authorizations) == {f"Bearer {TOKEN}"}
    assert TOKEN not in node.docker_log.read_text()


def test_a_complete_revision_is_checked_without_the_hub(node: Node) -> None:
    node.ok()
    node.configure()
    node.hub.faults["/resolve/"] = (503, {}, 99)
    assert "6 files checked again, 0 replaced" in node.ok()
    assert len(node.docker_runs()) == 1


def test_resume_downloads_only_what_is_missing(node: Node) -> None:
    node.hub.pause = 5
    process = node.start()
    deadline = time.monotonic() + 20
    partial = node.models / f"{REVISION}.partial"
    while not (partial / "README.md").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143, err
    assert "glm: error" not in err
    assert partial.is_dir()
    assert not (node.models / REVISION).exists()
    there = {path.name for path in partial.iterdir() if path.is_file()}
    assert there
    before = dict(node.hub.downloads)
    node.hub.pause = 0
    node.ok()
    assert all(node.hub.downloads[name] == before[name] for name in there)


def test_leftovers_of_a_killed_client_do_not_pile_up(node: Node) -> None:
    cache = node.models / f"{REVISION}.partial" / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.etag.0123abcd.incomplete").write_bytes(b"x" * 5000)
    (cache / "abc.etag.incomplete").write_bytes(b"an older client goes on from this")
    node.environment["DOCKER_SAYS"] = "1 Error: no"
    node.error()
    assert [path.name for path in cache.iterdir()] == ["abc.etag.incomplete"]


def test_a_truncated_shard_left_by_a_crash_is_replaced(node: Node) -> None:
    partial = node.models / f"{REVISION}.partial"
    partial.mkdir(parents=True)
    (partial / SHARDS[1]).write_bytes(model()[SHARDS[1]][:777])
    (partial / SHARDS[0]).write_bytes(model()[SHARDS[0]])
    node.ok()
    assert node.content()[SHARDS[1]] == model()[SHARDS[1]]
    assert node.hub.downloads[SHARDS[0]] == 0


def test_a_shard_that_the_hub_truncates(node: Node) -> None:
    node.hub.served[SHARDS[1]] = model()[SHARDS[1]][:-3]
    message = node.error()
    assert f"{SHARDS[1]}: expected 200000 bytes, found 199997" in message
    assert "nothing was put into service" in message
    assert node.hub.downloads[SHARDS[1]] == 2
    assert node.hub.downloads[SHARDS[0]] == 1
    assert node.names() == {f"{REVISION}.partial"}


def test_a_flipped_byte_at_the_same_size(node: Node) -> None:
    node.ok()
    node.hub.revisions[SECOND][SHARDS[2]] = b"other weights" * 10_000
    good = node.hub.revisions[SECOND][SHARDS[2]]
    node.hub.served[SHARDS[2]] = flip(good)
    message = node.error(SECOND)
    assert f"{SHARDS[2]}: expected sha256 " in message
    assert ", found sha256 " in message
    assert node.names() == {REVISION, f"{SECOND}.partial"}
    # The hub is mended: only the bad file is downloaded again.
    node.hub.served.clear()
    before = sum(node.hub.downloads.values())
    node.ok(SECOND)
    assert sum(node.hub.downloads.values()) == before + 1
    assert node.content(SECOND)[SHARDS[2]] == good


def test_a_byte_that_flips_once_is_healed(node: Node) -> None:
    partial = node.models / f"{REVISION}.partial"
    partial.mkdir(parents=True)
    (partial / SHARDS[0]).write_bytes(flip(model()[SHARDS[0]]))
    assert "downloading it once more" in node.ok()
    assert node.content()[SHARDS[0]] == model()[SHARDS[0]]
    assert node.sources() == {"hub": TOTAL}


def test_what_an_earlier_run_has_brought_is_told_apart(node: Node) -> None:
    node.ok()
    partial = node.models / f"{SECOND}.partial"
    partial.mkdir()
    (partial / SHARDS[0]).hardlink_to(node.models / REVISION / SHARDS[0])
    (partial / SHARDS[1]).write_bytes(model()[SHARDS[1]])
    node.ok(SECOND)
    readme = len(b"# Second\n")
    linked = TOTAL - len(model()["README.md"]) - len(model()[SHARDS[1]])
    assert node.sources() == {
        "an earlier revision": linked,
        "an earlier run": len(model()[SHARDS[1]]),
        "hub": readme,
    }


def test_started_by_hand_it_leaves_no_result(node: Node) -> None:
    del node.environment["RUNTIME_DIRECTORY"]
    node.ok()
    assert not list(node.runtime.iterdir())


def test_damage_at_rest_is_repaired_in_place(node: Node) -> None:
    node.ok()
    shard = node.models / REVISION / SHARDS[0]
    other = (node.models / REVISION / SHARDS[1]).stat().st_ino
    engine = shard.open("rb")
    shard.chmod(0o644)
    shard.write_bytes(flip(model()[SHARDS[0]]))
    assert "6 files checked again, 1 replaced" in node.ok()
    assert node.sources() == {"hub": 200_000}
    assert node.content()[SHARDS[0]] == model()[SHARDS[0]]
    assert (node.models / REVISION / SHARDS[1]).stat().st_ino == other
    assert sum(node.hub.downloads.values()) == 7
    assert len(engine.read()) == 200_000
    engine.close()
    assert node.names() == {REVISION}


def test_a_file_that_is_not_of_the_revision_is_removed(node: Node) -> None:
    node.ok()
    stray = node.models / REVISION / "old" / SHARDS[0]
    stray.parent.mkdir()
    stray.write_bytes(b"of another revision")
    node.ok()
    assert not stray.parent.exists()
    assert node.content()[SHARDS[0]] == model()[SHARDS[0]]
    assert (node.models / REVISION / ".glm-manifest.json").exists()


def test_damage_that_cannot_be_repaired_is_no_longer_complete(node: Node) -> None:
    node.ok()
    (node.models / REVISION / SHARDS[0]).write_bytes(b"short")
    node.hub.served[SHARDS[0]] = flip(model()[SHARDS[0]])
    assert SHARDS[0] in node.error()
    assert not (node.models / REVISION / ".glm-manifest.json").exists()
    node.hub.served.clear()
    node.ok()
    assert (node.models / REVISION / ".glm-manifest.json").exists()


def test_files_of_an_earlier_revision_are_linked(node: Node) -> None:
    node.ok()
    assert "earlier revision" in node.ok(SECOND)
    assert node.sources() == {"an earlier revision": TOTAL - len(b"# GLM\n"), "hub": len(b"# Second\n")}
    assert node.hub.downloads["README.md"] == 2
    assert all(node.hub.downloads[shard] == 1 for shard in SHARDS)
    assert node.content(SECOND)["README.md"] == b"# Second\n"
    assert node.content()["README.md"] == b"# GLM\n"
    assert (node.models / REVISION / SHARDS[0]).samefile(node.models / SECOND / SHARDS[0])


def test_a_damaged_earlier_revision_is_no_seed(node: Node) -> None:
    node.ok()
    (node.models / REVISION / SHARDS[0]).write_bytes(flip(model()[SHARDS[0]]))
    node.ok(SECOND)
    assert node.content(SECOND)[SHARDS[0]] == model()[SHARDS[0]]
    assert node.sources()["hub"] == 200_000 + len(b"# Second\n")
    assert node.hub.downloads[SHARDS[0]] == 2


def test_old_revisions_are_removed_but_not_one_in_use(node: Node) -> None:
    (node.models / "notes").mkdir(parents=True)
    node.ok()
    node.releases[0].mkdir()
    (node.releases[0] / "release.json").write_text(json.dumps({"model": {"revision": REVISION}}))
    node.ok(SECOND)
    node.ok(THIRD, keep=1)
    assert node.names() == {REVISION, THIRD, "notes"}


def test_a_download_that_was_given_up_is_removed_after_the_next(node: Node) -> None:
    (node.models / f"{SECOND}.partial").mkdir(parents=True)
    node.ok()
    assert node.names() == {REVISION}


def test_files_that_the_revision_does_not_list_are_removed(node: Node) -> None:
    partial = node.models / f"{REVISION}.partial"
    (partial / "figures").mkdir(parents=True)
    (partial / "figures" / "old.png").write_bytes(b"x")
    node.ok()
    assert not (node.models / REVISION / "figures").exists()
    assert not (node.models / REVISION / ".cache").exists()


def test_an_index_with_a_shard_that_is_not_listed(node: Node) -> None:
    del node.hub.revisions[SECOND][SHARDS[2]]
    message = node.error(SECOND)
    assert f"names 1 shards that the hub does not list, first {SHARDS[2]}" in message
    assert SECOND not in node.names()


def test_unauthorized_is_final(node: Node) -> None:
    node.hub.need_token = True
    message = node.error()
    assert "answers 401" in message
    assert "set glm_hf_token_file" in message
    assert len(node.docker_runs()) == 1


def test_a_vanished_revision_is_named(node: Node) -> None:
    node.hub.faults["/resolve/"] = (404, {}, 99)
    message = node.error()
    assert f"answers 404 for README.md of {REPO} at revision {REVISION}" in message


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_hub_in_trouble_is_tried_again(node: Node, status: int) -> None:
    node.hub.faults["/resolve/"] = (status, {}, 2)
    node.ok()


def test_a_hub_that_stays_in_trouble(node: Node) -> None:
    node.hub.faults[SHARDS[0]] = (503, {}, 99)
    message = node.error()
    assert f"of 6 files could not be downloaded, first {SHARDS[0]}: the hub at" in message
    assert "answers 503" in message
    # One run ends with files more, two without.
    assert len(node.docker_runs()) == 2


def test_a_hub_that_asks_to_wait_for_long(node: Node) -> None:
    node.hub.faults["/resolve/"] = (429, {"Retry-After": "1800"}, 99)
    assert "answers 429 (too many requests): try again in 30 min" in node.error(stall_timeout=45)


def test_a_hub_that_says_when_to_ask_again(node: Node) -> None:
    node.hub.faults["/resolve/"] = (429, {"RateLimit": '"resolvers";r=0;t=1800'}, 99)
    assert "answers 429 (too many requests): try again in 30 min" in node.error()


def test_a_wait_that_the_hub_asks_for_is_kept(node: Node) -> None:
    node.hub.faults["README.md"] = (429, {"Retry-After": "2"}, 1)
    assert "answers 429 (too many requests); next attempt in 2 s" in node.ok()


def stall() -> int:
    """Seconds within which the client has begun, also on a crowded machine."""
    return math.ceil(2 * crowd())


def test_a_client_that_hangs_is_ended(node: Node) -> None:
    node.hub.pause = 120
    limit = stall()
    assert node.error(stall_timeout=limit).endswith(f": no byte for {limit} s; run it again to go on from here")
    assert not any("HF_HUB_DISABLE_XET=1" in argv for argv in node.docker_runs())


def disabled(runs: list[list[str]]) -> list[bool]:
    return ["HF_HUB_DISABLE_XET=1" in argv for argv in runs]


def test_what_xet_cannot_bring_comes_by_plain_http(node: Node) -> None:
    node.hub.xet = True
    limit = stall()
    out = node.ok(stall_timeout=limit, attempts=1)
    assert f"\nno byte for {limit} s by Xet: going on by plain HTTP\n" in out
    runs = node.docker_runs()
    assert disabled(runs) == [False, True]
    # The small files, which are not Xet's, came the first time.
    assert sorted(runs[1][-3:]) == SHARDS
    assert node.hub.downloads["README.md"] == 1
    content = node.content()
    del content[".glm-manifest.json"]
    assert content == model()
    # The next run tries Xet again.
    node.ok(SECOND)
    assert not disabled(node.docker_runs())[2]


def test_neither_xet_nor_plain_http(node: Node) -> None:
    node.hub.xet = True
    node.hub.pause = 120
    limit = stall()
    message = node.error(stall_timeout=limit)
    assert message.endswith(
        f"3 of 6 files could not be downloaded, first {SHARDS[0]}: no byte for {limit} s by plain HTTP either;"
        " run it again to go on from here"
    )
    assert disabled(node.docker_runs()) == [False, True, True]


@pytest.mark.parametrize("disabled", [False, True])
def test_a_file_is_noted_while_xet_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: bool) -> None:
    def bring(_repo: str, file: str, **_options: str) -> None:
        if file == "breaks off":
            raise OSError(file)

    client = SimpleNamespace(
        constants=SimpleNamespace(HF_HUB_DISABLE_XET=disabled),
        hf_hub_url=lambda _repo, file, revision: file,
        get_hf_file_metadata=lambda url: SimpleNamespace(etag=url, xet_file_data=url != "of git"),
        hf_hub_download=bring,
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    failure = load("hub-download").download(REPO, REVISION, str(tmp_path), ["whole", "of git", "breaks off"])
    assert failure["file"] == "breaks off"
    assert [path.name for path in tmp_path.rglob("*.xet")] == ([] if disabled else ["breaks off.xet"])


def test_plain_http_does_not_go_on_from_what_xet_began(node: Node) -> None:
    """Older clients have one name for both: what Xet left has holes, what HTTP left has not."""
    cache = node.models / f"{REVISION}.partial" / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    by_xet, by_http = "a" * 64, "b" * 64
    for etag in (by_xet, by_http):
        (cache / f"hash=.{etag}.incomplete").write_bytes(b"x" * 5000)
    (cache / f"{by_xet}.xet").touch()
    node.environment["DOCKER_SAYS"] = "1 Error: no"
    node.error()
    assert [path.name for path in cache.iterdir()] == [f"hash=.{by_http}.incomplete"]


def test_unreachable_hub(node: Node) -> None:
    message = node.error(endpoint="http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in message


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (
            "125 docker: Error response from daemon: No such image: vllm\n\nRun 'docker run --help' for more of it",
            "is not on this node",
        ),
        ('127 docker: OCI runtime create failed: exec: "python3": not found', "has no huggingface_hub"),
        ('1 {"error": "no client", "text": "No module named"}', "has no huggingface_hub"),
        ('1 {"error": "disk full", "text": "OSError: [Errno 28] No space left on device"}', "no space left while"),
        ("137 Killed", "Killed"),
        ("137 ", "hub-download ended with exit code 137"),
    ],
)
def test_an_end_of_the_client_becomes_one_line(node: Node, says: str, expected: str) -> None:
    node.environment["DOCKER_SAYS"] = says
    assert expected in node.error()


def test_a_body_that_is_shorter_than_its_head_said(node: Node) -> None:
    node.hub.sizes["README.md"] = 9
    message = node.error(attempts=5)
    assert "first README.md: OSError: Consistency check failed: file should be of size 9 but has size 6" in message
    assert len(node.docker_runs()) == 2


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(28, "No space left on device"), "disk full", "OSError: [Errno 28] No space left on device"),
        (RuntimeError("Xet: No space left on device (os error 28)"), "disk full", "RuntimeError: Xet: "),
        (PermissionError(13, "Permission denied"), "other", "PermissionError: [Errno 13] Permission denied"),
        (ValueError("too large\nmore"), "other", "ValueError: too large"),
    ],
)
def test_errors_without_an_answer_of_the_hub(error: Exception, kind: str, text: str) -> None:
    explained = load("hub-download").explain(error)
    assert explained["error"] == kind
    assert explained["text"].startswith(text) and "\n" not in explained["text"]


def test_a_full_disk_is_told_before_the_download(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load()
    config = module.Config.read(node.configure())
    config.partial.mkdir(parents=True)
    usage = module.shutil.disk_usage(node.path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(module.Failure, match=r"no space left .* needed, 1\.0 kB free .*glm_data_dir"):
        module.make_complete(config, module.threading.Event())
    assert not node.docker_log.exists()


def hold(node: Node, holder: str) -> int:
    """The lock, as another node has it."""
    node.models.mkdir(exist_ok=True)
    descriptor = os.open(node.models / ".glm-lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, f"{holder}\n".encode())
    return descriptor


def test_of_two_nodes_one_fetches_and_the_other_waits_for_it(node: Node) -> None:
    descriptor = hold(node, "node-2")
    process = node.start()
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2)
    # What node-2 leaves behind.
    manifest = Hub(node.hub.endpoint).manifest(REPO, REVISION)
    for path, content in model().items():
        (node.models / REVISION / path).parent.mkdir(parents=True, exist_ok=True)
        (node.models / REVISION / path).write_bytes(content)
    (node.models / REVISION / ".glm-manifest.json").write_text(json.dumps(manifest))
    os.close(descriptor)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "waiting for node-2, which works in" in out
    assert "complete: 6 files, fetched and checked by node-2" in out
    assert node.sources() == {}
    assert not node.docker_log.exists()


def test_a_node_that_was_lost_leaves_the_rest_to_the_next(node: Node) -> None:
    os.close(hold(node, "node-2"))
    assert "complete: 6 files" in node.ok()
    assert (node.models / ".glm-lock").read_text() == f"{socket.gethostname()}\n"


def test_files_are_copied_from_a_directory_of_the_user_and_checked(node: Node) -> None:
    source = node.path / "shared"
    (source / "more").mkdir(parents=True)
    shards = [name for name in model() if name.endswith(".safetensors")]
    (source / "blobs").mkdir()
    for name in shards:
        # As the hub's own cache has them.
        (source / "blobs" / name).write_bytes(model()[name])
        (source / name).symlink_to(source / "blobs" / name)
    (source / shards[0]).unlink()
    (source / shards[0]).write_bytes(flip(model()[shards[0]]))
    (source / "more/notes.txt").write_text("not of the model")
    said = node.ok(sources=[str(source)])
    assert f"400.0 kB from {source}" in said
    assert node.sources() == {"hub": TOTAL - 400_000, str(source): 400_000}
    assert f"{source} gave a wrong {shards[0]}" in said
    content = node.content()
    content.pop(".glm-manifest.json")
    assert content == model()
    fetched = {name for run in node.docker_runs() for name in run if name.endswith(".safetensors")}
    assert fetched == {shards[0]}


def test_a_source_that_is_not_mounted_is_named(node: Node) -> None:
    assert "glm_weights_sources: /nowhere is no directory on this node: is it mounted?" in node.error(
        sources=["/nowhere"]
    )


def test_a_source_with_another_revision_is_refused_and_nothing_changed(node: Node) -> None:
    source = node.path / "shared"
    source.mkdir()
    (source / ".glm-manifest.json").write_text(json.dumps({"revision": SECOND, "files": []}))
    line = node.error(sources=[str(source)])
    assert f"{source} has revision {SECOND}, and {REVISION} is wanted: set glm_model_revision" in line
    assert node.names() == set()


def test_sources_are_tried_in_their_order_and_the_hub_for_the_rest(node: Node) -> None:
    first = node.path / "first"
    first.mkdir()
    (first / SHARDS[0]).write_bytes(model()[SHARDS[0]])
    mirror = f"{node.hub.endpoint}/{REPO}/resolve/{REVISION}"
    node.hub.faults[f"/resolve/{REVISION}/{SHARDS[1]}"] = (404, {}, 1)
    said = node.ok(sources=[str(first), "http://127.0.0.1:9/none", mirror])
    assert f" kB from {first}" in said and f" kB from {mirror}" in said
    rest = TOTAL - 400_000
    assert node.sources() == {str(first): 200_000, mirror: rest, "hub": 200_000}
    fetched = {name for run in node.docker_runs() for name in run if name.endswith(".safetensors")}
    assert fetched == {SHARDS[1]}
    content = node.content()
    content.pop(".glm-manifest.json")
    assert content == model()


def test_nothing_is_removed_from_a_file_system_that_others_share(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision in (REVISION, SECOND):
        node.ok(revision, keep=1)
    assert node.names() == {SECOND}
    weights_fetch = load()
    monkeypatch.setattr(weights_fetch, "mount_of", lambda path: mounts.Mount("/mnt", "nfs4"))
    config = weights_fetch.Config.read(node.configure(THIRD, keep=1))
    (node.models / THIRD).mkdir()
    weights_fetch.prune(config)
    assert node.names() == {SECOND, THIRD}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/var/lib/glm/models", ("/var/lib/glm", "nfs4")),
        ("/var/lib/glmx", ("/", "ext4")),
        ("/srv/my disk/x", ("/srv/my disk", "fuse.weka")),
        ("/", ("/", "ext4")),
    ],
)
def test_the_file_system_of_a_path(path: str, found: tuple[str, str], tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:9 / /var/lib/glm rw shared:3 - ext4 /dev/sdb rw\n"
        "3 1 0:5 / /var/lib/glm rw shared:3 - nfs4 server:/x rw\n"
        "4 1 0:6 / /srv/my\\040disk rw - fuse.weka weka rw\n"
    )
    mount = mounts.mount_of(path, str(table))
    assert (mount.point, mount.kind) == found
    assert mounts.is_shared(mount.kind) is (mount.kind != "ext4")


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", ""),
        ("nfs", "rw,vers=3,local_lock=posix", ""),  # flock(2) goes to the server all the same
        ("nfs", "rw,vers=3,nolock,local_lock=all", "nolock"),
        ("nfs4", "rw,vers=4.0,local_lock=flock", "local_lock=flock"),
        ("lustre", "rw,flock,lazystatfs", ""),
        ("lustre", "rw,localflock", "localflock"),
        ("cifs", "rw,nobrl", "nobrl"),
        ("fuse.glusterfs", "rw,user_id=0,allow_other", ""),
        ("fuse.sshfs", "rw,user_id=0,allow_other", "fuse.sshfs"),
        ("ext4", "rw,nolock", ""),
    ],
)
def test_where_a_lock_holds_for_one_machine_alone(kind: str, options: str, found: str, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:5 / /srv rw shared:3 - {kind} server:/x {options}\n")
    assert mounts.local_locks(mounts.mount_of("/srv/models", str(table))) == found


def test_an_unreadable_configuration(node: Node) -> None:
    path = node.path / "bad.json"
    path.write_text("{")
    result = subprocess.run([sys.executable, PROGRAM, path], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("glm: error: ")


def test_progress_goes_to_systemd(node: Node) -> None:
    address = str(node.path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        node.environment["NOTIFY_SOCKET"] = address
        node.hub.pause = 2.5
        node.ok()
        sock.settimeout(0)
        said = []
        while True:
            try:
                said.append(sock.recv(4096).decode())
            except BlockingIOError:
                break
    assert any(line.startswith("STATUS=downloading ") and "of 600." in line for line in said)
    assert said[-1].startswith("STATUS=complete: 6 files")
