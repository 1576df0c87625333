"""A filter that brings the programs of a node what they import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "module_utils/glm_node"


def node_package(directory: str) -> list[dict[str, str]]:
    """The package glm_node in a directory, as files of file_set: a copy for each role, that fits its programs."""
    return [
        {"path": f"{directory}/{PACKAGE.name}/{file.name}", "content": file.read_text(encoding="utf-8")}
        for file in sorted(PACKAGE.glob("*.py"))
    ]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., list[dict[str, str]]]]:
        return {"node_package": node_package}
