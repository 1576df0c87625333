"""The hub of the tests, as the real `hf` and the nodes' hub-download see it. All run in the light engine's image."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HUB = ROOT / "molecule/shared/hub"
PROGRAM = ROOT / "roles/model_weights/files/hub-download"
IMAGE = "vllm/vllm-openai:light"
REPO = "zai-org/GLM-5.2-FP8"
FIRST, SECOND = "1" * 40, "2" * 40
SHARDS = {f"model-0000{n}-of-00003.safetensors": bytes(range(256)) * 400 * n for n in (1, 2, 3)}


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()


class Client:
    """`hf` beside a hub, in one container without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, content in {**SHARDS, "config.json": b"{}", "README.md": b"# A model\n", ".inputs": b"1"}.items():
            (folder / "model" / name).write_bytes(content)
        self.name = docker(
            "run", "-d", "--rm", "--network", "none", "-v", f"{HUB}:/hub:ro", "-v", f"{folder}:/t",
            "-v", f"{PROGRAM}:/run/hub-download:ro",
            "-e", "HF_ENDPOINT=http://127.0.0.1:8081", "-e", "HF_HUB_DISABLE_TELEMETRY=1",
            "-e", "HF_HUB_DOWNLOAD_TIMEOUT=3",
            "--entrypoint", "python3", IMAGE, "/hub/hub.py", "/t/model", "--faults", "/t/faults.json",
        )  # fmt: skip

    def hf(self, revision: str = FIRST, repo: str = REPO, limit: int = 40) -> subprocess.CompletedProcess[str]:
        command = ["timeout", str(limit), "hf", "download", repo, "--revision", revision, "--local-dir", "/t/out"]
        return subprocess.run(["docker", "exec", self.name, *command], capture_output=True, text=True, check=False)

    def download(self, *files: str, revision: str = FIRST) -> dict[str, Any]:
        """What hub-download says of its end."""
        command = ["docker", "exec", self.name, "python3", "/run/hub-download", REPO, revision, "/t/out", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
        return dict(json.loads(done.stdout)) if done.returncode else {}

    def faults(self, **faults: object) -> None:
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def got(self, name: str) -> bytes:
        return (self.folder / "out" / name).read_bytes()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "model").mkdir()
    client = Client(tmp_path)
    try:
        ready = "import socket; socket.create_connection(('127.0.0.1', 8081), 1)"
        for _ in range(50):
            if subprocess.run(["docker", "exec", client.name, "python3", "-c", ready], check=False).returncode == 0:
                break
            time.sleep(0.2)
        yield client
    finally:
        # What the client wrote is root's.
        subprocess.run(["docker", "exec", client.name, "rm", "-rf", "/t/out"], check=False)
        docker("rm", "-f", client.name)


def test_a_whole_checkpoint(client: Client) -> None:
    done = client.hf()
    assert done.returncode == 0, done.stderr
    for name, content in SHARDS.items():
        assert hashlib.sha256(client.got(name)).digest() == hashlib.sha256(content).digest()
    assert client.got("README.md") == b"# A model\n"


def test_the_second_revision_differs_in_its_readme(client: Client) -> None:
    assert client.hf(SECOND).returncode == 0
    assert b"Second revision." in client.got("README.md")


def test_a_branch_is_a_commit(client: Client) -> None:
    assert client.hf("main").returncode == 0


def test_what_is_not_there(client: Client) -> None:
    revision, repo = client.hf("3" * 40), client.hf(repo="zai-org/another")
    assert (revision.returncode, repo.returncode) != (0, 0)
    assert "Revision" in revision.stderr + revision.stdout
    assert "not found" in repo.stderr + repo.stdout


def test_files_by_name(client: Client) -> None:
    assert client.download(*SHARDS) == {}
    assert all(client.got(name) == content for name, content in SHARDS.items())


@pytest.mark.parametrize(("status", "after"), [(401, 0), (403, 0), (404, 0), (429, 2), (503, 2)])
def test_files_that_are_refused(client: Client, status: int, after: int) -> None:
    client.faults(file=status)
    end = client.download("README.md", *SHARDS)
    assert (end["error"], end["status"], end["file"], end["retry_after"]) == ("http", status, "README.md", after)


@pytest.mark.parametrize("status", [401, 503])
def test_a_listing_that_is_refused(client: Client, status: int) -> None:
    client.faults(api=status)
    assert client.hf(limit=15).returncode != 0


def test_a_short_file_passes_the_client(client: Client) -> None:
    """A store that holds half a file says so consistently: the client believes it, the role must not."""
    client.faults(truncate="model-00002*")
    assert client.hf().returncode == 0
    name = "model-00002-of-00003.safetensors"
    assert len(client.got(name)) == len(SHARDS[name]) // 2


def test_a_flipped_byte_passes_the_client(client: Client) -> None:
    """The client compares sizes alone, which is why the role compares hashes."""
    client.faults(flip="model-00003*")
    assert client.hf().returncode == 0
    name = "model-00003-of-00003.safetensors"
    assert len(client.got(name)) == len(SHARDS[name])
    assert client.got(name) != SHARDS[name]
