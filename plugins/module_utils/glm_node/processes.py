"""What /proc tells of other processes."""

from __future__ import annotations

import contextlib
import os
import re


def open_files(pid: int, proc: str = "/proc") -> list[str]:
    """What each open descriptor of a process points at: a path, or `socket:[INODE]` and the like.

    One that is closed meanwhile is left out. Raises PermissionError where the process may not be looked into, and
    another OSError where it is gone.
    """
    targets = []
    for entry in os.scandir(f"{proc}/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(entry.path))
    return targets


def parse_container_id(cgroup: str, of_the_node: str = "") -> str | None:
    """The innermost container's id in /proc/PID/cgroup.

    `of_the_node` is PID 1's: an id that it holds too names the node, not a container on it.
    """
    ids = re.findall(r"[0-9a-f]{64}", cgroup)
    return next((name for name in reversed(ids) if name not in of_the_node), None)
