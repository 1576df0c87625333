"""What the images that are made of pinned wheels share: fetch them once, and build only what has changed.

Wheels are fetched on this host, by its own pip with its own settings, into $GLM_CACHE/wheels (GLM_CACHE:
~/.cache/glm-fleet); the builds themselves need no index. TORCH_INDEX names where PyTorch's CPU builds are, for a host
whose pip settings do not lead to them.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("GLM_CACHE", Path.home() / ".cache/glm-fleet"))
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
LABEL = "glm-fleet.inputs"
TARGET = ["--python-version", "3.11", "--only-binary=:all:", "--no-deps", "--disable-pip-version-check", "-q"]


def say(image: str, text: str) -> None:
    print(f"images · {image} · {text}", flush=True)


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


def fetch_wheels(pip: str, requirements: Path) -> Path:
    """Every pinned wheel in the cache; asks the index only for what is missing."""
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    held = {"-".join(path.name.split("-")[:2]).lower() for path in wheels.glob("*.whl")}
    pins = [line for line in requirements.read_text().splitlines() if "==" in line]
    missing = [pin for pin in pins if re.sub("[-.]", "_", pin.split("==")[0]) + "-" + pin.split("==")[1] not in held]
    if not missing:
        return wheels
    say("wheels", f"fetching {len(missing)}")
    command = [pip, "download", *TARGET, "-d", str(wheels)]
    ordinary = [pin for pin in missing if not pin.startswith("torch==")]
    if ordinary:
        run(*command, *ordinary)
    if len(ordinary) < len(missing):
        torch = next(pin for pin in missing if pin.startswith("torch=="))
        if subprocess.run([*command, torch], capture_output=True, check=False).returncode != 0:
            run(*command, "--index-url", TORCH_INDEX, torch)
    return wheels


def install(pip: str, requirements: Path, site: Path) -> None:
    """The pinned wheels, unpacked under `site`."""
    wheels = fetch_wheels(pip, requirements)
    where = ["--no-index", "--find-links", str(wheels), "--target", str(site)]
    run(pip, "install", *TARGET, *where, "--no-compile", "-r", requirements)
