"""The real Claude Code, with given settings and with nothing of whoever runs the tests."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

INSTALL = Path(__file__).resolve().parent / "claude/install"
# It may speak to the endpoint alone.
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}


@functools.cache
def program() -> str:
    return subprocess.run([INSTALL], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def sourced(path: Path) -> dict[str, str]:
    """What a shell without an environment has after it has read the file."""
    command = ["/bin/sh", "-c", f". '{path}' && env -0"]
    text = subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in text.split("\0") if line)


def ask(settings: dict[str, str], folder: Path, prompt: str, *arguments: str, seconds: int = 300) -> dict[str, Any]:
    """What `claude -p` says of one turn in `folder`, as it says it in JSON."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [program(), "-p", "--output-format", "json", *arguments],
        input=prompt,
        cwd=folder,
        env={**settings, **QUIET, "HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.stdout.startswith("{"), f"{done.returncode}: {done.stdout} {done.stderr}"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
