"""A failure as data, from a task to the node's state, the report and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def failure(
    id: str, text: str, *, host: str = "", fix: str = "", unit: str = "", nothing_changed: bool = False
) -> dict[str, Any]:
    """id: what kind it is, for programs; text: what was found; fix: what to set or run; unit: the systemd unit whose
    journal has more; nothing_changed: whether no node was changed before it; host: empty for the fleet as a whole.
    """
    return {
        "id": id,
        "host": host,
        "text": plain(text),
        "fix": plain(fix),
        "unit": unit,
        "nothing_changed": nothing_changed,
    }


def plain(text: str) -> str:
    """Without what a terminal would obey: the words of a node, or of a program there, are not trusted."""
    return CONTROLS.sub("", text).strip()


def words(found: Mapping[str, Any]) -> str:
    """What was found and what to do, where the host is told beside it."""
    return ": ".join(part for part in (found["text"], found["fix"]) if part)


def render(found: Mapping[str, Any]) -> str:
    """The words for the user, with the host."""
    return f"{found['host']}: {words(found)}" if found["host"] else words(found)


def failure_of(result: Mapping[str, Any], host: str = "") -> dict[str, Any]:
    """That of a task's result, whatever module it was; of a loop, what its items say."""
    if result.get("failure"):
        return dict(result["failure"])
    # From 2.21 on, callbacks are not given `failed`: only an item that failed has `exception` there.
    items = [item for item in result.get("results") or [] if item.get("failed") or "exception" in item]
    if items:
        found = [failure_of(item, host) for item in items]
        return {**found[0], "text": "; ".join(dict.fromkeys(part["text"] for part in found))}
    return failure("task", _text(result), host=host)


def _text(result: Mapping[str, Any]) -> str:
    if "module_stdout" in result and not str(result["module_stdout"]).strip():
        # Ansible says only that it could not parse the answer.
        said = [
            line.strip()
            for line in str(result.get("module_stderr") or "").splitlines()
            if line.strip() and not re.match(r"(Shared )?[Cc]onnection to \S+ closed", line)
        ]
        # A node that goes down empties /tmp, where the module's own files are.
        why = said[-1] if said and "_payload" not in said[-1] else "the node went down, or killed it"
        return f"the step ended without an answer (exit status {result.get('rc')}): {why}"
    return str(result.get("msg") or "see above")
