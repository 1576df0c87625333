"""engine-wait: what it waits for, how long, and how the time between starts grows."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import starts
from loading import load_file

ROOT = Path(__file__).resolve().parents[2]
engine_wait: Any = load_file(ROOT / "roles/inference_service/files/engine-wait", "engine_wait")


class Node:
    """What a boot brings, each thing when the test says so."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.docker: dict[str, str] | None = {"Version": "28.0.0"}
        self.devices = ["nvidia.com/gpu=all"]
        self.needs = {
            "timeout": 5, "weights_marker": str(directory / "weights/.glm-manifest.json"),
            "directories": [str(directory / "cache")], "cdi_device": "nvidia.com/gpu=all", "gpus": 2, "fabric": True,
        }  # fmt: skip
        (directory / "bin").mkdir()
        self.weights()
        self.smi(["Completed", "Completed"])
        monkeypatch.setattr(engine_wait, "docker_get", lambda path: self.docker)
        monkeypatch.setattr(engine_wait.cdi, "devices", lambda: self.devices)
        monkeypatch.setattr(engine_wait, "INTERVAL", 0.05)
        monkeypatch.setenv("PATH", str(directory / "bin"), prepend=":")
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)

    def weights(self) -> None:
        for path in ("weights", "cache"):
            (self.directory / path).mkdir(exist_ok=True)
        (self.directory / "weights/.glm-manifest.json").write_text("{}")

    def smi(self, fabric: list[str]) -> None:
        gpus = "".join(
            f"<gpu><fabric><state>{state}</state><status>Success</status></fabric></gpu>" for state in fabric
        )
        self.program("nvidia-smi", f"echo '<?xml version=\"1.0\" ?><nvidia_smi_log>{gpus}</nvidia_smi_log>'")

    def program(self, name: str, body: str) -> None:
        path = self.directory / "bin" / name
        path.with_suffix(".new").write_text(f"#!/bin/sh\n{body}\n")
        path.with_suffix(".new").chmod(0o755)
        path.with_suffix(".new").replace(path)

    def lacks(self) -> list[str]:
        return list(engine_wait.missing(self.needs))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_a_node_that_has_all_is_not_delayed(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert engine_wait.wait(node.needs) == 0
    assert time.monotonic() - began < 1
    assert capsys.readouterr().out == ""


def test_each_thing_that_lacks_is_named(node: Node) -> None:
    assert node.lacks() == []
    node.docker = None
    assert node.lacks() == ["Docker, which does not answer: systemctl status docker.service"]
    node.docker = {}
    node.devices = ["nvidia.com/gpu=0"]
    assert node.lacks() == ["the CDI device nvidia.com/gpu=all: systemctl status nvidia-cdi-refresh.service"]
    node.devices = ["nvidia.com/gpu=all"]
    node.smi(["Completed", "In Progress"])
    assert node.lacks() == [
        "the NVLink fabric, which is In Progress/Success on 1 of 2 GPUs: systemctl status nvidia-fabricmanager.service"
    ]
    node.smi(["Completed"])
    assert node.lacks() == ["the GPUs: 1 of 2 answer: nvidia-smi, journalctl -k -g NVRM"]
    node.program("nvidia-smi", "echo 'No devices were found'; exit 6")
    assert node.lacks() == ["the GPUs: nvidia-smi says No devices were found"]


def test_a_disk_that_is_not_mounted_is_told_from_an_empty_one(node: Node) -> None:
    weights = node.directory / "weights"
    (weights / ".glm-manifest.json").unlink()
    assert node.lacks() == [
        f"the weights: {weights} has no complete weights: is its disk mounted (findmnt --target {weights})?"
    ]
    weights.rmdir()
    (node.directory / "cache").rmdir()
    assert node.lacks() == [
        f"the weights: {weights} is not there: is its disk mounted (findmnt --target {weights})?",
        f"the directory {node.directory / 'cache'}: is its disk mounted?",
    ]


def test_it_waits_and_says_for_what(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.smi(["In Progress", "In Progress"])
    threading.Timer(0.5, node.smi, [["Completed", "Completed"]]).start()
    assert engine_wait.wait(node.needs) == 0
    said = capsys.readouterr().out
    assert "waits for the NVLink fabric, which is In Progress/Success on 2 of 2 GPUs" in said
    assert "engine-wait: all there after" in said


def test_a_cdi_file_that_was_written_too_early_is_written_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_wait, "REFRESH_INTERVAL", 0.3)
    log = node.directory / "systemctl.log"
    node.program("systemctl", f'echo "$*" >> {log}')
    node.devices = []
    node.smi(["Completed"])
    node.needs["timeout"] = 0.6
    assert engine_wait.wait(node.needs) == 1
    assert not log.exists(), "the GPUs are not there yet"
    node.smi(["Completed", "Completed"])

    def written() -> None:
        node.devices = ["nvidia.com/gpu=all"]

    threading.Timer(1, written).start()
    node.needs["timeout"] = 5
    assert engine_wait.wait(node.needs) == 0
    assert "--no-block restart nvidia-cdi-refresh.service" in log.read_text()


def test_it_does_not_wait_for_ever(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.docker, node.needs["timeout"] = None, 0.2
    assert engine_wait.wait(node.needs) == 1
    assert capsys.readouterr().err == (
        "glm: error: not ready after 0 s: waits for Docker, which does not answer: systemctl status docker.service\n"
    )


def test_a_release_of_before_needs_nothing_and_a_node_without_a_fabric_none(node: Node) -> None:
    node.docker = {}
    assert engine_wait.missing({}) == []
    node.smi(["N/A", "N/A"])
    node.needs["fabric"] = False
    assert node.lacks() == []


def test_the_time_to_the_next_start_doubles_up_to_half_an_hour(tmp_path: Path) -> None:
    record = starts.Starts(str(tmp_path))
    pauses = [record.pause()]
    for _ in range(8):
        record.failed()
        pauses.append(record.pause() + starts.RESTART_SEC)
    assert pauses == [0, 30, 60, 120, 240, 480, 960, 1800, 1800]


def test_an_engine_that_served_an_hour_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, now = starts.Starts(str(tmp_path)), time.monotonic()
    for _ in range(4):
        record.failed()
    record.serves()
    record.failed()
    assert record.failures() == 5, "it served for a moment"
    record.serves()
    monkeypatch.setattr(time, "monotonic", lambda: now + starts.PROVEN + 60)
    record.failed()
    assert record.failures() == 1


def test_a_damaged_record_and_a_full_disk_keep_nobody_from_starting(tmp_path: Path) -> None:
    (tmp_path / "starts.json").write_text('{"fail')
    record = starts.Starts(str(tmp_path))
    assert (record.failures(), record.pause()) == (0, 0)
    (tmp_path / "starts.json").write_text('{"failures": "many"}')
    assert record.failures() == 0
    (tmp_path / "starts.json").write_text('{"failures": 5000}')
    assert record.pause() == starts.LONGEST - starts.RESTART_SEC
    nowhere = starts.Starts(str(tmp_path / "nowhere"))
    nowhere.failed()
    assert nowhere.failures() == 0


@pytest.mark.parametrize(("restarts", "waits"), [("0", False), ("3", True)])
def test_only_systemd_s_own_starts_are_held_back(
    restarts: str, waits: bool, node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node.program("systemctl", f"echo {restarts}")
    record = starts.Starts(str(node.directory))
    record.failed()
    record.failed()
    monkeypatch.setattr(starts, "RESTART_SEC", 1)
    began = time.monotonic()
    engine_wait.back_off(record)
    assert (time.monotonic() - began >= 1) is waits
    assert ("start 3 in 1 s, after 2 failures in a row" in capsys.readouterr().out) is waits
    assert record.failures() == (2 if waits else 0)


def test_a_run_that_forgets_the_failures_ends_the_pause(node: Node) -> None:
    node.program("systemctl", "echo 5")
    record = starts.Starts(str(node.directory))
    for _ in range(6):
        record.failed()
    threading.Timer(0.3, record.forget).start()
    began = time.monotonic()
    engine_wait.back_off(record)
    assert time.monotonic() - began < 10


def test_the_record_is_what_systemd_keeps_over_its_own_restarts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.program("systemctl", "echo 0")
    (node.directory / "release.json").write_text(json.dumps({"id": "0123456789ab", "needs": node.needs}))
    starts.Starts(str(node.directory)).failed()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(node.directory))
    assert engine_wait.main([str(node.directory)]) == 0
    assert not (node.directory / "starts.json").exists()
