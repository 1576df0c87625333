"""Files of the controller that are for their owner alone."""

from __future__ import annotations

import os
import stat

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import write_whole

VAULT = b"$ANSIBLE_VAULT"  # what a file begins with that Ansible Vault has encrypted


class Refused(Exception):
    """What the user has to put right, in one line."""


def write(path: str, text: str) -> None:
    """For its owner alone, whole or not at all; a link stays one."""
    write_whole(os.path.realpath(path), text, 0o600)


def is_encrypted(path: str) -> bool:
    """Whether Ansible Vault has: such a file may be open to all, and lie in a repository."""
    with open(path, "rb") as file:
        return file.read(len(VAULT)) == VAULT


def check_private(path: str) -> None:
    """Raises Refused where others can read it, and it is not encrypted."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077 and not is_encrypted(path):
        raise Refused(f"{path} is open to others (mode {mode:04o}): chmod 600 {path}")
