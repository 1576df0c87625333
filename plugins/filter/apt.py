"""Which of a node's apt sources names a repository."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import repository


def apt_source(sources: Iterable[Mapping[str, str]], uri: str, suite: str) -> str:
    """The file of the first of `apt.sources` of node_info that names it; empty where none does."""
    wanted = repository(uri, suite)
    return next((source["path"] for source in sources if source["repository"] == wanted), "")


class FilterModule:
    def filters(self) -> dict[str, Callable[..., str]]:
        return {"apt_source": apt_source}
