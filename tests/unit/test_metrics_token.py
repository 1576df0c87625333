"""The token of those who read metrics: made once on the controller, and in no output."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from test_api_keys import encrypt, run_task

TOKEN = "t" * 43


def test_it_is_made_once_and_shown_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "keys/metrics-token"
    task = {"glm.fleet.metrics_token": {"path": str(path)}}

    promised = run_task(task, "--check", directory=tmp_path)
    assert promised["changed"] and len(promised["sha256"]) == 64 and not path.exists()

    first = run_task(task, "--diff", directory=tmp_path)
    token = path.read_text().strip()
    assert first["changed"] and first["sha256"] == hashlib.sha256(token.encode()).hexdigest() != promised["sha256"]
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700

    second = run_task(task, "--check", directory=tmp_path)
    assert not second["changed"] and second["sha256"] == first["sha256"]
    assert token not in first["output"] + second["output"]


def test_a_job_whose_files_are_lost_makes_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics-token"
    task = {"glm.fleet.metrics_token": {"path": str(path), "ephemeral": True}}
    refused = run_task(task, directory=tmp_path)
    assert "lost with this job" in refused["msg"] and "\n" not in refused["msg"]
    assert refused["failure"]["id"] == "metrics_token" and refused["failure"]["nothing_changed"]
    assert not path.exists()
    path.write_text(TOKEN)
    path.chmod(0o600)
    assert run_task(task, directory=tmp_path)["sha256"] == hashlib.sha256(TOKEN.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (TOKEN, 0o644, "is open to others (mode 0644): chmod 600"),
        ("", 0o600, "holds no token"),
        ("short", 0o600, "holds no token"),
        (f"{TOKEN} name", 0o600, "holds no token"),
        (f"{TOKEN}\n{TOKEN}\n", 0o600, "holds no token"),
    ],
)
def test_another_file_is_refused_in_a_line_without_it(tmp_path: Path, text: str, mode: int, said: str) -> None:
    path = tmp_path / "metrics-token"
    path.write_text(text)
    path.chmod(mode)
    refused = run_task({"glm.fleet.metrics_token": {"path": str(path)}}, directory=tmp_path)
    assert said in refused["msg"] and "\n" not in refused["msg"]
    assert TOKEN not in refused["output"]


def test_one_that_vault_has_encrypted_may_be_open_to_all(tmp_path: Path) -> None:
    path, password = tmp_path / "metrics-token", tmp_path / "password"
    path.write_text(f"{TOKEN}\n")
    encrypt(path, password)
    task = {"glm.fleet.metrics_token": {"path": str(path)}}
    seen = run_task(task, "--vault-password-file", str(password), directory=tmp_path)
    assert seen["sha256"] == hashlib.sha256(TOKEN.encode()).hexdigest()
