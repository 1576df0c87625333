"""What a unit's program tells systemd, and how it writes sizes and times."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

UNITS = ("B", "kB", "MB", "GB", "TB")
SIZE = rf"([\d.]+) ({'|'.join(UNITS)})"
METER = re.compile(rf"{SIZE} of {SIZE}(?:, {SIZE}/s)?")
ORIGIN = re.compile(rf"{SIZE} from (?:the (?=hub))?([^,]+)")


def notify(message: str) -> bool:
    """Tells systemd, as sd_notify(3) does; False where it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    # It may be re-executing just now.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.sendall(message.encode())
    return True


def status(text: str) -> None:
    """A line for `systemctl status`; without systemd, for the terminal."""
    if not notify(f"STATUS={text}"):
        print(text, flush=True)  # pylint: disable=ansible-bad-function # by programs, never by a module


def human(count: float) -> str:
    """Bytes, in decimal units."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def origins(sizes: Mapping[str, int]) -> str:
    """Bytes by where they came from."""
    return ", ".join(f"{human(size)} from {called(source)}" for source, size in sizes.items())


def called(source: str) -> str:
    """A source in a sentence."""
    return "the hub" if source == "hub" else source


def measured(text: str) -> dict[str, Any]:
    """What a Meter wrote, as it rounded it: `done` and `total` in bytes, `rate` in bytes/s; empty without one.

    Where its note has origins() they are the `sources`.
    """
    found = METER.search(text)
    if not found:
        return {}
    numbers = iter(found.groups())
    result: dict[str, Any] = dict(zip(("done", "total", "rate"), map(size_in, numbers, numbers)))
    sources = {name: size_in(count, unit) for count, unit, name in ORIGIN.findall(text)}
    return {**result, "sources": sources} if sources else result


def size_in(count: str | None, unit: str | None) -> int:
    return round(float(count) * 1000 ** UNITS.index(unit)) if count and unit else 0


class Meter:
    """Bytes, rate over the last half minute, and the time left."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb = verb
        self.total = total
        self.samples: collections.deque[tuple[float, int]] = collections.deque()
        self.reported = 0.0

    def report(self, done: int, note: str = "", now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if now - self.reported >= 2:
            self.reported = now
            status(self.text(done, note, now))

    def text(self, done: int, note: str = "", now: float | None = None) -> str:
        now = time.monotonic() if now is None else now
        self.samples.append((now, done))
        while len(self.samples) > 2 and now - self.samples[0][0] > 30:
            self.samples.popleft()
        parts = [f"{self.verb} {human(done)} of {human(self.total)}".lstrip()]
        began, before = self.samples[0]
        rate = (done - before) / (now - began) if now > began else 0.0
        if rate > 0:
            left = max(self.total - done, 0) / rate
            # The first moments say nothing about the rest.
            parts += [f"{human(rate)}/s"] + ([f"ETA {duration(left)}"] if left < 2 * 86400 else [])
        return ", ".join(parts + ([note] if note else []))
