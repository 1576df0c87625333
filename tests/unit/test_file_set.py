"""file_set: what it writes, what it leaves alone, what it takes back."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.action.file_set import in_place
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import mounts
from ansible_collections.glm.fleet.plugins.modules import file_set, node_info


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def apply(check: bool = False, **params: Any) -> file_set.FileSet:
    for item in params.get("files", []) + params.get("directories", []):
        item["path"] = str(item["path"])
        for key, value in {"mode": "0644", "owner": None, "group": None, "sensitive": False}.items():
            item.setdefault(key, value)
    wanted = {"files": [], "directories": [], "links": [], "absent": [], "validate": [], **params}
    done = file_set.FileSet(wanted, check)
    done.apply()
    return done


def test_installs_and_then_leaves_alone(tmp_path: Path) -> None:
    def wanted() -> dict[str, Any]:
        return {
            "files": [
                {"path": tmp_path / "a/b/unit", "content": "[Unit]"},
                {"path": tmp_path / "secret", "content": "s\n", "mode": "0600"},
            ],
            "directories": [{"path": tmp_path / "data", "mode": "0750"}],
            "links": [{"path": str(tmp_path / "current"), "target": "data"}],
        }

    os.umask(0o077)
    assert len(apply(**wanted()).changed) == 4
    os.umask(0o022)
    assert (tmp_path / "a/b/unit").read_text() == "[Unit]\n"
    assert mode_of(tmp_path / "a/b") == 0o755
    assert mode_of(tmp_path / "secret") == 0o600
    assert mode_of(tmp_path / "data") == 0o750
    assert os.readlink(tmp_path / "current") == "data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "current", "data", "secret"]
    again = apply(**wanted())
    assert again.changed == [] and again.diff == []


def test_check_mode_writes_nothing_and_says_what_would(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("one\n")
    done = apply(
        check=True,
        files=[
            {"path": tmp_path / "old", "content": "two\n", "owner": "no-such-user"},
            {"path": tmp_path / "new/file", "content": "x\n"},
        ],
        absent=[str(tmp_path / "old")],
    )
    assert (tmp_path / "old").read_text() == "one\n" and not (tmp_path / "new").exists()
    assert done.diff[0]["before"] == "one\n" and done.diff[0]["after"] == "two\n"
    assert len(done.changed) == 3


def test_a_missing_owner_is_refused_outside_of_check_mode(tmp_path: Path) -> None:
    with pytest.raises(file_set.Refused, match="there is no user no-such-user on this node"):
        apply(files=[{"path": tmp_path / "f", "content": "", "owner": "no-such-user"}])


def test_a_mode_alone_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x\n")
    os.chmod(tmp_path / "f", 0o644)
    done = apply(files=[{"path": tmp_path / "f", "content": "x\n", "mode": "0600"}])
    assert mode_of(tmp_path / "f") == 0o600
    assert done.diff[0]["before"].startswith("mode 0644") and done.diff[0]["after"].startswith("mode 0600")


def test_sensitive_content_is_in_no_diff(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old-secret\n")
    done = apply(files=[{"path": tmp_path / "f", "content": "new-secret\n", "sensitive": True}])
    assert "secret" not in json.dumps(done.diff[0]["before"] + done.diff[0]["after"])
    assert (tmp_path / "f").read_text() == "new-secret\n"


def test_a_refused_file_takes_the_whole_set_back(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("old\n")
    os.chmod(tmp_path / "map", 0o640)
    with pytest.raises(file_set.Refused, match=r"haproxy.cfg: sh refuses the new content: bad line 3"):
        apply(
            directories=[{"path": tmp_path / "dir", "mode": "0755"}],
            files=[
                {"path": tmp_path / "sub/haproxy.cfg", "content": "nonsense"},
                {"path": tmp_path / "map", "content": "new\n", "mode": "0600"},
            ],
            validate=[
                {
                    "path": str(tmp_path / "sub/haproxy.cfg"),
                    "command": ["sh", "-c", "test -f %s && echo bad line 3 >&2; exit 1"],
                }
            ],
        )
    assert (tmp_path / "map").read_text() == "old\n" and mode_of(tmp_path / "map") == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map"]


def test_the_validator_sees_the_name_and_the_other_files(tmp_path: Path) -> None:
    script = f"test $(basename %s) = x.service && grep -q new {tmp_path}/env"
    apply(
        files=[{"path": tmp_path / "x.service", "content": "a"}, {"path": tmp_path / "env", "content": "new"}],
        validate=[{"path": str(tmp_path / "x.service"), "command": ["sh", "-c", script]}],
    )


@pytest.mark.parametrize(("command", "refused"), [(["no-such-program"], False), (["false"], True)])
def test_check_mode_validates_where_it_can(tmp_path: Path, command: list[str], refused: bool) -> None:
    (tmp_path / "f").write_text("old\n")
    params = {
        "files": [{"path": tmp_path / "f", "content": "new"}],
        "validate": [{"path": str(tmp_path / "f"), "command": command}],
    }
    if refused:
        with pytest.raises(file_set.Refused):
            apply(check=True, **params)
    else:
        apply(check=True, **params)


def test_links_are_switched_and_absent_paths_removed(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("releases/1")
    (tmp_path / "tree/deep").mkdir(parents=True)
    done = apply(
        links=[{"path": str(tmp_path / "current"), "target": "releases/2"}],
        absent=[str(tmp_path / "tree"), str(tmp_path / "nothing")],
    )
    assert os.readlink(tmp_path / "current") == "releases/2"
    assert done.changed == [str(tmp_path / "current"), str(tmp_path / "tree")]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"path": "relative", "content": ""}, "is not an absolute path"),
        ({"path": "/tmp", "content": ""}, "is not a file"),
        ({"path": "/tmp/x", "content": "", "mode": "rw"}, "is not octal"),
    ],
)
def test_bad_input_is_one_line(item: dict[str, Any], says: str) -> None:
    with pytest.raises(file_set.Refused, match=says):
        apply(files=[item])


def test_a_set_that_is_known_to_be_in_place_costs_no_round_trip(tmp_path: Path) -> None:
    """By what node_info reads of what the module itself has made."""
    wanted: dict[str, Any] = {
        "files": [
            {"path": f"{tmp_path}/etc/a.conf", "content": "one", "mode": "0600"},
            {"path": f"{tmp_path}/etc/b.conf", "content": "two\n"},
        ],
        "directories": [{"path": f"{tmp_path}/cache", "mode": "0700"}],
        "links": [{"path": f"{tmp_path}/current", "target": "etc"}],
        "absent": [f"{tmp_path}/etc/c.conf"],
    }

    patterns = [f"{tmp_path}/*", f"{tmp_path}/etc/*"]
    assert not in_place(wanted, node_info.managed(patterns))
    apply(**wanted)
    assert in_place(wanted, node_info.managed(patterns))
    assert not in_place({"absent": [f"{tmp_path}/deep/er/x"]}, node_info.managed(patterns)), "nobody looked there"
    for change in (
        lambda: (tmp_path / "etc/a.conf").write_text("other"),
        lambda: (tmp_path / "etc/b.conf").chmod(0o600),
        (tmp_path / "etc/c.conf").touch,
        (tmp_path / "cache").rmdir,
        (tmp_path / "current").unlink,
    ):
        apply(**wanted)
        change()
        assert not in_place(wanted, node_info.managed(patterns))


def test_a_file_system_within_a_directory_is_not_removed_with_it(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:5 / {tmp_path}/data/models rw - nfs4 server:/x rw\n")
    assert mounts.mounts_below(f"{tmp_path}/data", str(table)) == [f"{tmp_path}/data/models"]
    assert mounts.mounts_below(f"{tmp_path}/data/models", str(table)) == []
