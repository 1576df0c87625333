"""The store of a bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.store import PART, Store


def put(store: Store, content: bytes) -> str:
    store.incoming.mkdir(parents=True, exist_ok=True)
    scratch = store.incoming / "file"
    scratch.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.put(scratch, sha256)
    assert not scratch.exists()
    return sha256


@pytest.mark.parametrize(("size", "parts"), [(0, [0]), (9, [9]), (10, [10]), (11, [10, 1]), (35, [10, 10, 10, 5])])
def test_a_large_file_is_in_parts(tmp_path: Path, size: int, parts: list[int]) -> None:
    store = Store(tmp_path, part=10)
    content = bytes(range(size))
    sha256 = put(store, content)
    assert [path.stat().st_size for path in sorted(store.blobs.rglob("*")) if path.is_file()] == parts
    assert store.has(sha256, size)
    assert b"".join(store.read(sha256, size)) == content
    if size:
        next(iter(sorted(path for path in store.blobs.rglob("*") if path.is_file()))).write_bytes(b"")
        assert not store.has(sha256, size)


def test_no_part_has_4_gib() -> None:
    assert PART < 2**32


def test_what_no_file_is_made_of_goes(tmp_path: Path) -> None:
    store = Store(tmp_path, part=4)
    kept = {"sha256": put(store, b"kept, in parts"), "size": 14}
    put(store, b"other")
    assert store.prune([kept]) == 5
    assert store.has(str(kept["sha256"]), 14)
    assert len(list(store.blobs.glob("*/*"))) == 4


def test_a_small_file_is_added_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sha256 = hashlib.sha256(b"text").hexdigest()
    for _ in range(2):
        store.add(b"text", sha256)
    assert b"".join(store.read(sha256, 4)) == b"text"
    assert not list(store.incoming.iterdir())
