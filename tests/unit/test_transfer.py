"""transfer: one file, hashed as it comes or as it lies there."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import transfer
from small_hub import git_sha1

CONTENT = bytes(range(256)) * 9000  # some blocks and a part of one


def wanted(content: bytes = CONTENT) -> transfer.Wanted:
    return transfer.Wanted("shard", len(content), "sha256", hashlib.sha256(content).hexdigest())


def test_a_file_is_hashed_in_the_hubs_own_kind(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    small = transfer.Wanted("shard", len(CONTENT), "git sha1", git_sha1(CONTENT))
    told: list[int] = []
    for each in (wanted(), small):
        assert transfer.digest(each, tmp_path / "shard", threading.Event(), told.append) == each.digest
    assert sum(told) == 2 * len(CONTENT) and max(told) == transfer.BLOCK


def test_hashing_ends_when_the_program_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    stop = threading.Event()
    told: list[int] = []

    def advance(count: int) -> None:
        told.append(count)
        stop.set()

    with pytest.raises(transfer.Stopped):
        transfer.digest(wanted(), tmp_path / "shard", stop, advance)
    assert told == [transfer.BLOCK]


def test_what_is_there_is_hashed_and_the_rest_as_it_comes(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/shard").write_bytes(CONTENT)
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    came: list[int] = []
    source = transfer.DirectoryOpener(tmp_path / "source")
    transfer.fetch(wanted(), tmp_path / "part", source, "shard", stop=threading.Event(), advance=came.append)
    assert (tmp_path / "part").read_bytes() == CONTENT and sum(came) == len(CONTENT) - 1000


def test_a_wrong_beginning_is_found_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    (tmp_path / "part").write_bytes(b"x" * 1000)
    with pytest.raises(transfer.Wrong, match="expected sha256"):
        transfer.fetch(wanted(), tmp_path / "part", transfer.DirectoryOpener(tmp_path), "shard", stop=threading.Event())
    assert not (tmp_path / "part").exists()
