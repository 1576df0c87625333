#!/usr/bin/python
"""Read a bundle on the mirror's host, and say what is wrong with it before anything is changed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_info
short_description: Read a bundle and check its signature, that it is whole, and that the mirror has room
description:
  - Checks the manifest's signature with the C(sqv) or C(gpgv) that apt brings, by the given key alone.
  - Looks for each part of each file by its size. Their hashes are checked as they are brought to the mirror.
  - Reads only; runs the same in check mode.
options:
  path: {description: The bundle's directory., type: path, required: true}
  key: {description: 'The public key, ASCII-armored.', type: str, required: true, no_log: false}
  directory: {description: Where the mirror keeps its files., type: path, required: true}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read the bundle
  glm.fleet.bundle_info:
    path: /media/disk/bundle
    key: "{{ lookup('ansible.builtin.file', 'keys/mirror.asc') }}\n"
    directory: /srv/glm-mirror
  register: seen
"""

RETURN = r"""
bundle:
  description: What the manifest says of the release, without its files; empty after a problem.
  returned: always
  type: dict
manifest_sha256: {description: Of the manifest as it was checked., returned: always, type: str}
problems: {description: 'What is wrong, one line each; empty if nothing is.', returned: always, type: list}
serves: {description: The id of the bundle that the mirror serves; empty if none., returned: always, type: str}
apt_sources: {description: The files in which the host names sources of packages., returned: always, type: list}
nginx: {description: Whether nginx is installed., returned: always, type: bool}
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import apt_sources
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_json
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.store import (
    MANIFEST,
    SIGNATURE,
    Store,
    free_bytes,
    size_of,
)
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.systemd import human

SCHEMA = 1
RESERVE = 1 << 30


class Problem(Exception):
    """What is wrong with the bundle, in one line."""


def dearmored(key: str) -> bytes:
    """The bytes of an armored key: gpgv takes no other. The line of the checksum is left out."""
    found = re.search(
        r"-----BEGIN PGP PUBLIC KEY BLOCK-----\n(?:[^\n]+: [^\n]*\n)*\n(.*?)\n(?:=[^\n]+\n)?-----END", key, re.S
    )
    if not found:
        raise Problem("glm_mirror_key_file holds no public key: bring the one that playbooks/bundle.yml wrote")
    return base64.b64decode(found.group(1))


def check_signature(directory: Path, key: str) -> bytes:
    """The manifest's text, as it was checked: the disk may be another user's."""
    program = next((name for name in ("sqv", "gpgv") if shutil.which(name)), "")
    if not program:
        raise Problem("neither sqv nor gpgv is on this host, of which apt needs one: is it Debian or Ubuntu?")
    text = (directory / MANIFEST).read_bytes()
    with tempfile.TemporaryDirectory() as own:
        ring, signature, copy = (Path(own) / name for name in ("ring", SIGNATURE, MANIFEST))
        ring.write_bytes(dearmored(key))
        signature.write_bytes((directory / SIGNATURE).read_bytes())
        copy.write_bytes(text)
        command = [program, "--keyring", str(ring), str(signature), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise Problem(
            f"the signature of {directory / MANIFEST} is not by the key in glm_mirror_key_file: bring the bundle once "
            "more, and the key from where it was made"
        )
    return text


def read(directory: Path, key: str) -> tuple[dict[str, Any], str]:
    """The manifest and its sha256."""
    for name in (MANIFEST, SIGNATURE):
        if not (directory / name).is_file():
            raise Problem(
                f"glm_bundle_dir: {directory / name} is not there: set it to the bundle's directory on this host, or "
                "let playbooks/bundle.yml end first"
            )
    text = check_signature(directory, key)
    manifest = json.loads(text)
    if manifest.get("schema") != SCHEMA:
        raise Problem(f"{directory / MANIFEST} is of another version of this project: make the bundle with this one")
    return manifest, hashlib.sha256(text).hexdigest()


def missing(files: list[dict[str, Any]], store: Store, there: Path) -> tuple[list[Path], int]:
    """Parts that neither the bundle nor the mirror has, and the bytes that the mirror has to take."""
    lacking: dict[Path, None] = {}
    needed = 0
    for sha256, size in {item["sha256"]: item["size"] for item in files}.items():
        if size_of(there / "blobs" / sha256[:2] / sha256) == size:
            continue
        needed += size
        lacking.update(dict.fromkeys(store.lacks(sha256, size)))
    return list(lacking), needed


def problems(manifest: dict[str, Any], bundle: Path, directory: Path) -> list[str]:
    lacking, needed = missing(manifest["files"], Store(bundle), directory)
    found = []
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        found.append(
            f"the bundle {manifest['id']} is not whole: {lacking[0]}{more} is missing or too short: bring it once more"
        )
    room = free_bytes(directory)
    if needed and needed + RESERVE > room:
        found.append(
            f"glm_mirror_dir: {human(needed + RESERVE)} are needed in {directory}, and {human(room)} are free: free "
            "some, or set it to a larger disk"
        )
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "key": {"type": "str", "required": True, "no_log": False},
            "directory": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    bundle, directory = Path(module.params["path"]), Path(module.params["directory"])
    description: dict[str, Any] = {}
    sha256 = ""
    try:
        manifest, sha256 = read(bundle, module.params["key"])
        found = problems(manifest, bundle, directory)
        description = {name: value for name, value in manifest.items() if name != "files"}
    except (Problem, ValueError, KeyError, OSError) as problem:
        found = [str(problem) if isinstance(problem, Problem) else f"{bundle / MANIFEST} cannot be read: {problem}"]
    module.exit_json(
        changed=False,
        bundle=description,
        manifest_sha256=sha256,
        problems=found,
        serves=str(read_json(directory / "current/bundle.json").get("id", "")),
        apt_sources=list(dict.fromkeys(source.path for source in apt_sources())),
        nginx=os.access("/usr/sbin/nginx", os.X_OK),
    )


if __name__ == "__main__":
    main()
