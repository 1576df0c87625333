"""node_status: what it reads, and what it makes of what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.modules import node_status


def read(tmp_path: Path, **more: Any) -> dict[str, Any]:
    params = {"base_dir": str(tmp_path), "data_dir": str(tmp_path), "metrics": {}, "socket": str(tmp_path / "none")}
    result: dict[str, Any] = node_status.status({**params, **more})
    return result


def test_a_bare_node_is_all_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_status, "driver", lambda: None)
    monkeypatch.setattr(node_status, "unit_state", lambda _: None)
    assert set(read(tmp_path).values()) == {None}


def test_what_the_files_say(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    (tmp_path / "current/run").touch()
    release = {"id": "r", "engine": "vllm", "image": "i", "image_digest": "d", "model_revision": "m"}
    (tmp_path / "current/release.json").write_text(json.dumps(release))
    (tmp_path / "state.json").write_text(json.dumps({"phase": "serving", "since": "s", "reason": None}))
    (tmp_path / "verify.json").write_text(json.dumps({"time": "t", "ok": True, "failed": []}))
    seen = read(tmp_path)
    assert (seen["phase"], seen["release"], seen["engine"], seen["image_digest"]) == ("serving", "r", "vllm", "d")
    assert seen["verified"]["ok"] is True
    assert seen["in_flight"] is None and seen["edge"] is None


def test_a_link_to_a_release_that_is_gone_is_said(tmp_path: Path) -> None:
    """The state says that it serves, and systemd passes over the engine's next start."""
    (tmp_path / "state.json").write_text(json.dumps({"phase": "serving", "since": "s", "reason": "of before"}))
    link = tmp_path / "current"
    link.symlink_to("releases/abc")
    said = f"{link} points to releases/abc, where no release is: the engine cannot be started: run site.yml"
    assert read(tmp_path)["reason"] == said
    (tmp_path / "releases/abc").mkdir(parents=True)
    assert read(tmp_path)["reason"] == said
    (tmp_path / "releases/abc/run").touch()
    assert read(tmp_path)["reason"] == "of before"


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_state_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    assert read(tmp_path)["phase"] is None


def test_the_driver_is_the_loaded_one(tmp_path: Path) -> None:
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.211.01  Release Build\n"
    (tmp_path / "version").write_text(line)
    assert node_status.driver(str(tmp_path / "version")) == "570.211.01"
