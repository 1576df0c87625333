"""What the images that are made of pinned wheels share: install them by uv, and build only what has changed.

Wheels are fetched on this host, with its pip's own settings, into uv's cache in $GLM_CACHE (~/.cache/glm-fleet); the
builds themselves need no index. TORCH_INDEX names where PyTorch's CPU builds are, for a host whose pip settings do not
lead to them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("GLM_CACHE", Path.home() / ".cache/glm-fleet"))
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
LABEL = "glm-fleet.inputs"
# Of Debian 12, which the engines' images stand on.
PYTHON = ["--python-version", "3.11", "--python-platform", f"{platform.machine()}-manylinux_2_36"]
UV = Path(__file__).resolve().parents[2] / "tools/uv"
# A build that is ended takes its scratch directory away, as one that fails does.
signal.signal(signal.SIGTERM, lambda *_: sys.exit("images · error: ended"))


def say(image: str, text: str) -> None:
    print(f"images · {image} · {text}\n", end="", flush=True)  # one write: others print beside it


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        sys.exit(f"images · error: {Path(str(command[0])).name}: {tail}")


def docker(*arguments: str) -> list[str]:
    socket = os.environ.get("DOCKER_HOST", "") or os.access("/var/run/docker.sock", os.W_OK)
    return ["docker", *arguments] if socket else ["sudo", "-n", "docker", *arguments]


def label_of(name: str) -> str:
    what = f'{{{{index .Config.Labels "{LABEL}"}}}}'
    done = subprocess.run(docker("image", "inspect", "-f", what, name), capture_output=True, text=True, check=False)
    return done.stdout.strip()


def hash_of(*inputs: Path | str) -> str:
    digest = hashlib.sha256()
    for part in inputs:
        digest.update(part.read_bytes() if isinstance(part, Path) else f"\n{part}\n".encode())
    return digest.hexdigest()[:16]


def install(requirements: Path, site: Path) -> None:
    """The pinned wheels, unpacked under `site`. Its files are links into uv's cache: replace, never rewrite them."""
    command = [
        UV,
        "pip",
        "install",
        "--quiet",
        "--only-binary=:all:",
        "--no-deps",
        *PYTHON,
        "--target",
        site,
        "-r",
        requirements,
    ]
    if subprocess.run(list(map(str, command)), capture_output=True, check=False).returncode != 0:
        shutil.rmtree(site, ignore_errors=True)
        run(*command, "--index", TORCH_INDEX, "--index-strategy", "unsafe-best-match")
