"""Which file system a path is on, whether other machines have the same one, and whether its locks hold between them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .files import read_text

SHARED = {
    *("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "glusterfs", "gpfs", "beegfs", "wekafs", "ocfs2", "gfs2"),
    *("9p", "virtiofs", "afs", "orangefs", "panfs"),
}
# FUSE is of all kinds: most mount something over the network, these do not.
LOCAL_FUSE = {"fuse.lxcfs", "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.ntfs", "fuse.gocryptfs"}
# Options by which flock(2) is of one machine alone: of NFS, Lustre, CIFS, and GFS2 and OCFS2.
LOCAL_LOCKS = {"nolock", "local_lock=flock", "local_lock=all", "localflock", "noflock", "nobrl", "localflocks"}
# Programs that leave flock(2) to the kernel of each machine.
WITHOUT_LOCKS = {"fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"}


TABLE = "/proc/self/mountinfo"


class Mount(NamedTuple):
    """Where, of what type, and with which options."""

    point: str = ""
    kind: str = ""
    options: tuple[str, ...] = ()


def mounts(table: str = TABLE) -> Iterator[Mount]:
    """In the order in which they were mounted."""
    for line in read_text(table).splitlines():
        before, _separator, after = line.partition(" - ")
        fields, of_the_system = before.split(), after.split()
        if len(fields) >= 5 and of_the_system:
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match.group(1), 8)), fields[4])
            yield Mount(point, of_the_system[0], tuple(of_the_system[-1].split(",")))


def mount_of(path: str, table: str = TABLE) -> Mount:
    """What a path, which need not exist yet, lies on; empty where it is not told."""
    place = os.path.realpath(path)
    found = Mount()
    for mount in mounts(table):
        point = Path(mount.point)
        # Of those at one place the last one counts.
        if (point == Path(place) or point in Path(place).parents) and len(mount.point) >= len(found.point):
            found = mount
    return found


def mounts_below(path: str, table: str = TABLE) -> list[str]:
    """Mount points below a path, not the path itself."""
    return sorted(mount.point for mount in mounts(table) if mount.point.startswith(f"{os.path.realpath(path)}/"))


def is_shared(kind: str) -> bool:
    """Whether a file system of this type may be mounted by several machines."""
    return kind in SHARED or kind == "fuse" or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


def local_locks(mount: Mount) -> str:
    """By what a lock on a shared file system holds within one machine alone; empty where it holds between all."""
    found = [option for option in mount.options if option in LOCAL_LOCKS] if is_shared(mount.kind) else []
    return found[0] if found else mount.kind if mount.kind in WITHOUT_LOCKS else ""
