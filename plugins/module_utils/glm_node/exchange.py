"""A node's part in bringing a checkpoint or an image to many: a share from the hub, the rest from peers: shares.Plan.

A peer is a web server on another node that offers, below /REVISION/, the files whose hash is right, and `state`: what
it has and does, or the manifest of a revision that is complete. Nothing that it says is believed: each file is hashed
as it comes. What this leaves undone is for the caller, which asks the hub alone.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

from .shares import Plan
from .store import size_of
from .systemd import Meter, called, origins
from .transfer import PeerOpener, Slow, Stopped, Unavailable, Wanted, Wrong, digest, fetch

OFFER = ".glm-offer"
# Seconds after which a peer is asked again that had no room or did not answer.
BUSY_FOR = 1.0
# Wrong files after which a peer is not asked any more.
LIES = 3
# Times its patience that a node waits for the first or the next byte of what a peer brings from the hub: its client
# takes a while to begin, and gives up by itself.
HUB_PATIENCE = 4
# Looks in a row without an answer after which one counts as gone.
REFUSALS = 3
HUB, PEERS = "hub", "peers"


class Settings(NamedTuple):
    """weights.json's `share`."""

    name: str
    addresses: dict[str, str]  # of all nodes, this one too, in the order of the inventory
    port: int
    transfers: int = 4  # from peers at a time, and to them
    hub_files: int = 4  # from the hub at a time: with more of them the first one is whole later
    patience: float = 15  # seconds without a sign of life after which a node counts as gone

    @property
    def interval(self) -> float:
        """Seconds between two looks at the peers: the more there are, the fewer."""
        return 0.5 + len(self.addresses) / 64


class Peer:
    """What is known of another node."""

    def __init__(self, name: str, opener: PeerOpener) -> None:
        self.name = name
        self.opener = opener
        self.beat: Any = None
        self.seen = time.monotonic()  # when it last changed; at first it may still be starting
        self.brought: Any = None
        self.moved = time.monotonic()  # when it last had more of the model
        self.refused = 0  # looks in a row that got no answer
        self.complete = False
        self.have: set[int] = set()
        self.fetching: set[int] = set()
        self.no_hub = False
        self.busy_until = 0.0
        self.transfers = 0
        self.lies = 0
        self.lacks: set[int] = set()  # what it gave wrong, or not at all
        self.noted = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.opener.address})"

    def gone(self, patience: float) -> bool:
        """Whether it will bring nothing from the hub."""
        if self.lies >= LIES or self.refused >= REFUSALS or self.no_hub:
            return True
        return not self.complete and time.monotonic() - self.seen > patience

    def holds(self) -> set[int]:
        return set() if self.lies >= LIES or self.refused >= REFUSALS else self.have - self.lacks

    def brings(self, patience: float) -> set[int]:
        """What it is getting from the hub just now."""
        stuck = time.monotonic() - self.moved > HUB_PATIENCE * patience
        return set() if stuck or self.gone(patience) else self.fetching

    def look(self, revision: str, manifest: str, count: int) -> None:
        """Asks for its state. One that is not as it should be is a peer without files."""
        try:
            with self.opener(f"/{revision}/state") as response:
                status, body = response.status, response.read(16 << 20)
            state = json.loads(body) if status == 200 else {}
        except (OSError, http.client.HTTPException):
            self.refused += 1
            return
        except ValueError:
            state = {}
        self.refused = 0
        if not isinstance(state, dict):
            state = {}
        if "files" in state:  # the manifest of a complete revision
            self.complete = state.get("sha256") == manifest
            self.have = set(range(count)) if self.complete else set()
            self.fetching = set()
        elif state.get("manifest") == manifest:
            self.complete = False
            self.have = places(state.get("have"), count)
            self.fetching = places(state.get("hub"), count)
            self.no_hub = bool(state.get("no_hub"))
        else:
            self.have = set()
            if state:
                self.note("has another revision's files or another list of them")
        beat = (state.get("beat"), self.complete, len(self.have))
        if state and beat != self.beat:
            self.beat, self.seen = beat, time.monotonic()
        brought = (state.get("begun"), self.fetching, len(self.have))
        if brought != self.brought:
            self.brought, self.moved = brought, time.monotonic()

    def note(self, text: str) -> None:
        """To the journal, once in a row."""
        if text != self.noted:
            self.noted = text
            say(f"peer {self}: {text}")


