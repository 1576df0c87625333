"""What the checks ask: the project's questions with the changes of a user or of an installed release."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

FILLER_TOKENS = 16  # of a filler sentence, about
# Keys of earlier releases, by question: release.json of an installed one may hold them.
OLD_KEYS = {"tool_call": ("tool", "expect_arguments"), "find_fact": ("repeat",), "agent": ("tool",)}


def with_changes(questions: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The questions with the changes, merged by name; changes in the shape of earlier releases are translated."""
    return _merged(questions, {name: _translated(questions, name, change) for name, change in changes.items()})


def question_problems(changes: Mapping[str, Any], questions: Mapping[str, Any]) -> list[str]:
    """One line for each name in glm_verify_expectations that nobody reads."""
    problems = []
    for name, change in changes.items():
        if name not in questions:
            problems.append(f"glm_verify_expectations: there is no question {name}: {_advice(name, questions)}")
        elif not isinstance(change, Mapping):
            problems.append(f"glm_verify_expectations: {name} is {change!r}: write a mapping such as {{expect: ...}}")
        else:
            known = [*questions[name], *OLD_KEYS.get(name, ())]
            problems += [
                f"glm_verify_expectations: {name} has no {key}: {_advice(key, known)}"
                for key in change
                if key not in known
            ]
    return problems


def _translated(questions: Mapping[str, Any], name: str, change: Any) -> Any:
    """One question's changes with the keys of today, which win where both are given."""
    if not isinstance(change, Mapping):
        return change
    new = {key: value for key, value in change.items() if key not in OLD_KEYS.get(name, ())}
    if name == "find_fact":
        if isinstance(new.get("filler"), str):
            new["filler"] = [new["filler"]]
        if "repeat" in change:
            new.setdefault("tokens", int(change["repeat"]) * FILLER_TOKENS)
    elif name in OLD_KEYS and len(new) < len(change):
        tool = _merged(questions[name]["tools"][0], change.get("tool", {}))
        new.setdefault("tools", [tool])
        if name == "tool_call":
            arguments = _merged(questions[name]["expect_calls"][0]["arguments"], change.get("expect_arguments", {}))
            new.setdefault("expect_calls", [{"name": tool["name"], "arguments": arguments}])
    return new


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As Ansible's combine(recursive=true)."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _advice(name: Any, right: Any) -> str:
    nearest = difflib.get_close_matches(str(name), list(right), n=1, cutoff=0.7)
    return f"did you mean {nearest[0]}?" if nearest else "remove it, or see roles/verify/files/questions.yml"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"with_changes": with_changes, "question_problems": question_problems}
