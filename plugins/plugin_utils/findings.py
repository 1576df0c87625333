"""What the filters that validate a node share: a finding, and the words that one is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

GIB = 1024**3
# The first driver branch of each CUDA major version, for where the loaded driver does not tell what it supports.
FIRST_BRANCH_OF_CUDA = {12: 525, 13: 580}


@dataclass(frozen=True)
class Finding:
    """What is wrong (found, wanted), and what to set or run."""

    id: str
    text: str
    fix: str

    @property
    def line(self) -> str:
        return f"{self.id}: {self.text}: {self.fix}"

    def as_dict(self) -> dict[str, str]:
        return {"id": self.id, "text": self.text, "fix": self.fix, "line": self.line}


def versions(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def same_version(one: str, other: str) -> bool:
    """True also where one of the two is shortened, as NVML does."""
    return all(a == b for a, b in zip(versions(one), versions(other)))


def listed(names: Iterable[Any], most: int = 4) -> str:
    """A few names, and how many more."""
    every = [str(name) for name in names]
    more = len(every) - most
    return ", ".join(every[:most]) + (f" and {more} more" if more > 0 else "")


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
