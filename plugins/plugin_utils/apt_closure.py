"""Packages with all that they depend on, by apt itself in a root of its own: nothing of this machine's apt is used."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Of an empty machine: what a node has already of a closure, apt passes over there.
CONFIGURATION = """\
Dir "{root}/";
Dir::State "state";
Dir::State::status "{root}/status";
Dir::Cache "cache";
Dir::Etc "etc";
Dir::Etc::sourceparts "sources.list.d";
Dir::Etc::preferencesparts "preferences.d";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Get::Assume-Yes "true";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "5";
Debug::NoLocking "true";
"""
URI = re.compile(r"^'(?P<uri>[^']+)' (?P<name>\S+) (?P<size>\d+)(?: SHA256:(?P<sha256>[0-9a-f]{64}))?")
PREFERENCES = "etc/apt/preferences.d"


class Problem(Exception):
    """What apt cannot do, in one line."""


class Package(NamedTuple):
    """A file that apt would download."""

    uri: str
    name: str
    size: int


@dataclass(frozen=True)
class Root:
    """apt's files for one distribution, below a directory that stays for the next time."""

    directory: Path
    distribution: str  # for the messages
    environment: Mapping[str, str]

    def prepare(self, sources: Mapping[str, str]) -> None:
        """`sources`: the texts of sources by the names of their files."""
        for name in ("state/lists/partial", "cache/archives/partial", "etc/sources.list.d", "etc/preferences.d"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for part in ("sources.list.d", "preferences.d"):
            for path in (self.directory / "etc" / part).iterdir():
                path.unlink()
        for name, text in sources.items():
            (self.directory / "etc/sources.list.d" / name).write_text(text, encoding="utf-8")
        (self.directory / "status").touch()
        (self.directory / "apt.conf").write_text(CONFIGURATION.format(root=self.directory), encoding="utf-8")

    @property
    def archives(self) -> Path:
        return self.directory / "cache/archives"

    def update(self) -> None:
        self._apt("update", "-q")

    def obey(self, pinning: str) -> None:
        """Takes over the preferences of a package, as a node does on which it is installed first."""
        scratch = self.directory / "pinning"
        scratch.mkdir(exist_ok=True)
        self._apt("download", "-q", pinning, cwd=scratch)
        for archive in scratch.glob("*.deb"):
            self._run(["dpkg-deb", "--extract", str(archive), str(scratch)])
            archive.unlink()
        for path in (scratch / PREFERENCES).iterdir():
            path.replace(self.directory / "etc/preferences.d" / path.name)

    def closure(self, names: Iterable[str]) -> list[Package]:
        """The packages, NAME or NAME=VERSION, and all that they depend on."""
        # What lies in the cache already, apt would leave out.
        empty = self.directory / "empty"
        (empty / "partial").mkdir(parents=True, exist_ok=True)
        cache = f"-oDir::Cache::archives={empty}"
        return list(parse(self._apt("install", cache, "--print-uris", "-qq", *names)))

    def known(self, names: Iterable[str]) -> list[str]:
        """Those of the names that a source has."""
        there = set(self._run(["apt-cache", "pkgnames"]).split())
        return [name for name in names if name in there]

    def download(self, names: Iterable[str]) -> None:
        self._apt("install", "--download-only", "-qq", *names)

    def _apt(self, *arguments: str, cwd: Path | None = None) -> str:
        return self._run(["apt-get", *arguments], cwd)

    def _run(self, command: list[str], cwd: Path | None = None) -> str:
        environment = {
            **os.environ,
            **self.environment,
            "APT_CONFIG": str(self.directory / "apt.conf"),
            "LC_ALL": "C",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Problem(f"{self.distribution}: {reason(done.stdout + done.stderr)}")
        return done.stdout


def parse(text: str) -> Iterator[Package]:
    for line in text.splitlines():
        if found := URI.match(line):
            yield Package(found["uri"], found["name"], int(found["size"]))


def reason(text: str) -> str:
    """What apt says of its failure: its errors, or else what it could not fulfil."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E: ") for line in lines if line.startswith("E:")]
    unmet = [line for line in lines if "Depends:" in line or "Conflicts:" in line]
    return "; ".join(dict.fromkeys([*unmet[:3], *errors[:3]])) or (lines[-1] if lines else "apt gives no reason")