def places(items: Any, count: int) -> set[int]:
    if not isinstance(items, list):
        return set()
    return {item for item in items if isinstance(item, int) and 0 <= item < count}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Exchange:
    """Brings the wanted files of a revision into `root`, together with the peers."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        root: Path,
        *,
        manifest: dict[str, Any],
        hub: Callable[[list[str], threading.Event], None],
        hub_begun: Callable[[], int],
        stop: threading.Event,
        hub_name: str = HUB,
    ) -> None:
        """`directory` is that of all revisions, on the file system of `root`.

        `hub` brings files, by path, into `root` until the event is set; what it raises ends the hub's part alone.
        `hub_begun` tells the bytes of those that are not yet in their places.
        """
        self.settings = settings
        self.root = root
        self.manifest = manifest
        self.revision = str(manifest["revision"])
        self.hub = hub
        self.hub_begun = hub_begun
        self.stop = stop
        self.hub_name = hub_name
        self.files = [as_wanted(item) for item in manifest["files"]]
        self.plan = Plan([file.size for file in self.files], len(settings.addresses))
        self.me = list(settings.addresses).index(settings.name)
        own = settings.addresses[settings.name]
        self.peers = {
            node: Peer(name, PeerOpener(address, settings.port, own))
            for node, (name, address) in enumerate(settings.addresses.items())
            if node != self.me
        }
        self.offer = directory / OFFER / self.revision
        self.scratch = directory / OFFER / f"{self.revision}.part"
        # Guards all that follows; notified when any of it changes.
        self.changed = threading.Condition()
        self.missing: set[int] = set()  # all that is not verified, among it:
        self.local: set[int] = set()  # there already, to be hashed
        self.gathering: set[int] = set()  # coming from a peer
        self.from_hub: set[int] = set()  # coming from the hub
        self.spoiled: set[int] = set()  # came wrong from the hub: left to the caller
        self.verified: set[int] = set()
        self.checks: dict[int, concurrent.futures.Future[None]] = {}
        self.hub_failed = False
        self.bytes = {hub_name: 0, PEERS: 0}  # by where they came from
        self.rates: list[float] = []  # bytes/s of transfers that ended well
        self.looked = False  # at the peers, once at least
        self.moved = time.monotonic()
        self.closed = threading.Event()
        self.problem: BaseException | None = None
        self.beat = 0

    def run(self, paths: list[str], complete: Path | None = None) -> set[str]:
        """Returns the paths that are right. Raises Stopped, or OSError of the disk.

        `complete` is the directory of the revision where all but these paths are there and right.
        """
        self.take_stock(set(paths), complete)
        total = sum(self.files[file].size for file in self.missing)
        meter = Meter("sharing", total)
        work = [self.watch_peers, self.ask_hub] + [self.gather] * self.settings.transfers
        threads = [threading.Thread(target=self.guard, args=(each,)) for each in work]
        for thread in threads:
            thread.start()
        try:
            with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                while not self.finished():
                    self.check_arrivals(pool)
                    meter.report(total - self.left(), self.note())
                    with self.changed:
                        self.changed.wait(0.25)
        finally:
            with self.changed:
                self.closed.set()
                self.changed.notify_all()
            for thread in threads:
                thread.join()
        if self.problem:
            raise self.problem
        say(f"shared: {self.note()}")
        return {self.files[file].path for file in self.verified}

    def guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as exc:
            with self.changed:
                self.problem = self.problem or exc
                self.changed.notify_all()

    def finished(self) -> bool:
        if self.stop.is_set():
            raise Stopped
        with self.changed:
            if self.problem or not self.missing:
                return True
            return not self.local and (self.idle(3) or self.hopeless())

    def idle(self, times: float = 1) -> bool:
        """Whether nothing has come for so many times the patience, and nothing is coming. With the lock held."""
        quiet = time.monotonic() - self.moved > times * self.settings.patience
        return quiet and self.looked and not self.gathering and not self.from_hub and not self.coming() & self.missing

    def hopeless(self) -> bool:
        """Whether neither the hub nor any peer can give what is missing. With the lock held."""
        if not (self.hub_failed and self.looked) or self.gathering or self.from_hub or self.holders():
            return False
        return all(peer.gone(self.settings.patience) for peer in self.peers.values())

    def coming(self) -> set[int]:
        """What peers are getting from the hub just now. With the lock held."""
        return set().union(*(peer.brings(self.settings.patience) for peer in self.peers.values()))

    # --- what is here -------------------------------------------------------------------------------------

    def take_stock(self, paths: set[str], complete: Path | None) -> None:
        """What an earlier run found right is offered still, as a link, and not hashed again."""
        (self.offer / "files").mkdir(parents=True, exist_ok=True)
        for place, file in enumerate(self.files):
            if file.path not in paths:
                if complete:  # offered from there
                    self.verified.add(place)
                continue
            offered = self.offered(place)
            if self.arrived(place) and offered.exists() and offered.samefile(self.root / file.path):
                self.verified.add(place)
            else:
                self.missing.add(place)
                if self.arrived(place):
                    self.local.add(place)
        self.publish()

    def offered(self, file: int) -> Path:
        return self.offer / "files" / self.files[file].path

    def part(self, file: int) -> Path:
        return self.scratch / self.files[file].digest

    def arrived(self, file: int) -> bool:
        return size_of(self.root / self.files[file].path) == self.files[file].size

    def left(self) -> int:
        """Bytes still to come."""
        with self.changed:
            missing = sum(self.files[file].size for file in self.missing if not self.arrived(file))
            begun = sum(size_of(self.part(file)) or 0 for file in self.gathering)
        return max(missing - begun - self.hub_begun(), 0)

    def note(self) -> str:
        with self.changed:
            shares = origins(self.bytes)
        return f"{len(self.files) - len(self.missing)} of {len(self.files)} files, {shares}"

    def publish(self) -> None:
        """Tells the peers. With the lock held, or before there are threads."""
        self.beat += 1
        state = {
            "manifest": self.manifest["sha256"],
            "have": sorted(self.verified),
            "hub": sorted(self.from_hub),
            "begun": self.hub_begun() if self.from_hub else 0,
            "no_hub": self.hub_failed,
            "beat": f"{os.getpid()}.{self.beat}",
        }
        scratch = self.offer / "state.json.new"
        scratch.write_text(json.dumps(state), encoding="utf-8")
        scratch.replace(self.offer / "state.json")

    def right(self, file: int, source: str = "") -> None:
        """A file in its place has the right hash: it is offered from now on."""
        with self.changed:
            if file in self.verified:
                return
            offered = self.offered(file)
            offered.parent.mkdir(parents=True, exist_ok=True)
            if offered.exists():
                offered.unlink()
            os.link(self.root / self.files[file].path, offered)
            if source:
                self.bytes[source] = self.bytes.get(source, 0) + self.files[file].size
            self.verified.add(file)
            for group in (self.missing, self.local, self.from_hub):
                group.discard(file)
            self.moved = time.monotonic()
            self.publish()
            self.changed.notify_all()

    def deliver(self, scratch: Path, place: Path, source: str) -> None:
        """What brings files for the hub has hashed this one itself: that is known before it is seen in its place."""
        file = next(number for number, file in enumerate(self.files) if self.root / file.path == place)
        with self.changed:
            scratch.replace(place)
            self.right(file, source)

    def check_arrivals(self, pool: concurrent.futures.Executor) -> None:
        """Hashes what was there at first, and what the hub's client has put into its place."""
        with self.changed:
            arrived = [file for file in (self.local | self.from_hub) - set(self.checks) if self.arrived(file)]
            self.checks.update({file: pool.submit(self.check, file) for file in arrived})
        for file, job in list(self.checks.items()):
            if job.done():
                del self.checks[file]
                job.result()

    def check(self, place: int) -> None:
        file, path = self.files[place], self.root / self.files[place].path
        hashed = digest(file, path, self.closed)
        came = place in self.from_hub
        if hashed == file.digest:
            self.right(place, self.hub_name if came else "")
            return
        whose = f"{called(self.hub_name)} gave" if came else "found"
        say(f"{file.path}: expected {file.algorithm} {file.digest}, {whose} {hashed}")
        path.unlink()
        with self.changed:
            self.local.discard(place)
            self.from_hub.discard(place)
            if came:
                self.spoiled.add(place)
            self.publish()
            self.changed.notify_all()

    # --- the peers ----------------------------------------------------------------------------------------

    def watch_peers(self) -> None:
        def look(peer: Peer) -> None:
            peer.look(self.revision, self.manifest["sha256"], len(self.files))

        with concurrent.futures.ThreadPoolExecutor(min(16, len(self.peers) or 1)) as pool:
            while not self.closed.is_set():
                list(pool.map(look, self.peers.values()))
                with self.changed:
                    self.looked = True
                    self.publish()
                    self.changed.notify_all()
                self.closed.wait(self.settings.interval)

    def holders(self) -> dict[int, list[int]]:
        held: dict[int, list[int]] = {}
        for node, peer in self.peers.items():
            for file in peer.holds() & self.missing:
                held.setdefault(file, []).append(node)
        return held

    def gather(self) -> None:
        while True:
            with self.changed:
                while not (choice := self.choose()):
                    self.changed.wait(0.2)
                    if self.closed.is_set():
                        return
                file, node = choice
                peer = self.peers[node]
                self.gathering.add(file)
                peer.transfers += 1
            try:
                self.fetch_from(file, peer)
            finally:
                with self.changed:
                    self.gathering.discard(file)
                    peer.transfers -= 1
                    self.changed.notify_all()

    def choose(self) -> tuple[int, int] | None:
        # What the others wait for comes first where the hub's bytes and theirs share one link.
        if self.from_hub and len(self.gathering) >= max(1, self.settings.transfers // 2):
            return None
        now = time.monotonic()
        busy = {node for node, peer in self.peers.items() if peer.busy_until > now or peer.transfers}
        open_files = self.missing - self.local - self.gathering - self.from_hub
        return self.plan.pick(self.me, open_files, self.holders(), busy)

    def fetch_from(self, place: int, peer: Peer) -> None:
        file, part = self.files[place], self.part(place)
        began, had = time.monotonic(), size_of(part) or 0

        def advance(_count: int) -> None:
            self.moved = time.monotonic()

        def too_slow(got: int, seconds: float) -> bool:
            """Far slower than what others gave, where another could give it now."""
            with self.changed:
                others = [node for node in self.holders().get(place, ()) if self.peers[node] is not peer]
                usual = sorted(self.rates)[len(self.rates) // 2] if self.rates else 0.0
            return bool(others) and seconds > self.settings.patience / 3 and got / seconds < usual / 4

        try:
            path = f"/{self.revision}/files/{file.path}"
            fetch(file, part, peer.opener, path, stop=self.closed, advance=advance, too_slow=too_slow)
        except Wrong as exc:
            with self.changed:
                peer.lacks.add(place)
                peer.lies += 1
            gave_up = "; it is not asked any more" if peer.lies == LIES else ""
            say(f"peer {peer} gave a wrong {file.path} ({exc}): it is fetched elsewhere{gave_up}")
        except Unavailable as exc:
            with self.changed:
                peer.busy_until = time.monotonic() + BUSY_FOR
                if exc.missing:
                    peer.lacks.add(place)
            if not exc.busy:
                peer.note(f"{file.path}: {exc}")
        except Slow:
            with self.changed:
                peer.busy_until = time.monotonic() + self.settings.patience
            peer.note(f"{file.path}: slow, going on elsewhere")
        else:
            target = self.root / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
            with self.changed:
                self.rates = [*self.rates[-50:], (file.size - had) / max(time.monotonic() - began, 0.001)]
            self.right(place, PEERS)

    # --- the hub ------------------------------------------------------------------------------------------

    def ask_hub(self) -> None:
        """Brings this node's share, and later what others have left."""
        while not self.hub_failed:
            with self.changed:
                while not (duties := self.duties()):
                    self.changed.wait(0.25)
                    if self.closed.is_set():
                        return
                self.from_hub = set(duties)
                self.publish()
            try:
                self.hub([self.files[file].path for file in duties], self.closed)
            except Stopped:
                return
            except Exception as exc:
                self.hub_failed = True
                say(f"{exc}; going on with what peers have")
            with self.changed:
                # Those that have come are still being hashed. It is not asked in vain for a file twice.
                late = {file for file in self.from_hub if not self.arrived(file)}
                self.from_hub -= late
                self.spoiled |= late
                self.moved = time.monotonic()
                self.publish()
                self.changed.wait_for(lambda: self.closed.is_set() or not self.from_hub)

    def duties(self) -> list[int]:
        """With the lock held."""
        if not self.looked:
            return []
        here = {node: peer for node, peer in self.peers.items() if not peer.gone(self.settings.patience)}
        held = set(self.holders())
        passed_over: dict[int, set[int]] = {}
        for node, peer in self.peers.items():
            for file in peer.lacks:
                passed_over.setdefault(file, set()).add(node)
        open_files = self.missing - self.local - self.gathering - self.spoiled
        if self.idle():
            # Whoever should bring these does not come forward with them: the next one does.
            for file in open_files - held:
                late = next((heir for heir in self.plan.heirs(file) if heir in here), self.me)
                passed_over.setdefault(file, set()).add(late)
        gone = set(self.peers) - set(here)
        return self.plan.duties(self.me, open_files - self.coming(), held, gone, passed_over)


def as_wanted(item: dict[str, Any]) -> Wanted:
    """A file of a manifest."""
    if item["sha256"]:
        return Wanted(item["path"], item["size"], "sha256", item["sha256"])
    return Wanted(item["path"], item["size"], "git sha1", item["git_sha1"])
