"""The package that the nodes' programs share: what it tells systemd, and that it lies where each program looks."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.filter.programs import node_package
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import systemd

ROOT = Path(__file__).resolve().parents[2]
# What each program does without its arguments shows that its imports are there.
PROGRAMS = {
    "acceptance/files/accept-node": "/etc/glm/acceptance.json cannot be used",
    "benchmark/files/benchmark_run.py": "IndexError",
    "engine_image/files/image-pull": "the following arguments are required",
    "gateway/files/accounts": "the following arguments are required",
    "gateway/files/gateway-reload.py": "IndexError",
    "inference_service/files/engine-launch": "engine-launch RELEASE",
    "inference_service/files/engine-wait": "engine-wait RELEASE",
    "inference_service/files/engine-watchdog": "engine-watchdog RELEASE",
    "metrics/files/metrics-state": "metrics-state RELEASE",
    "model_weights/files/weights-fetch": "/etc/glm/weights.json cannot be used",
    "site_mirror/files/mirror-import": "/etc/glm/mirror.json cannot be used",
    "nvidia_driver/files/apt-progress": "not enough values to unpack",
}


def test_every_program_that_imports_the_package_is_listed() -> None:
    files = [path for path in ROOT.glob("roles/*/files/*") if path.is_file()]
    programs = [path for path in files if "glm_node" in path.read_text(encoding="utf-8")]
    assert {str(path.relative_to(ROOT / "roles")) for path in programs} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_finds_the_package_of_its_role(program: str, tmp_path: Path) -> None:
    installed = tmp_path / "bin" / Path(program).name
    installed.parent.mkdir()
    installed.write_bytes((ROOT / "roles" / program).read_bytes())
    installed.chmod(0o755)
    for file in node_package(f"{tmp_path}/lib/{program.partition('/')[0]}"):
        path = Path(file["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file["content"], encoding="utf-8")
    # By its first line, as systemd starts it, and so with the node's Python.
    done = subprocess.run([installed], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0 and PROGRAMS[program] in done.stderr
    assert not list(tmp_path.rglob("__pycache__"))


def test_the_meter_tells_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    meter = systemd.Meter("downloading", 755_600_000_000)
    for second in range(0, 61, 2):
        meter.report(second * 512_000_000, "3 of 152 files", now=100.0 + second)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "downloading 30.7 GB of 755.6 GB, 512.0 MB/s, ETA 24 min, 3 of 152 files"
    )


def test_what_the_meter_tells_is_read_back() -> None:
    meter = systemd.Meter("sharing", 755_600_000_000)
    first = meter.text(0, now=10.0)
    assert systemd.measured(first) == {"done": 0, "total": 755_600_000_000, "rate": 0}
    sources = {"hub": 20_000_000_000, "http://mirror:80/glm": 0, "peers": 10_700_000_000}
    note = systemd.origins(sources)
    assert note == "20.0 GB from the hub, 0 B from http://mirror:80/glm, 10.7 GB from peers"
    text = "glm-weights.service · " + meter.text(30_700_000_000, f"3 of 20 files, {note}", now=20.0)
    assert systemd.measured(text) == {
        "done": 30_700_000_000,
        "total": 755_600_000_000,
        "rate": 3_100_000_000,
        "sources": sources,
    }
    assert systemd.measured("waiting 2 min for the next attempt: 3 of 20 files") == {}


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + path if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
        systemd.status("half of it")
        assert listener.recv(100) == b"STATUS=half of it"


def test_a_systemd_that_does_not_listen_ends_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert systemd.notify("READY=1")
