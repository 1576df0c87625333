"""The engines' packages as files: fetched once by pip, never installed, never imported."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("GLM_CACHE", Path.home() / ".cache/glm-fleet")) / "upstream"
PATIENCE = 600  # seconds for one package
# By source archive: the wheel is ten times as large.
SOURCE = ("vllm",)
# What no belief is about, and what would be slow to look through.
SKIPPED = (
    "sglang/test/",
    "sglang/multimodal_gen/",
    "sglang/srt/models/",
    "vllm/third_party/",
    "vllm/model_executor/models/",
)


class Unreadable(Exception):
    """A file is not there, or not of the shape that the reader knows: nothing can be said of the belief."""


class NotFetched(Exception):
    """pip brought no package; the text is its last line."""


class Package:
    """One release. Its files are those under the package's own folder, and the Dockerfiles."""

    def __init__(self, name: str, version: str, files: dict[str, str]) -> None:
        self.name, self.version, self.files = name, Version(version), files
        self._trees: dict[str, ast.Module] = {}
        self._nodes: dict[str, list[ast.AST]] = {}

    @classmethod
    def read(cls, archive: Path) -> Package:
        name, version = archive.name.removesuffix(".tar.gz").split("-")[:2]
        return cls(name, version, dict(_members(archive, name)))

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def text(self, path: str) -> str:
        if path not in self.files:
            raise Unreadable(f"{path} is not in {self}")
        return self.files[path]

    def tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            try:
                self._trees[path] = ast.parse(self.text(path))
            except SyntaxError as problem:
                raise Unreadable(f"{path} of {self}: {problem}") from None
        return self._trees[path]

    def nodes(self, path: str) -> list[ast.AST]:
        """Every node of a file: walking costs more than parsing, and a file is read for many beliefs."""
        if path not in self._nodes:
            self._nodes[path] = list(ast.walk(self.tree(path)))
        return self._nodes[path]

    def first(self, *paths: str) -> str:
        """The first of these that the release has: files move from one release to the next."""
        for path in paths:
            if path in self.files:
                return path
        raise Unreadable(f"none of {', '.join(paths)} is in {self}")

    def holding(self, *words: str, under: str = "") -> list[str]:
        """The Python files that hold one of the words."""
        return [
            path
            for path, text in self.files.items()
            if path.startswith(under) and path.endswith(".py") and any(word in text for word in words)
        ]


def _members(archive: Path, name: str) -> Iterator[tuple[str, str]]:
    def wanted(path: str) -> bool:
        return (path.startswith(f"{name}/") and path.endswith(".py") and not path.startswith(SKIPPED)) or (
            "Dockerfile" in path
        )

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in filter(wanted, wheel.namelist()):
                yield path, wheel.read(path).decode(errors="replace")
        return
    with tarfile.open(archive, "r:gz") as source:
        for member in source:
            path = member.name.partition("/")[2]
            file = source.extractfile(member) if wanted(path) else None
            if file:
                yield path, file.read().decode(errors="replace")


def pins() -> list[tuple[str, str]]:
    """Name and version of each pinned release, in the order of the file."""
    lines = (HERE / "releases.txt").read_text().splitlines()
    return [(name, version) for line in lines if "==" in line for name, version in [line.split()[0].split("==")]]


def pinned(name: str, version: str) -> Package:
    return Package.read(archive_of(name, version))


def archive_of(name: str, version: str) -> Path:
    """A pinned release in the cache; fetched where it is not there or not what the pin says."""
    lines = (HERE / "releases.txt").read_text().splitlines()
    line = next(line for line in lines if line.split()[:1] == [f"{name}=={version}"])
    digest = line.rpartition("sha256:")[2]
    for held in CACHE.glob(f"{name}-{version}[-.]*"):
        if hashlib.sha256(held.read_bytes()).hexdigest() == digest:
            return held
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(line + "\n")
        file.flush()
        return _fetch(name, f"{name} {version}", "--require-hashes", "-r", file.name)


def newest(name: str) -> Package:
    """The newest release that the index has."""
    return Package.read(_fetch(name, f"the newest {name}", name))


def _fetch(name: str, what: str, *wanted: str) -> Path:
    print(f"upstream · fetching {what}", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    kind = ["--python-version", "3.11", "--only-binary=:all:"]
    if name in SOURCE:
        kind = ["--no-binary=:all:", "--no-build-isolation", "--use-pep517", "--ignore-requires-python"]
        environment["PYTHONPATH"] = str(HERE / "backend")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", *kind]
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        try:
            subprocess.run(
                [*command, "-d", scratch, *wanted],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                env=environment,
                check=True,
            )
        except subprocess.CalledProcessError as problem:
            raise NotFetched(f"{what}: {(problem.stderr.strip().splitlines() or ['pip said nothing'])[-1]}") from None
        except subprocess.TimeoutExpired:
            raise NotFetched(f"{what}: not within {PATIENCE} s") from None
        (archive,) = Path(scratch).iterdir()
        return Path(shutil.move(archive, CACHE / archive.name))
