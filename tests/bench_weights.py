#!/usr/bin/env python3
"""`make bench-weights`: a checkpoint to eight nodes at once, against one node alone.

bench_weights.py [--simulate] [--hash] [--only NAME] [--write]     --write writes docs/weights-bench.md

Each node is a network namespace with a link of a limited rate (tc), in which the role's own program and nginx run,
with the role's configuration. The hub is a server of this file that limits each address, as hubs do; its client is the
real one. All of it goes over the node's one link, the hub's bytes too. Rates are a thousandth of real ones, so that two
cores carry it. Then the rate of hashing, by bench_hashing.py. Fails where a budget is not kept. Needs root, nginx and
tc.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / path) for path in ("tests/unit", "plugins/module_utils", "collections", ".")]
import bench_hashing  # noqa: E402
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.shares import Plan  # noqa: E402
from ansible_collections.glm.fleet.plugins.modules.hub_manifest import build_manifest  # noqa: E402
from share_server import server_config  # noqa: E402
from small_hub import DOCKER, REPO, REVISION  # noqa: E402

PROGRAM = ROOT / "roles/model_weights/files/weights-fetch"
NGINX = os.environ.get("NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
PREFIX = f"glmbench{os.getpid()}"  # of all namespaces
NETWORK = "198.18.77"
HUB = f"{NETWORK}.2"
PORT = 8004
NODES = 8
HUB_RATE = 1_000_000  # bytes a second for an address
SHARDS, SHARD = 141, 1_360_000  # as many as the real checkpoint has


# --- simulated from the plan ------------------------------------------------------------------------------

CHECKPOINT = [5_360_000_000] * 141  # bytes, about those of GLM-5.2-FP8
REAL_HUB = 1e9  # bytes a second for a node
TRANSFERS = HUB_FILES = 4  # files at a time
LOOKED = 64  # waiting nodes that are looked at when a peer has room again


@dataclass(eq=False)
class Flow:
    source: int  # -1: the hub
    target: int
    file: int
    left: float
    rate: float = 0
    since: float = 0
    version: int = 0


class Simulation:
    """What the nodes do by shares.Plan, with a link of `lan` bytes/s each way that the hub's bytes go over, too.

    Files share a link evenly; what one of them cannot use is lost to the others, other than what the hub leaves. What a
    node has is known to the others after an interval of their looks.
    """

    def __init__(self, nodes: int, lan: float, sizes: Sequence[int] = tuple(CHECKPOINT), hub: float = REAL_HUB) -> None:
        self.plan, self.nodes, self.lan, self.sizes, self.hub = Plan(sizes, nodes), nodes, lan, sizes, hub
        self.delay = 0.5 + nodes / 64
        self.now = 0.0
        self.order = itertools.count()
        self.events: list[tuple[float, int, Flow | None, int, int]] = []
        self.missing = [set(range(len(sizes))) for _ in range(nodes)]
        self.shares = [list(share) for share in self.plan.shares]
        self.holders: dict[int, list[int]] = {}
        # In order, so that each run is the same.
        self.up: list[dict[Flow, None]] = [{} for _ in range(nodes)]
        self.down: list[dict[Flow, None]] = [{} for _ in range(nodes)]
        self.full: set[int] = set()  # give as many files as they do at a time
        self.waiting: dict[int, None] = {}  # for a peer that has what they lack, the longest first

    def run(self) -> float:
        """Seconds until the last node has everything."""
        for node in range(self.nodes):
            for _ in range(HUB_FILES):
                self.ask_hub(node)
        finished = 0.0
        while self.events:
            self.now, _, flow, version, file = heapq.heappop(self.events)
            if flow is None:  # it is known now that a node has the file
                self.holders.setdefault(file, []).append(version)
                for node in range(self.nodes):
                    if version in self.full:
                        break
                    if file in self.missing[node]:
                        self.gather(node)
            elif flow.version == version:
                finished = self.now
                self.end(flow)
        if any(self.missing):
            raise RuntimeError("the plan leaves files out")
        return finished

    def ask_hub(self, node: int) -> None:
        if self.shares[node]:
            self.begin(Flow(-1, node, self.shares[node].pop(0), 0))

    def gather(self, node: int) -> bool:
        """Begins what the node can begin; tells whether that was anything."""
        begun = False
        limit = TRANSFERS // 2 if any(flow.source < 0 for flow in self.down[node]) else TRANSFERS
        while sum(flow.source >= 0 for flow in self.down[node]) < limit and self.missing[node]:
            coming = {flow.file for flow in self.down[node]}
            busy = self.full | {flow.source for flow in self.down[node]}
            choice = self.plan.pick(node, self.missing[node] - coming, self.holders, busy)
            if not choice:
                self.waiting[node] = None
                return begun
            self.begin(Flow(choice[1], node, choice[0], 0))
            begun = True
        self.waiting.pop(node, None)
        return begun

    def begin(self, flow: Flow) -> None:
        flow.left, flow.since = self.sizes[flow.file], self.now
        self.down[flow.target][flow] = None
        if flow.source >= 0:
            self.up[flow.source][flow] = None
            if len(self.up[flow.source]) >= TRANSFERS:
                self.full.add(flow.source)
        self.settle(flow)

    def end(self, flow: Flow) -> None:
        self.down[flow.target].pop(flow)
        if flow.source >= 0:
            self.up[flow.source].pop(flow)
            self.full.discard(flow.source)
        self.missing[flow.target].discard(flow.file)
        heapq.heappush(self.events, (self.now + self.delay, next(self.order), None, flow.target, flow.file))
        self.settle(flow)
        if flow.source < 0:
            self.ask_hub(flow.target)
        self.gather(flow.target)
        if flow.source >= 0:
            for node in list(self.waiting)[:LOOKED]:
                if flow.source in self.full or self.gather(node):
                    break

    def settle(self, changed: Flow) -> None:
        """New rates for all that shares a link with it."""
        touched = dict(self.down[changed.target])
        if changed.source >= 0:
            touched |= self.up[changed.source]
        for flow in touched:
            down = self.down[flow.target]
            hub = sum(other.source < 0 for other in down)
            from_hub = min(self.hub, self.lan * hub / len(down))
            if flow.source < 0:
                rate = from_hub / hub
            else:
                rate = min((self.lan - from_hub) / (len(down) - hub), self.lan / len(self.up[flow.source]))
            flow.left -= flow.rate * (self.now - flow.since)
            flow.since, flow.rate = self.now, rate
            flow.version += 1
            heapq.heappush(self.events, (self.now + flow.left / rate, next(self.order), flow, flow.version, flow.file))


def simulated() -> list[str]:
    """Time relative to one node alone, with the limit: as lines of a table."""
    lans = (1e9, 1.25e9, 3e9, 12.5e9)
    lines = ["| nodes | " + " | ".join(f"LAN {lan / 1e9:g} GB/s" for lan in lans) + " |", "|---|" + "---|" * len(lans)]
    total = sum(CHECKPOINT)
    for nodes in (2, 8, 64, 256):
        cells = []
        for lan in lans:
            limit = max(total / (nodes * REAL_HUB), total / lan) / (total / REAL_HUB)
            cells.append(f"{Simulation(nodes, lan).run() / (total / REAL_HUB):.2f} ({limit:.2f})")
        lines.append(f"| {nodes} | " + " | ".join(cells) + " |")
    return lines


# --- the hub ----------------------------------------------------------------------------------------------


class Bucket:
    """Bytes a second, for all that takes from it."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free_at = time.monotonic()
        self.lock = threading.Lock()

    def take(self, count: int) -> None:
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.rate
            wait = self.free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__((HUB, 80), Handler)
        self.files = files
        self.etags = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        self.buckets: dict[str, Bucket] = {}
        self.sent = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        if self.path == "/sent":
            body = str(hub.sent).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        path = self.path.removeprefix(f"/{REPO}/resolve/{REVISION}/")
        content = hub.files.get(path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{hub.etags.get(path, "")}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "HEAD" or content is None:
            return
        with hub.lock:
            bucket = hub.buckets.setdefault(self.client_address[0], Bucket(HUB_RATE))
        with suppress(OSError):
            for start in range(0, len(content), 16384):
                piece = content[start : start + 16384]
                bucket.take(len(piece))
                self.wfile.write(piece)
                with hub.lock:
                    hub.sent += len(piece)


def model() -> dict[str, bytes]:
    """The same at each call."""
    chance = random.Random(1)
    names = [f"model-{n:05}-of-{SHARDS:05}.safetensors" for n in range(1, SHARDS + 1)]
    files = {name: chance.randbytes(SHARD + chance.randrange(20_000)) for name in names}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {name: name for name in names}}).encode()
    return files


