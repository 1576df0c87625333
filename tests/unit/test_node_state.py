"""node_state: what it writes, and when it leaves the file alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_json, write_whole
from ansible_collections.glm.fleet.plugins.modules import node_state

WANTED = {"failure": {}, "phase": "serving", "release": "a", "previous": "", "rollout_id": "1", "reason": ""}


def test_first_state() -> None:
    assert node_state.next_state({}, WANTED, "now") == {
        "phase": "serving",
        "release": "a",
        "previous": None,
        "rollout_id": "1",
        "since": "now",
        "reason": None,
        "failure": None,
    }


def test_another_run_of_the_same_changes_nothing() -> None:
    before = node_state.next_state({}, WANTED, "then")
    assert node_state.next_state(before, {**WANTED, "rollout_id": "2"}, "now") is before


@pytest.mark.parametrize("change", [{"phase": "failed"}, {"release": "b"}, {"previous": "c"}, {"reason": "why"}])
def test_a_change_has_its_own_time(change: dict[str, Any]) -> None:
    before = node_state.next_state({}, WANTED, "then")
    assert node_state.next_state(before, {**WANTED, **change}, "now")["since"] == "now"


def test_written_whole_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    state = node_state.next_state({}, WANTED, "now")
    node_state.write_state(str(path), state)
    assert read_json(str(path)) == state == json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]
    path.write_text("{")
    assert read_json(str(path)) == {}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A timer that writes each minute would fill the disk that is full already."""
    path = tmp_path / "state.json"
    path.mkdir()
    with pytest.raises(OSError, match=r"state\.json"):
        write_whole(path, "{}")
    assert list(tmp_path.iterdir()) == [path]
