"""An image's manifests and blobs in a directory, brought there together with other nodes, for Docker to pull from."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from .exchange import OFFER, Exchange, Settings, as_wanted, say
from .files import read_json, read_text, write_whole
from .registry import BlobOpener
from .store import size_of
from .systemd import human
from .transfer import Unavailable, Wanted, Wrong, fetch

MARKER = ".glm-manifest.json"
PARTS = ".parts"
REGISTRY = "the registry"
# Of a blob, in a row: the registry is not asked for anything more.
ATTEMPTS = 4
# What the file system needs beside the blobs.
DISK_RESERVE = 1 << 30


class Incomplete(Exception):
    """Why the image is not all there, in one line."""


class Image:
    """Below `directory`: one image a directory, DIGEST, and DIGEST.partial while it comes; in it each blob and manifest
    as sha256/HEX."""

    def __init__(self, config: dict[str, Any], delay: float = 2) -> None:
        """`config` is the role's image.json. A blob is asked for again after `delay`, then twice that, and so on."""
        digests = [manifest["digest"] for manifest in config["manifests"]]
        self.revision = str(digests[0].partition(":")[2])
        self.directory = Path(config["directory"])
        self.target = self.directory / self.revision
        self.partial = self.directory / f"{self.revision}.partial"
        self.contents = {path_of(each["digest"]): str(each["content"]) for each in config["manifests"]}
        sizes = {path: len(content.encode()) for path, content in self.contents.items()}
        sizes.update({path_of(blob["digest"]): int(blob["size"]) for blob in config["blobs"]})
        self.manifest = {
            "revision": self.revision,
            # The last one lists the blobs, the first one may be an index.
            "sha256": digests[-1].partition(":")[2],
            "files": [
                {"path": path, "size": size, "sha256": path.partition("/")[2], "git_sha1": None}
                for path, size in sizes.items()
            ],
        }
        self.files = {item["path"]: as_wanted(item) for item in self.manifest["files"]}
        self.opener = BlobOpener(config["registry"], config["repository"])
        self.settings = Settings(**config["share"])
        self.releases = [Path(release) / "release.json" for release in config["releases"]]
        self.delay = delay

    def gather(self, stop: threading.Event) -> str:
        """Makes the image complete; returns what was done. Raises Incomplete, Stopped, or OSError of the disk."""
        if self.target.is_dir():
            # Docker has it no more: what is there is hashed again before it is given to it once more.
            shutil.rmtree(self.partial, ignore_errors=True)
            self.target.rename(self.partial)
        (self.partial / "sha256").mkdir(parents=True, exist_ok=True)
        (self.partial / MARKER).unlink(missing_ok=True)
        self.seed()
        for path, content in self.contents.items():
            write_whole(self.partial / path, content)
        self.need_space()
        job = Exchange(
            self.settings,
            self.directory,
            self.partial,
            manifest=self.manifest,
            hub=lambda paths, closed: self.ask_registry(job, paths, closed),
            hub_begun=self.begun,
            stop=stop,
            hub_name=REGISTRY,
        )
        lacking = set(self.files) - job.run(list(self.files))
        if lacking:
            raise Incomplete(
                f"{len(lacking)} of {len(self.files)} blobs were given neither by {REGISTRY} nor by a peer"
            )
        shutil.rmtree(self.partial / PARTS, ignore_errors=True)
        write_whole(self.partial / MARKER, json.dumps(self.manifest, indent=1))
        self.partial.rename(self.target)
        sync_directory(self.directory)
        # The image's own directory is offered from now on.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory / OFFER)
        self.prune()
        came = ", ".join(f"{human(count)} from {source}" for source, count in job.bytes.items())
        return f"complete: {len(self.files)} blobs, {came}"

    def seed(self) -> None:
        """Links what earlier images have: it is hashed with the rest."""
        for marker in self.directory.glob(f"*/{MARKER}"):
            for item in read_json(marker).get("files", []):
                source, place = marker.parent / item["path"], self.partial / item["path"]
                if item["path"] in self.files and size_of(place) is None and size_of(source) == item["size"]:
                    os.link(source, place)

    def need_space(self) -> None:
        missing = sum(file.size for path, file in self.files.items() if size_of(self.partial / path) != file.size)
        free = shutil.disk_usage(self.partial).free + self.begun()
        if free < missing + DISK_RESERVE:
            raise Incomplete(
                f"no space left in {self.directory} for the image's blobs: {human(missing + DISK_RESERVE)} needed, "
                f"{human(free)} free"
            )

    def begun(self) -> int:
        """Bytes that came from the registry of blobs that are not whole yet."""
        return sum(size_of(part) or 0 for part in (self.partial / PARTS).glob("*"))

    def ask_registry(self, job: Exchange, paths: list[str], closed: threading.Event) -> None:
        with concurrent.futures.ThreadPoolExecutor(self.settings.hub_files) as pool:
            for each in [pool.submit(self.bring, job, self.files[path], closed) for path in paths]:
                each.result()

    def bring(self, job: Exchange, file: Wanted, closed: threading.Event) -> None:
        """One blob from the registry. One that it has not, or has wrong, is left to the others."""
        part = self.partial / PARTS / file.digest
        for attempt in range(ATTEMPTS):
            try:
                fetch(file, part, self.opener, f"sha256:{file.digest}", stop=closed)
            except (Unavailable, Wrong) as exc:
                problem = f"{REGISTRY} {self.opener.base} gives no sha256:{file.digest}: {exc}"
                if getattr(exc, "missing", False):
                    break
            else:
                job.deliver(part, self.partial / file.path, REGISTRY)
                return
            if attempt + 1 == ATTEMPTS:
                raise Incomplete(problem)
            closed.wait(self.delay * 2**attempt)
        say(problem)

    def prune(self) -> None:
        """Keeps this image and those that a release uses: a node that joins may still need them."""
        used = "\n".join(read_text(release) for release in self.releases)
        for path in sorted(self.directory.iterdir()):
            revision, _, rest = path.name.partition(".")
            # Only names that are made here: whatever else lies there is not ours.
            if not re.fullmatch(r"[0-9a-f]{64}", revision) or rest not in ("", "partial"):
                continue
            if revision != self.revision and (rest or revision not in used):
                say(f"removing {path}: no release uses it")
                shutil.rmtree(path)


def path_of(digest: str) -> str:
    return digest.replace(":", "/")


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
