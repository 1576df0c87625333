"""What the deployment tells monitoring of itself: the program, its unit, and what it costs."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.filter.programs import node_package
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.metrics import series
from exposure import MOST, exposure
from loading import load_file
from test_haproxy_template import template

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/metrics/files/metrics-state"
STATE = load_file(PROGRAM, "metrics_state")
RELEASE = {
    "id": "0123456789ab",
    "engine": "vllm",
    "profile": "reference",
    "image": "vllm/vllm-openai:glm52-cu129",
    "image_digest": "sha256:" + "a" * 64,
    "model_revision": "b" * 40,
}
SERVING = {"phase": "serving", "since": "2026-07-01T12:00:00Z"}
# As HAProxy 2.6 answers; 2.4 and 3.0 have these lines too.
CERTIFICATE = "Filename: /etc/glm/gateway/tls.pem\nStatus: Used\nnotBefore: Jul  1 00:00:00 2026 GMT\nnotAfter: {}\n"


def systemctl(directory: Path, **shown: str) -> str:
    """A PATH on which systemctl shows this unit."""
    unit = {"LoadState": "loaded", "ActiveState": "active", "NRestarts": "0", **shown}
    text = "".join(f"echo {name}={value}\n" for name, value in unit.items())
    program = directory / "bin/systemctl"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\n[ "$2" = glm-engine.service ] || exit 3\n{text}')
    program.chmod(0o755)
    return f"{program.parent}:/usr/bin:/bin"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node that serves."""
    for name, value in (
        ("release.json", RELEASE),
        ("state.json", SERVING),
        ("verify.json", {"time": "2026-07-01T12:05:00Z", "ok": True, "failed": []}),
        ("watchdog.json", {"restarts": 2, "time": "2026-07-01T11:00:00Z"}),
    ):
        (tmp_path / name).write_text(json.dumps(value))
    monkeypatch.setenv("PATH", systemctl(tmp_path))
    monkeypatch.setattr(STATE, "SOCKET", str(tmp_path / "admin.sock"))
    monkeypatch.setattr(STATE, "ACCOUNTS", str(tmp_path / "accounts.prom"))
    return tmp_path


def written(node: Path) -> dict[str, float]:
    """By name and labels what the program has written of a node."""
    file = node / "textfile/glm.prom"
    file.parent.mkdir(exist_ok=True)
    assert STATE.main([str(node), str(node), str(file)]) == 0
    assert file.stat().st_mode & 0o777 == 0o644, "node-exporter is not root"
    assert [path.name for path in file.parent.iterdir()] == ["glm.prom"], "nothing half-written stays"
    return {name + labels: value for name, labels, value in series(file.read_text())}


def test_a_node_that_serves(node: Path) -> None:
    seen = written(node)
    assert abs(seen.pop("glm_state_written_timestamp_seconds") - time.time()) < 5
    labels = (
        f'release="0123456789ab",image_digest="{RELEASE["image_digest"]}",engine="vllm",profile="reference",'
        f'model_revision="{RELEASE["model_revision"]}"'
    )
    assert seen == {
        f"glm_release_info{{{labels}}}": 1,
        'glm_phase_info{phase="serving"}': 1,
        "glm_phase_since_timestamp_seconds": 1782907200,
        "glm_engine_up": 1,
        "glm_engine_gave_up": 0,
        'glm_engine_restarts_total{by="systemd"}': 0,
        'glm_engine_restarts_total{by="watchdog"}': 2,
        "glm_verify_ok": 1,
        "glm_verify_timestamp_seconds": 1782907500,
    }


@pytest.mark.parametrize(
    ("active", "up", "gave_up"), [("active", 1, 0), ("activating", 0, 0), ("failed", 0, 1), ("inactive", 0, 0)]
)
def test_the_engine_is_what_its_unit_is(
    node: Path, monkeypatch: pytest.MonkeyPatch, active: str, up: int, gave_up: int
) -> None:
    monkeypatch.setenv("PATH", systemctl(node, ActiveState=active, NRestarts="3"))
    seen = written(node)
    assert (seen["glm_engine_up"], seen["glm_engine_gave_up"]) == (up, gave_up)
    assert seen['glm_engine_restarts_total{by="systemd"}'] == 3


