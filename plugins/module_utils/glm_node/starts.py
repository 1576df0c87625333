"""How often in a row the engine has failed, and how long to wait before it is started again."""

from __future__ import annotations

import contextlib
import json
import os
import time

from .files import read_json

RESTART_SEC = 30  # the unit's own
LONGEST = 1800
# An engine that has served so long has shown that its start is a good one.
PROVEN = 3600


class Starts:
    """A file in the unit's runtime directory, which systemd keeps as long as it restarts the unit by itself."""

    def __init__(self, directory: str = "") -> None:
        directory = directory or os.environ.get("RUNTIME_DIRECTORY", "/run/glm-engine")
        self.path = os.path.join(directory, "starts.json")

    def failures(self) -> int:
        count = read_json(self.path).get("failures")
        return count if isinstance(count, int) else 0

    def pause(self) -> float:
        """Seconds, beside those of the unit: 0, 30, 90 ... after the first, second, third failure."""
        return max(min(RESTART_SEC * 2.0 ** min(self.failures() - 1, 10), LONGEST) - RESTART_SEC, 0)

    def serves(self) -> None:
        self._write({"failures": self.failures(), "serves_since": time.monotonic()})

    def failed(self) -> None:
        since = read_json(self.path).get("serves_since")
        proven = isinstance(since, float) and time.monotonic() - since >= PROVEN
        self._write({"failures": 1 if proven else self.failures() + 1})

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def _write(self, value: dict[str, float]) -> None:
        # A full /run keeps nobody from starting an engine.
        with contextlib.suppress(OSError), open(self.path, "w", encoding="utf-8") as file:
            json.dump(value, file)