def manifest(files: dict[str, bytes]) -> dict[str, Any]:
    entries = []
    for path, content in files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        entries.append(entry)
    return build_manifest(REPO, REVISION, entries)


# --- namespaces -------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network(lan_rate: float) -> Iterator[None]:
    """A bridge, the hub with a link without limits, and the nodes with links of `lan_rate` bytes a second each way."""
    bridge = f"{PREFIX}-lan"
    names = [bridge, f"{PREFIX}-hub", *(f"{PREFIX}-{node}" for node in range(NODES))]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", bridge, "link", "set", "br0", "up")
        for place, name in enumerate(names[1:]):
            port = f"p{place}"
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", bridge)
            ip("-n", name, "addr", "add", f"{HUB if place == 0 else address(place - 1)}/24", "dev", "eth0")
            ip("-n", bridge, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "link", "set", "eth0", "up")
            if place:
                for where, device in ((name, "eth0"), (bridge, port)):
                    shape = ["tbf", "rate", f"{lan_rate * 8 / 1000:.0f}kbit", "burst", "128kb", "latency", "100ms"]
                    inside = ["ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", device, "root", *shape]
                    subprocess.run(inside, check=True)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def address(node: int) -> str:
    return f"{NETWORK}.{10 + node}"


@contextmanager
def hub() -> Iterator[None]:
    argv = ["ip", "netns", "exec", f"{PREFIX}-hub", sys.executable, __file__, "--hub"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline().strip() == "ready"
        yield
    finally:
        process.kill()
        process.wait()


def sent() -> int:
    """Bytes of files that the hub has sent."""
    ask = f"import urllib.request as r; print(r.urlopen('http://{HUB}/sent').read().decode())"
    argv = ["ip", "netns", "exec", f"{PREFIX}-hub", sys.executable, "-c", ask]
    return int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


# --- nodes ------------------------------------------------------------------------------------------------


@dataclass
class Node:
    place: int
    path: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node{self.place + 1}"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def log(self) -> str:
        return (self.path / "log").read_text()

    def enter(self, *argv: str | Path, log: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        environment |= {"PATH": f"{self.path}/bin:{os.environ['PATH']}", "DOCKER_LOG": f"{self.path}/docker.log"}
        environment["PYTHONPATH"] = str(ROOT / "plugins/module_utils")
        with (self.path / log).open("ab") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{PREFIX}-{self.place}", *argv],
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def prepare(self, files: dict[str, Any], names: Sequence[str], lie: str = "") -> None:
        """The role's files, with nginx where there are others. `lie` is a file of which it gives a wrong byte."""
        for directory in (self.path / "bin", self.path / "run", self.models):
            directory.mkdir(parents=True)
        docker = self.path / "bin/docker"
        docker.write_text(DOCKER)
        docker.chmod(0o755)
        addresses = {name: address(place) for place, name in enumerate(names)}
        config = {
            "repo": REPO,
            "revision": REVISION,
            "endpoint": f"http://{HUB}",
            "image": "vllm/vllm-openai@sha256:" + "a" * 64,
            "directory": str(self.models),
            "manifest": files,
            "share": {"name": self.name, "addresses": addresses, "port": PORT} if len(names) > 1 else {},
        }
        (self.path / "weights.json").write_text(json.dumps(config))
        if len(names) == 1:
            return
        text = server_config(self.path / "run", self.models, addresses, self.name, PORT)
        if lie:
            wrong = f"location = /{REVISION}/files/{lie} {{ alias {self.path}/wrong; }}\n    location / {{"
            text = text.replace("location / {", wrong)
        (self.path / "nginx.conf").write_text(text.replace("daemon off;", "daemon off;\nuser root;"))
        self.enter(NGINX, "-p", self.path, "-c", self.path / "nginx.conf", log="nginx.log")

    def start(self) -> subprocess.Popen[bytes]:
        return self.enter(sys.executable, "-B", PROGRAM, self.path / "weights.json", log="log")

    def kill(self) -> None:
        """All of it, at once, as a machine that is lost."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()

    def complete(self, files: dict[str, Any]) -> bool:
        return all((self.models / REVISION / item["path"]).stat().st_size == item["size"] for item in files["files"])


@dataclass
class Result:
    seconds: float
    hub_share: float
    logs: str


def run(nodes: int, lan_rate: float, kill_after: float = 0, lie: bool = False, serving: int = 0) -> Result:
    """The checkpoint to nodes, of which the first `serving` have it; the last is killed, or gives a wrong byte."""
    with ExitStack() as stack:
        where = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 4e9 else None
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where, prefix="bench-weights-")))
        content = model()
        files = manifest(content)
        stack.enter_context(network(lan_rate))
        stack.enter_context(hub())
        fleet = [Node(place, path / f"node{place + 1}") for place in range(nodes)]
        for node in fleet:
            stack.callback(node.kill)
        names = [node.name for node in fleet]
        for node in fleet:
            wrong = ""
            if lie and node is fleet[-1]:
                owned = Plan([item["size"] for item in files["files"]], nodes).shares[-1][0]
                wrong = files["files"][owned]["path"]
                node.path.mkdir()
                (node.path / "wrong").write_bytes(b"\0" + content[wrong][1:])
            node.prepare(files, names, wrong)
        for node in fleet[:serving]:
            have = node.models / REVISION
            have.mkdir()
            for name, data in content.items():
                (have / name).write_bytes(data)
            (have / ".glm-manifest.json").write_text(json.dumps(files))
        del content
        time.sleep(1)
        began = time.monotonic()
        running = {node.name: node.start() for node in fleet[serving:]}
        if kill_after:
            time.sleep(kill_after)
            fleet[-1].kill()
            del running[fleet[-1].name]
        for name, process in running.items():
            code = process.wait(timeout=900)
            if code:
                raise SystemExit(f"bench_weights: {name} ended with {code}:\n{path.joinpath(name, 'log').read_text()}")
        seconds = time.monotonic() - began
        for node in fleet:
            if node.name in running and not node.complete(files):
                raise SystemExit(f"bench_weights: {node.name} lacks files")
        logs = "".join(f"== {node.name}\n{node.log}" for node in fleet if node.name in running)
        return Result(seconds, sent() / files["total_bytes"], logs)


def serve_hub() -> None:
    with Hub(model()) as server:
        print("ready", flush=True)
        server.serve_forever(poll_interval=0.1)


LAN3 = 3 * HUB_RATE
ALONE, SHARED, KILLED, FLIPPED = "alone", "shared", "killed", "flipped"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    ALONE: ("one node alone", {"nodes": 1, "lan_rate": LAN3}),
    SHARED: ("8 nodes, LAN 3 times the hub's rate", {"nodes": NODES, "lan_rate": LAN3}),
    KILLED: ("the same, an owner killed half way", {"nodes": NODES, "lan_rate": LAN3, "kill_after": 0}),
    FLIPPED: ("the same, a peer with a wrong byte", {"nodes": NODES, "lan_rate": LAN3, "lie": True}),
    "equal": ("8 nodes, LAN as fast as the hub", {"nodes": NODES, "lan_rate": HUB_RATE}),
    "joins": ("one node joins 7 that serve", {"nodes": NODES, "lan_rate": LAN3, "serving": NODES - 1}),
}
# What must hold: of the time of one node alone, and of the checkpoint from the hub.
# Where the LAN is as fast as the hub 1.0 cannot be had: TCP's headers go over the link too, and the last files are
# passed on when the hub has nothing more to give.
BUDGETS = {SHARED: (0.45, 1.02), "equal": (1.2, 1.02), "joins": (1.0, 0.0)}
KILLED_BUDGET = 1.15  # of the time of the run without


def problems(results: dict[str, Result]) -> list[str]:
    found = []
    for name, (seconds, share) in BUDGETS.items():
        if name in results and ALONE in results:
            ratio = results[name].seconds / results[ALONE].seconds
            if ratio > seconds:
                found.append(f"{RUNS[name][0]}: {ratio:.2f} of the time of one node alone, above {seconds}")
        if name in results and results[name].hub_share > share:
            found.append(
                f"{RUNS[name][0]}: {results[name].hub_share:.3f} of the checkpoint from the hub, above {share}"
            )
    if {KILLED, SHARED} <= results.keys() and results[KILLED].seconds > KILLED_BUDGET * results[SHARED].seconds:
        found.append(f"{RUNS[KILLED][0]}: above {KILLED_BUDGET} of the time without")
    if FLIPPED in results and f"peer node{NODES} ({address(NODES - 1)}) gave a wrong" not in results[FLIPPED].logs:
        found.append("the peer that gave a wrong byte was not named")
    return found


def table(results: dict[str, Result]) -> list[str]:
    lines = ["| run | seconds | of one node's time | of the checkpoint from the hub |", "|---|---|---|---|"]
    for name, result in results.items():
        ratio = f"{result.seconds / results[ALONE].seconds:.2f}" if ALONE in results else ""
        lines.append(f"| {RUNS[name][0]} | {result.seconds:.1f} | {ratio} | {result.hub_share:.3f} |")
    return lines


PAGE = ROOT / "docs/weights-bench.md"
WORDS = """\
# Weights to many nodes

`make bench-weights` writes this page.

## Measured

{nodes} nodes in network namespaces of one machine, each with nginx and the role's own program; the hub's client is the
real one, the hub a server that gives each address {rate:g} MB/s. {shards} files, {total:.0f} MB. All bytes of a node
go over its one link, the hub's too. The times hold the start of the hub's client, some seconds on two cores.

{measured}

## Simulated from the plan

The time relative to one node alone with 1 GB/s from the hub, {files} files of 5.36 GB; in brackets the limit,
max(1 / N, hub / LAN): each byte comes from the hub once, and over each node's link once.

{simulated}

Where the LAN is no faster than the hub, and both go over one link, there is nothing to gain: leave `glm_share`
off there.

## Hashing

{cores} cores that have SHA instructions, {hashed} files of {size} MiB, {rounds} rounds in turns beside whatever
else the machine did: the ratio counts, not the rates. The start of our program is in its times. "From the disk":
none of the files is in the page cache. This disk gives more than two cores can hash; bounded to 0.5 GB/s it is
`cat` that tells the disk's own rate. The `sha256sum` of coreutils 9.1 makes no use of the SHA instructions, OpenSSL
does.

{hashing}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="A checkpoint to eight nodes at once, against one node alone.")
    parser.add_argument("--hub", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=RUNS, help="one run, with the log of its nodes")
    parser.add_argument("--simulate", action="store_true", help="only what is simulated")
    parser.add_argument("--hash", action="store_true", help="only the rate of hashing")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.hub:
        serve_hub()
        return 0
    if options.simulate:
        print("\n".join(simulated()))
        return 0
    if options.hash:
        rows = bench_hashing.measure(NGINX)
        return tell(bench_hashing.problems(rows))
    results: dict[str, Result] = {}
    for name, (title, settings) in RUNS.items():
        if options.only in (None, name):
            if name == KILLED:
                settings["kill_after"] = results[SHARED].seconds / 2 if SHARED in results else 35
            results[name] = run(**settings)
            print(f"{title}: {results[name].seconds:.1f} s", flush=True)
    print("\n".join(table(results)))
    if options.only:
        print(results[options.only].logs)
        return tell(problems(results))
    rows = bench_hashing.measure(NGINX)
    if options.write:
        values = {"nodes": NODES, "rate": HUB_RATE / 1e6, "shards": SHARDS, "total": SHARDS * SHARD / 1e6}
        pages = {"measured": "\n".join(table(results)), "simulated": "\n".join(simulated()), "files": len(CHECKPOINT)}
        PAGE.write_text(WORDS.format(**values, **pages, **bench_hashing.words(rows)))
    return tell(problems(results) + bench_hashing.problems(rows))


def tell(found: list[str]) -> int:
    for line in found:
        print(f"bench_weights: {line}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
