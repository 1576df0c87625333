"""The journal of a run: one JSON object a line, in the file that the environment variable GLM_FLEET_JOURNAL names."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from ansible.utils.display import Display
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.systemd import measured

PATH = "GLM_FLEET_JOURNAL"


def line(what: str, **facts: Any) -> dict[str, Any]:
    """When, what, and what belongs to it."""
    return {"at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "what": what, **facts}


def write(what: str, **facts: Any) -> None:
    """Adds a line; without the variable there is no journal. The controller and its workers may write at once.

    What cannot be written is lost, and the run goes on: that is said once.
    """
    path = os.environ.get(PATH)
    if not path:
        return
    text = json.dumps(line(what, **facts), ensure_ascii=False, default=str) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, text.encode(errors="backslashreplace"))
        finally:
            os.close(descriptor)
    except OSError as problem:
        with suppress(OSError):  # Ansible says the same warning once
            Display().warning(f"{path}: the journal has gaps: {problem.strerror}")


def show(host: str, text: str) -> None:
    """How far long work is: on the terminal, and in the journal."""
    Display().display(f"{host} · {text}")
    write("progress", host=host, text=text, **measured(text))
