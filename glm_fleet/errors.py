"""What a command ends with."""

from __future__ import annotations

import errno
from enum import IntEnum

FULL = (errno.ENOSPC, errno.EDQUOT)


class Exit(IntEnum):
    """The exit codes of every command."""

    OK = 0
    USAGE = 2  # the command, the inventory or the controller's own files
    FAILED = 10  # a node failed; where it was rolled back, the rollout has halted
    UNREACHABLE = 11
    REFUSED = 12  # before anything was changed
    LOCKED = 13  # another rollout holds the lock
    INTERRUPTED = 130  # as a shell says it of SIGINT


class UsageProblem(Exception):
    """Bad input, in one line: what is wrong, where, and what to set or run."""


def one_line(said: object) -> str:
    """What an error of several lines says."""
    return " ".join(str(said).split())
