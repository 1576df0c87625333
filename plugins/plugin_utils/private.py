"""Files of the controller that are for their owner alone."""

from __future__ import annotations

import os
import stat
import tempfile


class Refused(Exception):
    """What the user has to put right, in one line."""


def write(path: str, text: str) -> None:
    """For its owner alone, whole or not at all; a link stays one."""
    path = os.path.realpath(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_private(path: str) -> None:
    """Raises Refused where others can read it."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise Refused(f"{path} is open to others (mode {mode:04o}): chmod 600 {path}")
