"""A bundle's files by content: each one once under its sha256, in parts that any file system and medium takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# One byte less than 4 GiB is the largest file of FAT32.
PART = (1 << 32) - (1 << 20)
BLOCK = 1 << 20
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.asc"


class Store:
    """The directory `blobs` of a bundle. What is in it was right when it came; whoever reads it hashes it again."""

    def __init__(self, bundle: Path, part: int = PART) -> None:
        self.blobs = bundle / "blobs"
        self.incoming = bundle / "incoming"
        self.part = part

    def parts(self, sha256: str, size: int) -> Iterator[tuple[Path, int]]:
        """Where a file's parts are, and how many bytes each has."""
        place = self.blobs / sha256[:2] / sha256
        if size <= self.part:
            yield place, size
            return
        for number, begin in enumerate(range(0, size, self.part)):
            yield place.with_name(f"{sha256}.{number:03d}"), min(self.part, size - begin)

    def lacks(self, sha256: str, size: int) -> list[Path]:
        """The parts that are not there, or not whole."""
        return [path for path, length in self.parts(sha256, size) if size_of(path) != length]

    def has(self, sha256: str, size: int) -> bool:
        return not self.lacks(sha256, size)

    def put(self, path: Path, sha256: str) -> None:
        """Takes a file over, which is gone then. The last part goes first: an interruption leaves the file whole."""
        size = path.stat().st_size
        parts = list(self.parts(sha256, size))
        parts[0][0].parent.mkdir(parents=True, exist_ok=True)
        for number, (place, _length) in reversed(list(enumerate(parts))):
            if number:
                begin = number * self.part
                scratch = self.incoming / place.name
                with path.open("r+b") as source, scratch.open("wb") as target:
                    source.seek(begin)
                    shutil.copyfileobj(source, target, BLOCK)
                    sync(target)
                scratch.replace(place)
                os.truncate(path, begin)
        path.replace(parts[0][0])

    def add(self, content: bytes, sha256: str) -> None:
        """Puts a small file in."""
        if not self.has(sha256, len(content)):
            self.incoming.mkdir(parents=True, exist_ok=True)
            scratch = self.incoming / sha256
            scratch.write_bytes(content)
            self.put(scratch, sha256)

    def read(self, sha256: str, size: int) -> Iterator[bytes]:
        for path, _length in self.parts(sha256, size):
            with path.open("rb") as stream:
                while block := stream.read(BLOCK):
                    yield block

    def prune(self, files: Iterable[Mapping[str, Any]]) -> int:
        """Removes what none of these files is made of; returns the bytes."""
        wanted = {path for file in files for path, _length in self.parts(file["sha256"], file["size"])}
        freed = 0
        for path in self.blobs.glob("*/*"):
            if path not in wanted:
                freed += path.stat().st_size
                path.unlink()
        return freed


def size_of(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def free_bytes(directory: Path) -> int:
    """Where it is, or is to be."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def has_links(directory: Path) -> bool:
    """Whether its file system has hard links, as those of disks to be carried often have not."""
    first, second = directory / "link", directory / "link.2"
    first.touch()
    try:
        os.link(first, second)
    except OSError:
        return False
    finally:
        first.unlink()
        second.unlink(missing_ok=True)
    return True


def sync(stream: Any) -> None:
    """What is called there must be on the disk, not only in the page cache."""
    stream.flush()
    os.fsync(stream.fileno())
