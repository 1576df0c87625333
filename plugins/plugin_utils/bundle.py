"""A bundle: all that nodes without a way out need of one release, in one directory with one signed manifest.

manifest.json, manifest.json.asc   what the site's mirror serves: each file's path, size and sha256
blobs/                             the files, each once, by glm_node.store
apt/                               apt's own files, for the next time
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_json, write_whole
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.store import (
    MANIFEST,
    SIGNATURE,
    Store,
    has_links,
    size_of,
)
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.systemd import Meter, human
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.transfer import (
    Stopped,
    Unavailable,
    Wanted,
    Wrong,
    fetch,
)
from ansible_collections.glm.fleet.plugins.plugin_utils import apt_closure

SCHEMA = 1
IDENTITY = "glm-fleet mirror"
RESERVE = 1 << 30
TRANSFERS = 8
ATTEMPTS = 5
INTERVAL = 10.0  # seconds between two lines of progress
TOOLS = ("apt-get", "apt-cache", "apt-ftparchive", "dpkg-deb", "gpg")


class Problem(Exception):
    """Why there is no bundle, in one line."""


class Wish(NamedTuple):
    """A file to be fetched: where from, and as what the mirror serves it."""

    path: str
    wanted: Wanted
    opener: Callable[..., Any]
    source: str  # what the opener is asked for


class Repository(NamedTuple):
    """An apt repository as the nodes know it. The mirror has the same at `path`, signed with its own key."""

    uri: str  # of its packages; empty for the one that takes what no other has
    path: str
    suite: str  # as in a source: / for a flat one
    component: str
    key_path: str  # where nodes fetch its key
    source: str  # the text of a source, or empty
    key_url: str
    fingerprint: str


class Signer:
    """The key that the bundle is signed with: made once, and kept on this machine."""

    def __init__(self, home: Path) -> None:
        self.home = home
        # The path of a socket there may have some hundred characters, not more.
        self.short = Path(tempfile.mkdtemp(prefix="glm-gpg-"))
        (self.short / "home").symlink_to(home.absolute())

    def exists(self) -> bool:
        return self.home.is_dir() and bool(self._gpg("--list-secret-keys", "--with-colons"))

    def prepare(self) -> bytes:
        """The public key."""
        if not self.home.is_dir():
            self.home.mkdir(mode=0o700, parents=True)
        if not self.exists():
            self._gpg("--passphrase", "", "--quick-generate-key", IDENTITY, "ed25519", "sign", "never")
        return self._gpg("--armor", "--export")

    def clear(self, text: bytes) -> bytes:
        return self._gpg("--armor", "--clearsign", text=text)

    def detached(self, text: bytes) -> bytes:
        return self._gpg("--armor", "--detach-sign", text=text)

    def end(self) -> None:
        """The agent would stay."""
        with contextlib.suppress(OSError):
            subprocess.run(
                ["gpgconf", "--homedir", self.short / "home", "--kill", "all"], capture_output=True, check=False
            )
        shutil.rmtree(self.short, ignore_errors=True)

    def _gpg(self, *arguments: str, text: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(self.short / "home"), "--batch", "--yes", "--quiet", *arguments]
        done = subprocess.run(command, input=text, capture_output=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise Problem(f"gpg could not sign with the key in {self.home}: {said}")
        return done.stdout


class Bundle:
    """What is wanted is planned first, so that nothing begins which does not fit."""

    def __init__(
        self, directory: Path, signer: Signer, say: Callable[[str], None], environment: Mapping[str, str]
    ) -> None:
        self.directory, self.signer, self.say, self.environment = directory, signer, say, environment
        self.store = Store(directory)
        self.files: list[dict[str, Any]] = []
        self.wishes: list[Wish] = []
        self.closures: list[tuple[apt_closure.Root, list[Repository], list[str], list[apt_closure.Package]]] = []
        self.elsewhere: set[str] = set()  # sha256 of what the site has already
        self.optional: dict[str, bool] = {}  # of each optional package, whether a distribution has it
        self.stop = threading.Event()
        self.public = b""
        # apt takes no blank in the path of a key.
        self.scratch = Path(tempfile.mkdtemp(prefix="glm-bundle-"))

    def begin(self, base: str, key_file: Path | None = None, *, check: bool = False) -> None:
        missing = [tool for tool in TOOLS if not shutil.which(tool)]
        if missing:
            raise Problem(
                f"{', '.join(missing)}: not on this machine: make the bundle on Debian or Ubuntu with apt-utils and gpg"
            )
        if base:
            known = read_json(base)
            if "files" not in known:
                raise Problem(f"glm_bundle_base: {base} is no manifest of a bundle")
            self.elsewhere = {item["sha256"] for item in known["files"]}
        if key_file and key_file.exists() and not self.signer.exists():
            raise Problem(
                f"{key_file} is there, and its secret key is not in {self.signer.home}: bring that directory from "
                f"where the first bundle was made; or remove {key_file}, and bring the site's controller the new one"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.store.incoming.mkdir(exist_ok=True)
        if check:
            return
        self.public = self.signer.prepare()
        if key_file and key_file.exists() and key_file.read_bytes() != self.public:
            raise Problem(f"{key_file} is not of the key in {self.signer.home}: remove the wrong one")

    def end(self) -> None:
        self.signer.end()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # --- plans --------------------------------------------------------------------------------------------

    def plan_packages(
        self, distribution: str, repositories: list[Repository], names: list[str], *, optional: list[str], pinning: str
    ) -> None:
        root = apt_closure.Root(self.directory / "apt" / distribution, distribution, self.environment)
        sources, keys = {}, self.scratch / distribution
        keys.mkdir()
        for number, repository in enumerate(repositories):
            text = repository.source
            if repository.key_url:
                key = keys / f"{number}.asc"
                key.write_bytes(self._get(repository.key_url))
                text = (
                    f"Types: deb\nURIs: {repository.uri}\nSuites: {repository.suite}\n"
                    + (f"Components: {repository.component}\n" if repository.component else "")
                    + f"Signed-By: {key} {repository.fingerprint}".rstrip()
                    + "\n"
                )
            deb822 = any(line.lower().startswith("types:") for line in text.splitlines())
            sources[f"{number}.{'sources' if deb822 else 'list'}"] = text
        try:
            root.prepare(sources)
            root.update()
            if pinning:
                root.obey(pinning)
            known = root.known(optional)
            self.optional.update({name: self.optional.get(name, False) or name in known for name in optional})
            names = names + known
            packages = root.closure(names)
        except apt_closure.Problem as problem:
            raise Problem(str(problem)) from None
        self.closures.append((root, repositories, names, packages))

    def plan_files(self, wishes: Iterable[Wish]) -> None:
        self.wishes += wishes

    def needed(self) -> int:
        """Bytes that are still to come."""
        debs = sum(
            package.size
            for root, _, _, packages in self.closures
            for package in packages
            if not (root.archives / package.name).exists()
        )
        if not has_links(self.store.incoming):  # they lie with apt, and in the store
            debs *= 2
        here = self.store.incoming
        return debs + sum(wish.wanted.size - (size_of(here / wish.wanted.digest) or 0) for wish in self._missing())

    def insist_on_room(self) -> int:
        """Also for what is whole and in parts at the same time: the last part of each transfer. Returns `needed`."""
        missing = [wish.wanted.size for wish in self._missing()]
        tails = sorted(size % self.store.part for size in missing if size > self.store.part)
        coming = self.needed()
        room = coming + sum(tails[-TRANSFERS:]) + RESERVE
        free = shutil.disk_usage(self.directory).free
        if room > free:
            raise Problem(
                f"glm_bundle_dir: {human(room)} are needed in {self.directory}, and {human(free)} are free: "
                "free some, or set it to a larger disk"
            )
        probe = self.store.incoming / "probe"
        try:
            with probe.open("wb") as stream:
                stream.truncate(max(missing, default=0))
        except OSError as problem:
            if problem.errno != errno.EFBIG:
                raise
            raise Problem(
                f"glm_bundle_dir: the file system of {self.directory} takes no file of {human(max(missing))}: set it "
                "to one of ext4, xfs or exFAT; what is made there can be copied to any"
            ) from None
        finally:
            probe.unlink(missing_ok=True)
        return coming

    def _missing(self) -> list[Wish]:
        """Each content once."""
        return list({wish.wanted.digest: wish for wish in self.wishes if not self._known(wish)}.values())

    def _known(self, wish: Wish) -> dict[str, Any] | None:
        """The entry of a file that was fetched before."""
        sha256 = wish.wanted.digest if wish.wanted.algorithm == "sha256" else self._noted(wish.wanted)
        if not sha256 or not (sha256 in self.elsewhere or self.store.has(sha256, wish.wanted.size)):
            return None
        return {"path": wish.path, "sha256": sha256, "size": wish.wanted.size}

    def _note(self, wanted: Wanted) -> Path:
        return self.directory / "incoming" / f"{wanted.digest}.sha256"

    def _noted(self, wanted: Wanted) -> str:
        """The sha256 of a file of which the hub says git's hash alone."""
        try:
            return self._note(wanted).read_text(encoding="utf-8")
        except OSError:
            return ""

    # --- fetching -----------------------------------------------------------------------------------------

    def fetch(self) -> None:
        for root, _, names, packages in self.closures:
            total = sum(package.size for package in packages)
            if any(not (root.archives / package.name).exists() for package in packages):
                self.say(f"{root.distribution}: downloading {len(packages)} packages, {human(total)}")
                try:
                    root.download(names)
                except apt_closure.Problem as problem:
                    raise Problem(f"{problem}; run it again to go on from here") from None
        missing = self._missing()
        meter, done, lock = Meter("downloading", sum(wish.wanted.size for wish in missing)), 0, threading.Lock()

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count

        with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
            jobs = {pool.submit(self._bring, wish, advance) for wish in missing}
            pending, shown = set(jobs), 0.0
            try:
                while pending:
                    finished, pending = concurrent.futures.wait(pending, timeout=1)
                    for job in finished:
                        job.result()
                    if time.monotonic() - shown >= INTERVAL:
                        shown = time.monotonic()
                        self.say(meter.text(done, f"{len(jobs) - len(pending)} of {len(jobs)} files"))
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for wish in self.wishes:
            entry = self._known(wish)
            if entry is None:
                raise Problem(f"{wish.path}: is gone from {self.store.blobs}: run it again")
            self.files.append(entry)

    def _bring(self, wish: Wish, advance: Callable[[int], None]) -> None:
        place = self.store.incoming / wish.wanted.digest
        for attempt in range(1, ATTEMPTS + 1):
            try:
                fetch(wish.wanted, place, wish.opener, wish.source, stop=self.stop, advance=advance)
                break
            except (Unavailable, Wrong) as problem:
                if attempt == ATTEMPTS or self.stop.wait(2.0**attempt):
                    raise Problem(f"{wish.path}: {problem}; run it again to go on from here") from None
            except Stopped:
                return
        sha256 = wish.wanted.digest
        if wish.wanted.algorithm != "sha256":
            sha256 = hash_of(place)
            self._note(wish.wanted).write_text(sha256, encoding="utf-8")
        if sha256 in self.elsewhere:
            place.unlink()
        else:
            self.store.put(place, sha256)

    def _get(self, url: str) -> bytes:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 an address of the user's
                return bytes(answer.read(1 << 20))
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise Problem(f"{url}: {getattr(problem, 'reason', problem)}") from None

    # --- what the mirror serves ---------------------------------------------------------------------------

    def add(self, path: str, content: bytes) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in self.elsewhere:
            self.store.add(content, sha256)
        self.files.append({"path": path, "sha256": sha256, "size": len(content)})

    def add_file(self, path: str, place: Path) -> None:
        """Takes a small file over: by a link where that can be."""
        sha256 = hash_of(place)
        size = place.stat().st_size
        if sha256 not in self.elsewhere and not self.store.has(sha256, size):
            scratch = self.store.incoming / sha256
            scratch.unlink(missing_ok=True)
            link_or_copy(place, scratch)
            self.store.put(scratch, sha256)
        self.files.append({"path": path, "sha256": sha256, "size": size})

    def add_repositories(self) -> None:
        """Distributions may have a repository in common: its index has the packages of all."""
        archives: dict[tuple[str, str, str], dict[str, Path]] = {}
        known: dict[tuple[str, str, str], Repository] = {}
        for root, repositories, _names, packages in self.closures:
            for repository in repositories:
                place = (repository.path, repository.suite, repository.component)
                known[place] = repository
                archives.setdefault(place, {}).update(
                    {
                        package.name: root.archives / package.name
                        for package in packages
                        if home_of(package, repositories) is repository
                    }
                )
        for place, repository in known.items():
            self.say(f"{repository.path}: indexing {len(archives[place])} packages")
            self._add_repository(repository, archives[place])

    def _add_repository(self, repository: Repository, archives: Mapping[str, Path]) -> None:
        flat = repository.suite == "/"
        with tempfile.TemporaryDirectory(dir=self.store.incoming) as scratch:
            top = Path(scratch)
            pool = top if flat else top / "pool"
            index = top if flat else top / "dists" / repository.suite / repository.component / "binary-amd64"
            for directory in (pool, index):
                directory.mkdir(parents=True, exist_ok=True)
            for name, archive in archives.items():
                link_or_copy(archive, pool / name)
            (index / "Packages").write_bytes(ftparchive(["packages", "." if flat else "pool"], top))
            for path in sorted(pool.glob("*.deb")):
                self.add_file(f"{repository.path}/{path.relative_to(top)}", path)
            self.add_file(f"{repository.path}/{(index / 'Packages').relative_to(top)}", index / "Packages")
            release = top if flat else top / "dists" / repository.suite
            for path in pool.glob("*.deb"):  # apt-ftparchive would hash them once more
                path.unlink()
            options = [
                f"-oAPT::FTPArchive::Release::Origin={IDENTITY}",
                "-oAPT::FTPArchive::Release::Architectures=amd64",
            ]
            if not flat:
                options += [
                    f"-oAPT::FTPArchive::Release::Suite={repository.suite}",
                    f"-oAPT::FTPArchive::Release::Codename={repository.suite}",
                    f"-oAPT::FTPArchive::Release::Components={repository.component}",
                ]
            text = ftparchive([*options, "release", "."], release)
            self.add(f"{repository.path}/{(release / 'InRelease').relative_to(top)}", self.signer.clear(text))
        self.add(repository.key_path, self.public)

    def finish(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Writes and signs the manifest, and removes what it does not name."""
        files = sorted({item["path"]: item for item in self.files}.values(), key=lambda item: str(item["path"]))
        manifest = {"schema": SCHEMA, **description, "files": files}
        canonical = json.dumps(manifest, sort_keys=True).encode()
        manifest["id"] = hashlib.sha256(canonical).hexdigest()[:12]
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        # Without its signature a manifest counts for nothing.
        (self.directory / SIGNATURE).unlink(missing_ok=True)
        write_whole(self.directory / MANIFEST, text)
        write_whole(self.directory / SIGNATURE, self.signer.detached(text.encode()).decode())
        removed = self.store.prune(files)
        for path in self.store.incoming.iterdir():
            if path.suffix != ".sha256":  # the notes on what the hub hashes by git
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {
            "id": manifest["id"],
            "files": len(files),
            "bytes": sum({item["sha256"]: item["size"] for item in files}.values()),
            "removed_bytes": removed,
        }


def home_of(package: apt_closure.Package, repositories: list[Repository]) -> Repository:
    """Whose package it is: the last one takes what no other has."""
    named = [each for each in repositories if each.uri and package.uri.startswith(each.uri.rstrip("/") + "/")]
    return named[0] if named else repositories[-1]


def ftparchive(arguments: list[str], directory: Path) -> bytes:
    done = subprocess.run(["apt-ftparchive", *arguments], cwd=directory, capture_output=True, check=False)
    if done.returncode:
        raise Problem(f"apt-ftparchive: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def link_or_copy(source: Path, target: Path) -> None:
    """A link where the file system has them, as those of disks to be carried often have not."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def hash_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
