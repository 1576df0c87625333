"""The devices that the Container Device Interface offers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .files import read_text

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")


def parse(text: str) -> list[str]:
    """Qualified device names of one CDI specification, written as JSON or as block-style YAML."""
    try:
        data = json.loads(text)
        return [f"{data['kind']}={device['name']}" for device in data.get("devices", [])]
    except (ValueError, KeyError, TypeError):
        pass
    kind = re.search(r"^kind:\s*[\"']?([^\"'\s]+)", text, re.MULTILINE)
    names = re.findall(r"^(?:- |  |  - |    )name:\s*[\"']?([^\"'\s]+)", text, re.MULTILINE)
    return [f"{kind.group(1)}={name}" for name in names] if kind else []


def files(directories: tuple[str, ...] = DIRECTORIES) -> list[Path]:
    """The specifications that Docker reads."""
    return [path for base in directories for path in sorted(Path(base).glob("*")) if path.suffix in (".yaml", ".json")]


def devices(directories: tuple[str, ...] = DIRECTORIES) -> list[str]:
    """Qualified names of all devices, as nvidia.com/gpu=all."""
    return sorted({device for path in files(directories) for device in parse(read_text(path))})
