"""An engine's metrics, in Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .endpoint import Server, Wrong, need


def series(text: str) -> Iterator[tuple[str, str, float]]:
    """Name, labels and value of each sample."""
    for name, labels, value in re.findall(r"^([^\s{#]+)(\{.*\})?[ \t]+(\S+)", text, re.MULTILINE):
        yield name, labels, float(value)


def samples(text: str) -> dict[str, float]:
    """Sum of each metric's samples; a family without a sample yet counts 0."""
    sums = {line.split()[2]: 0.0 for line in text.splitlines() if line.startswith("# TYPE ")}
    for name, _labels, value in series(text):
        sums[name] = sums.get(name, 0.0) + value
    return sums


def total(text: str, selector: str) -> float:
    """Sum of a metric's samples, such as requests, or of those with a label, such as requests{method="POST"}.

    All count where none has a label of that name: an engine that calls it something else has not become idle.
    """
    wanted, _brace, label = selector.rstrip("}").partition("{")
    found = [(labels, value) for name, labels, value in series(text) if name == wanted]
    known = any(label.partition("=")[0] + "=" in labels for labels, _value in found)
    return sum(value for labels, value in found if label in labels or not known)


def load(url: str, running: str, waiting: str, timeout: float = 10) -> dict[str, Any]:
    """Requests that the engine works on and that wait in it; null where it does not answer."""
    try:
        answer = Server(url, timeout).request("GET", "/metrics")
        need(answer, 200)
        text = answer.body.decode(errors="replace")
        return {"running": int(total(text, running)), "waiting": int(total(text, waiting))}
    except (Wrong, ValueError):
        return {"running": None, "waiting": None}
