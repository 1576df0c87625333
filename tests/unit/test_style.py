"""What the linters cannot see by themselves: that they are shown every file, and that the environment is pinned."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_ruff_reads_every_program() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["extend-include"]
    first_lines = {path: path.read_bytes().split(b"\n", 1)[0] for path in tracked() if not path.suffix}
    programs = [str(path.relative_to(ROOT)) for path, line in first_lines.items() if re.match(rb"#!.*python", line)]
    assert sorted(programs) == sorted(listed)


def test_every_installed_package_is_pinned() -> None:
    pins = "\n".join(
        (ROOT / name).read_text() for name in ("requirements.txt", "requirements-test.txt", "requirements-uv.txt")
    )
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", pins, re.M)}
    installed = {re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower() for package in metadata.distributions()}
    assert installed - pinned <= {"pip", "glm-fleet"}
    # Whatever an index answers, pip and uv install these files alone.
    bare = re.findall(r"^[\w.-]+==\S+(?: ;[^\\\n]*)?(?! *\\\n +--hash=)$", pins, re.M)
    assert bare == []
