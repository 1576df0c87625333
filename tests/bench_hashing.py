"""How fast the weights are hashed, against the system's own programs: a part of bench_weights.py."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.transfer import PeerOpener, Wanted, fetch
from ansible_collections.glm.fleet.plugins.modules.hub_manifest import build_manifest
from small_hub import REPO, REVISION

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "roles/model_weights/files/weights-fetch"
FILES, SIZE = 16, 256 << 20
FETCHED = 4  # files, all at a time, as the role does
ROUNDS = 7
PROGRAMS = ("sha256sum", "openssl sha256")
LEAST = 0.8  # of the other's rate
CORES = os.cpu_count() or 1
BLKIO = Path("/sys/fs/cgroup/blkio")
DISK_RATE = 500_000_000  # bytes a second of a disk that is slower than the cores


class Row(NamedTuple):
    ours: str
    theirs: str
    rates: tuple[float, float]  # GB/s, the median of each
    ratios: list[float]  # of each round, ours to theirs

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def line(self) -> str:
        ours, theirs = self.rates
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        return f"| {self.ours} | {ours:.2f} | {self.theirs} | {theirs:.2f} | {self.ratio:.2f} ({spread}) |"


def shell(command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True, stdout=subprocess.DEVNULL)


def seconds(work: Callable[[], None], before: Callable[[], None]) -> float:
    before()
    began = time.monotonic()
    work()
    return time.monotonic() - began


def compare(
    names: tuple[str, str], ours: Callable[[], None], theirs: Callable[[], None], size: int, before: Callable[[], None]
) -> Row:
    """In turns, so that both have the machine's moods."""
    times = [(seconds(ours, before), seconds(theirs, before)) for _ in range(ROUNDS)]
    rates = [size / 1e9 / statistics.median(each) for each in zip(*times)]
    row = Row(*names, (rates[0], rates[1]), [other / own for own, other in times])
    print(row.line, flush=True)
    return row


def revision(models: Path) -> list[Wanted]:
    """A complete one, and its configuration beside it."""
    chance = random.Random(1).randbytes(SIZE - 8)
    place = models / REVISION
    place.mkdir(parents=True)
    wanted = []
    for number in range(FILES):
        content = number.to_bytes(8, "big") + chance
        name = f"model-{number:05}.safetensors"
        (place / name).write_bytes(content)
        wanted.append(Wanted(name, SIZE, "sha256", hashlib.sha256(content).hexdigest()))
    entries = [
        {"type": "file", "path": each.path, "size": SIZE, "lfs": {"oid": each.digest, "size": SIZE}} for each in wanted
    ]
    manifest = build_manifest(REPO, REVISION, entries)
    (place / ".glm-manifest.json").write_text(json.dumps(manifest))
    config = {"repo": REPO, "revision": REVISION, "endpoint": "", "image": "", "directory": str(models)}
    models.with_name("weights.json").write_text(json.dumps({**config, "manifest": manifest}))
    return wanted


@contextmanager
def server(root: Path, scratch: Path, nginx: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    config = scratch / "nginx.conf"
    config.write_text(
        f"daemon off; user root; pid {scratch}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen([nginx, "-p", scratch, "-c", config], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def slow_disk(path: Path) -> Iterator[None]:
    """What this process and its children read from the disk of `path` comes with DISK_RATE."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (device / "partition").exists():
        device = device.parent
    group = BLKIO / f"glmbench{os.getpid()}"
    group.mkdir()
    try:
        (group / "blkio.throttle.read_bps_device").write_text(f"{(device / 'dev').read_text().strip()} {DISK_RATE}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def checks(path: Path) -> list[Row]:
    """The program's own check of a complete revision, on the disk of `path`."""
    models = path / "models"
    files = models / REVISION

    def cold() -> None:
        for file in files.iterdir():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check() -> None:
        argv = [sys.executable, "-B", str(PROGRAM), str(path / "weights.json")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "plugins/module_utils")}
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=environment)

    def all_by(program: str) -> Callable[[], None]:
        return lambda: shell(f"ls {files}/*.safetensors | xargs -n1 -P{CORES} {program}")

    size = FILES * SIZE
    os.sync()
    check()  # brings the files into the page cache
    rows = [
        compare(("check, page cache", f"`{program}`"), check, all_by(program), size, lambda: None)
        for program in PROGRAMS
    ]
    rows += [
        compare(("check, from the disk", f"`{program}`"), check, all_by(program), size, cold) for program in PROGRAMS
    ]
    if BLKIO.is_dir():
        with slow_disk(path):
            rows.append(compare(("check, from a disk of 0.5 GB/s", "`cat`"), check, all_by("cat"), size, cold))
    return rows


def fetches(path: Path, wanted: list[Wanted], nginx: str) -> list[Row]:
    """Into memory, so that no disk decides."""
    some = wanted[:FETCHED]
    memory = Path("/dev/shm") if shutil.disk_usage("/dev/shm").free > 4 * FETCHED * SIZE else path
    with (
        tempfile.TemporaryDirectory(dir=memory, prefix="bench-hashing-") as target,
        server(path / "models" / REVISION, path, nginx) as port,
    ):
        opener, stop = PeerOpener("127.0.0.1", port), threading.Event()

        def empty() -> None:
            for file in Path(target).iterdir():
                file.unlink()

        def ours() -> None:
            with ThreadPoolExecutor(FETCHED) as pool:
                jobs = [
                    pool.submit(fetch, each, Path(target) / each.path, opener, f"/{each.path}", stop=stop)
                    for each in some
                ]
                for job in jobs:
                    job.result()

        def theirs(program: str) -> Callable[[], None]:
            names = " ".join(each.path for each in some)
            one = f"curl -sSf -o {target}/$0 http://127.0.0.1:{port}/$0 && {program} {target}/$0"
            return lambda: shell(f"printf '%s\\n' {names} | xargs -n1 -P{FETCHED} sh -c '{one}'")

        title = f"{FETCHED} files from nginx, hashed as they come"
        return [
            compare((title, f"`curl`, then `{program}`"), ours, theirs(program), FETCHED * SIZE, empty)
            for program in PROGRAMS
        ]


def measure(nginx: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-hashing-") as name:
        path = Path(name)
        wanted = revision(path / "models")
        return checks(path) + fetches(path, wanted, nginx)


def problems(rows: list[Row]) -> list[str]:
    return [
        f"{row.ours}: {row.ratio:.2f} of the rate of {row.theirs}, below {LEAST}" for row in rows if row.ratio < LEAST
    ]


def words(rows: list[Row]) -> dict[str, object]:
    """For the page."""
    head = ["| ours | GB/s | against | GB/s | ratio of the rates (from, to) |", "|---|---|---|---|---|"]
    lines = "\n".join(head + [row.line for row in rows])
    return {"cores": CORES, "hashed": FILES, "size": SIZE >> 20, "rounds": ROUNDS, "hashing": lines}
