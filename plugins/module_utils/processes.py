"""What /proc tells of other processes."""

from __future__ import annotations

import contextlib
import os


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
