"""apt's sources, read as apt reads them."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_text

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # as Debian names them
OFF = ("no", "false", "0", "off", "without", "disable")


@dataclass(frozen=True)
class Source:
    """One address and suite that apt uses."""

    path: str
    kind: str  # deb, deb-src
    uri: str
    suite: str
    components: str
    signed_by: str

    @property
    def words(self) -> str:
        return " ".join(part for part in (self.uri, self.suite, self.components) if part)

    @property
    def repository(self) -> str:
        return repository(self.uri, self.suite)

    @property
    def keys(self) -> list[str]:
        return sorted(filter(None, re.split(r"[\s,]+", self.signed_by)))


def repository(uri: str, suite: str) -> str:
    """By what apt takes two sources for one: where the Release file lies, without scheme and password."""
    place = re.sub(r"^[^:/]+:(//([^/@]*@)?)?", "", uri).rstrip("/") + "/"
    if suite == "/":
        return place
    return f"{place}{suite}" if suite.endswith("/") else f"{place}dists/{suite}"


def lines_of(text: str) -> Iterator[dict[str, str]]:
    """The lines of a sources.list, with the names that a deb822 file has for their parts."""
    for line in text.splitlines():
        entry = re.match(r"\s*(deb(?:-src)?)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)(.*)", line.split("#", 1)[0])
        if entry:
            kind, options, uri, suite, components = entry.groups()
            key = re.search(r"\bsigned-by=(\S+)", options or "")
            yield {
                "types": kind,
                "uris": uri,
                "suites": suite,
                "components": components,
                "signed-by": key.group(1) if key else "",
            }


def stanzas_of(text: str) -> Iterator[dict[str, str]]:
    """The enabled stanzas of a deb822 file."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", lines):
        values: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                values[key] = f"{values.get(key, '')} {line.strip()}"
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                values[key] = value.strip()
        if values.get("enabled", "yes").lower() not in OFF:
            yield values


def apt_sources(root: str = "/etc/apt", machine: str = "") -> list[Source]:
    """All that apt uses, in its order."""
    base, found = Path(root), []
    machine = machine or platform.machine()
    architecture = ARCHITECTURES.get(machine, machine)
    for path in (base / "sources.list", *sorted((base / "sources.list.d").glob("*"))):
        if not re.fullmatch(r"[\w.-]+\.(list|sources)", path.name):
            continue  # apt passes over it
        for values in (stanzas_of if path.suffix == ".sources" else lines_of)(read_text(path)):
            kinds, uris, suites = (
                values.get(name, "").replace("$(ARCH)", architecture).split() for name in ("types", "uris", "suites")
            )
            components = " ".join(values.get("components", "").split())
            found += [
                Source(str(path), kind, uri, suite, components, values.get("signed-by", "").strip())
                for kind in kinds
                for uri in uris
                for suite in suites
            ]
    return found


def key_conflicts(sources: Iterable[Source]) -> list[tuple[Source, Source]]:
    """Pairs that give one repository different keys: with such a pair apt refuses all work."""
    first: dict[str, Source] = {}
    found = []
    for source in sources:
        before = first.get(source.repository)
        if before is None or not before.keys:
            first[source.repository] = source
        elif before.keys != source.keys:
            found.append((before, source))
    return found
