"""Which file system a path is on, and whether other machines have the same one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .files import read_text

SHARED = {
    *("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "glusterfs", "gpfs", "beegfs", "wekafs", "ocfs2", "gfs2"),
    *("9p", "virtiofs", "afs", "orangefs", "panfs"),
}
# FUSE is of all kinds: most mount something over the network, these do not.
LOCAL_FUSE = {"fuse.lxcfs", "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.ntfs", "fuse.gocryptfs"}


TABLE = "/proc/self/mountinfo"


def mounts(table: str = TABLE) -> Iterator[tuple[str, str]]:
    """Each mount point with its type, in the order in which they were mounted."""
    for line in read_text(table).splitlines():
        before, _separator, after = line.partition(" - ")
        fields = before.split()
        if len(fields) >= 5 and after:
            yield re.sub(r"\\(\d{3})", lambda match: chr(int(match.group(1), 8)), fields[4]), after.split()[0]


def mount_of(path: str, table: str = TABLE) -> tuple[str, str]:
    """The mount point that a path lies below, which need not exist yet, and its type; empty where it is not told."""
    place = os.path.realpath(path)
    found = ("", "")
    for point, kind in mounts(table):
        # Of those at one place the last one counts.
        if (Path(point) == Path(place) or Path(point) in Path(place).parents) and len(point) >= len(found[0]):
            found = (point, kind)
    return found


def mounts_below(path: str, table: str = TABLE) -> list[str]:
    """Mount points below a path, not the path itself."""
    return sorted(point for point, _kind in mounts(table) if point.startswith(f"{os.path.realpath(path)}/"))


def is_shared(kind: str) -> bool:
    """Whether a file system of this type may be mounted by several machines."""
    return kind in SHARED or kind == "fuse" or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