def test_a_check_that_failed(node: Path) -> None:
    (node / "verify.json").write_text(json.dumps({"time": "2026-07-01T12:05:00Z", "ok": False, "failed": ["sum"]}))
    assert written(node)["glm_verify_ok"] == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"phase": "serving", "since": "yesterday", "ok": true, "time": null}']
)
def test_what_is_not_known_has_no_metric(node: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A gateway; a bare node; one whose files were damaged."""
    for name in ("release.json", "state.json", "verify.json", "watchdog.json"):
        (node / name).write_text(text)
    monkeypatch.setenv("PATH", systemctl(node, LoadState="not-found", ActiveState="inactive"))
    seen = written(node)
    assert not [name for name in seen if name.startswith(("glm_engine", "glm_phase_since", "glm_verify_timestamp"))]
    assert "glm_state_written_timestamp_seconds" in seen


def test_a_host_without_systemd_still_tells_the_rest(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", systemctl(node))
    (node / "bin/systemctl").write_text("#!/bin/sh\nexit 1\n")
    seen = written(node)
    assert "glm_engine_up" not in seen and seen['glm_phase_info{phase="serving"}'] == 1


@contextmanager
def haproxy(path: Path, answer: str) -> Iterator[list[str]]:
    """Answers one command as HAProxy's socket does."""
    asked: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(4096).decode().strip())
                connection.sendall(answer.encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        thread.join(5)


def test_the_certificate_is_the_one_that_haproxy_shows(node: Path) -> None:
    with haproxy(node / "admin.sock", CERTIFICATE.format("Sep 29 12:00:00 2026 GMT")) as asked:
        seen = written(node)
    assert asked == ["show ssl cert /etc/glm/gateway/tls.pem"]
    assert seen["glm_certificate_expires_timestamp_seconds"] == 1790683200


def test_an_edge_without_tls_has_no_certificate(node: Path) -> None:
    with haproxy(node / "admin.sock", "Can't display the certificate: Not found or the certificate is a bundle!\n"):
        assert "glm_certificate_expires_timestamp_seconds" not in written(node)


def test_the_accounts_come_along(node: Path) -> None:
    (node / "accounts.prom").write_text(
        '# TYPE glm_account_requests_total counter\nglm_account_requests_total{key="a"} 7\n'
    )
    assert written(node)['glm_account_requests_total{key="a"}'] == 7


def test_a_label_may_hold_anything() -> None:
    text = STATE.text_of(iter([("glm_phase_info", {"phase": 'a"b\\c\nd'}, 1)]))
    assert text.splitlines()[-1] == r'glm_phase_info{phase="a\"b\\c\nd"} 1'


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert STATE.main([]) == 2
    assert "metrics-state RELEASE DATA_DIRECTORY FILE" in capsys.readouterr().err


def test_every_metric_has_its_help_and_type(node: Path) -> None:
    written(node)
    text = (node / "textfile/glm.prom").read_text()
    for name in {name for name, *_ in series(text)}:
        kind = "counter" if name.endswith("_total") else "gauge"
        assert text.count(f"# TYPE {name} {kind}\n") == 1 and text.count(f"# HELP {name} ") == 1


def test_the_recorded_metrics_are_those_that_it_writes() -> None:
    """Rules and dashboards go by what was recorded."""
    recorded = {name for name, *_ in series((ROOT / "tests/fixtures/metrics/glm.prom").read_text())}
    assert {name for name in recorded if not name.startswith("glm_account_")} == set(STATE.HELP)


def test_it_takes_a_hundredth_of_a_core_at_most(node: Path) -> None:
    """Every 15 s, as the timer says, beside an engine whose cores are its own."""
    (interval,) = [
        float(line.partition("=")[2])
        for line in template("glm-metrics.timer.j2").splitlines()
        if line.startswith("OnUnitInactiveSec=")
    ]
    program = node / "bin/metrics-state"
    program.write_bytes(PROGRAM.read_bytes())
    program.chmod(0o755)
    for file in node_package(f"{node}/lib/metrics"):
        path = Path(file["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file["content"])
    (node / "bin/systemctl").unlink()  # the machine's own
    command = [program, node, node, node / "glm.prom"]
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}

    def used() -> float:
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return now.ru_utime + now.ru_stime

    runs, before = 5, used()
    for _ in range(runs):
        subprocess.run(command, env=environment, check=True)
    seconds = (used() - before) / runs
    assert seconds < interval / 100, f"{seconds:.3f} s of CPU each"


def unit(tmp_path: Path, name: str, **variables: Any) -> Path:
    file = tmp_path / name
    file.write_text(template(f"{name}.j2", **variables))
    return file


def test_the_unit_may_do_no_more_than_it_must(tmp_path: Path) -> None:
    named = {"metrics_data_dir": "/var/lib/glm", "__metrics_textfiles": "/var/lib/prometheus/node-exporter"}
    assert exposure(unit(tmp_path, "glm-metrics.service", **named)) <= MOST
