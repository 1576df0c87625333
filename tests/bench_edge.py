#!/usr/bin/env python3
"""What the edge costs: what it adds to a request, and to each token of 2,000 streams; with accounts, and without.

bench_edge.py [--write]     --write puts the table into docs/accounts.md

A real HAProxy with the configuration of a node, on two cores; engine and clients are processes of their own, on other
cores where there are some. The engine answers at once, so all that is measured is on the way. Times are of one clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/unit"), str(ROOT / "plugins/module_utils")]
from cpu import cpu_seconds  # noqa: E402
from test_haproxy_template import HAPROXY, KEY, VARS, entry, free_port, write_files  # noqa: E402

CORES = sorted(os.sched_getaffinity(0))
EDGE_CORES, OTHER_CORES = CORES[:2], CORES[2:] or CORES
SIZES = (4_000, 80_000, 400_000)  # bytes of a prompt: a question, a session of an agent, a long one
RATE, REQUESTS = 200, 3_000  # a second, and of each size
STREAMS, TOKENS, PAUSE = 2_000, 100, 0.2  # each a token every 200 ms: 10,000 a second
PROCESSES = 2  # of clients, and of engines
VARIANTS: dict[str, dict[str, Any] | None] = {
    "no edge": None,
    "edge": {},
    "edge with accounts": {
        "__gateway_counts": True,
        "__gateway_log": VARS["__gateway_log_request"] | VARS["__gateway_log_tokens"],
    },
}


class Engine(asyncio.Protocol):
    """Answers as vLLM does, each token with the time at which it left."""

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if len(body) < int(length[1] if length else 0):
            return
        self.buffer = b""
        if head.startswith(b"GET"):
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        elif b'"stream":true' in body:
            self.answering = asyncio.ensure_future(self.stream(b'"continuous_usage_stats":true' in body[-200:]))
        else:
            usage = {"prompt_tokens": 1000, "completion_tokens": 1, "total_tokens": 1001}
            answer = json.dumps({"id": "x", "choices": [{"message": {"content": "ok"}}], "usage": usage}).encode()
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
            self.transport.write(head + answer)

    async def stream(self, tells: bool) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        await asyncio.sleep(random.uniform(0, PAUSE))
        for number in range(TOKENS):
            usage = f',"usage":{{"prompt_tokens":1000,"total_tokens":{1000 + number},"completion_tokens":{number}}}'
            event = (
                'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1796086176,'
                '"model":"glm-5.2-fp8","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
                f'"finish_reason":null,"token_ids":null}}]{usage if tells else ""},"left":{time.time_ns()}}}\n\n'
            ).encode()
            self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(PAUSE)
        self.transport.write(b"0\r\n\r\n")


def serve(port: int, ready: Any) -> None:
    async def run() -> None:
        await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, reuse_port=True, backlog=4096)
        ready.set()
        await asyncio.sleep(1e9)

    os.sched_setaffinity(0, OTHER_CORES)
    asyncio.run(run())


def request(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: edge\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


class Stream(asyncio.Protocol):
    """Reads tokens, and how long each was on its way."""

    def __init__(self, delays: list[float], over: asyncio.Future[None]) -> None:
        self.delays, self.over, self.tokens, self.end = delays, over, 0, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(request(json.dumps({"messages": [], "stream": True}, separators=(",", ":")).encode()))

    def data_received(self, data: bytes) -> None:
        now = time.time_ns()
        for left in re.findall(rb'"left":(\d{19})', data):
            self.tokens += 1
            self.delays.append((now - int(left)) / 1e6)
        self.end = (self.end + data)[-7:]
        if self.end == b"\r\n0\r\n\r\n":
            self.transport.close()

    def connection_lost(self, _: Any) -> None:
        if self.tokens == TOKENS:
            self.over.set_result(None)
        else:
            self.over.set_exception(RuntimeError(f"{self.tokens} of {TOKENS} tokens came"))


async def streams(port: int, number: int) -> list[float]:
    loop = asyncio.get_running_loop()
    delays: list[float] = []
    ends = []
    for _ in range(number):
        end = loop.create_future()
        await loop.create_connection(partial(Stream, delays, end), "127.0.0.1", port)
        ends.append(end)
    await asyncio.gather(*ends)
    return delays


async def requests(port: int, size: int, number: int) -> list[float]:
    """One after another on few connections, at a rate: how long each took."""
    times: list[float] = []
    text = request(json.dumps({"messages": [{"role": "user", "content": "word " * (size // 5)}]}).encode())
    began = time.monotonic()
    numbers = iter(range(number))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        for index in numbers:
            await asyncio.sleep(began + index / RATE - time.monotonic())
            start = time.perf_counter()
            writer.write(text)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert head.startswith(b"HTTP/1.1 200") and length, head
            await reader.readexactly(int(length[1]))
            times.append((time.perf_counter() - start) * 1e3)
        writer.close()

    await asyncio.gather(*(connection() for _ in range(16)))
    return times


def client(what: Any, *arguments: int) -> list[float]:
    os.sched_setaffinity(0, OTHER_CORES)
    found: list[float] = asyncio.run(what(*arguments))
    return found


def measured(what: Any, *arguments: int, processes: int = 1) -> list[float]:
    with ProcessPoolExecutor(processes) as pool:
        clients = [pool.submit(client, what, *arguments) for _ in range(processes)]
        return sorted(value for made in clients for value in made.result())


@contextmanager
def engines() -> Iterator[int]:
    port = free_port()
    made = []
    for _ in range(PROCESSES):
        ready = multiprocessing.Event()
        process = multiprocessing.Process(target=serve, args=(port, ready), daemon=True)
        process.start()
        assert ready.wait(20)
        made.append(process)
    yield port
    for process in made:
        process.terminate()


@contextmanager
def edge(engine: int, changes: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Its port and process id."""
    port = free_port()
    server = {"name": "node0", "address": "127.0.0.1", "port": engine}
    with tempfile.TemporaryDirectory() as directory:
        config = write_files(
            Path(directory),
            gateway_bind_address="127.0.0.1", gateway_port=port, gateway_servers=[server],
            gateway_max_requests=STREAMS * 2, gateway_max_connections=STREAMS * 2 + 100,
            __gateway_edge_keys=[entry(KEY, "alice")], **changes,
        )  # fmt: skip
        config.write_text(config.read_text().replace("global\n", f"global\n    nbthread {len(EDGE_CORES)}\n", 1))
        log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # what the journal is on a node
        log.bind(f"{directory}/log")
        threading.Thread(target=lambda: [None for _ in iter(partial(log.recv, 65536), b"")], daemon=True).start()
        cores = ",".join(map(str, EDGE_CORES))
        process = subprocess.Popen(["taskset", "--cpu-list", cores, HAPROXY, "-db", "-f", config])
        time.sleep(3)  # its health check
        try:
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(20)


def part(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


def run(port: int, pid: int | None) -> dict[str, float]:
    row: dict[str, float] = {}
    for size in SIZES:
        measured(requests, port, size, 200)  # warm
        took = measured(requests, port, size, REQUESTS)
        row[f"p50 of {size}"], row[f"p99 of {size}"] = part(took, 0.5), part(took, 0.99)
    used = cpu_seconds([pid]) if pid else 0
    delays = measured(streams, port, STREAMS // PROCESSES, processes=PROCESSES)
    assert len(delays) == STREAMS * TOKENS
    row["p50 of a token"], row["p99 of a token"] = part(delays, 0.5), part(delays, 0.99)
    row["CPU"] = cpu_seconds([pid]) - used if pid else 0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with engines() as engine:
        for name, changes in VARIANTS.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            if changes is None:
                rows[name] = run(engine, None)
                continue
            with edge(engine, changes) as (port, pid):
                rows[name] = run(port, pid)
    text = table(rows)
    print(text)
    if asked.write:
        page = ROOT / "docs/accounts.md"
        marked = r"(<!-- bench-edge -->\n).*(<!-- end -->)"
        page.write_text(re.sub(marked, lambda found: found[1] + text + found[2], page.read_text(), flags=re.S))


def table(rows: dict[str, dict[str, float]]) -> str:
    bare = rows["no edge"]
    version = subprocess.run([HAPROXY, "-v"], capture_output=True, text=True, check=True).stdout.split()[2]
    lines = [
        f"HAProxy {version} on {len(EDGE_CORES)} of {len(CORES)} cores ({platform.machine()}), {time.strftime('%F')}; "
        f"milliseconds. {REQUESTS:,} requests of each size, {RATE} a second. {STREAMS:,} streams at once, with "
        f"{STREAMS / PAUSE:,.0f} tokens a second together; none was lost.",
        "",
        "| | " + " | ".join(rows) + " | added, with accounts |",
        "|---|" + "---|" * (len(rows) + 1),
    ]
    for what in bare:
        label = re.sub(r"of (\d+)$", lambda found: f"of a request of {int(found[1]) // 1000} kB", what)
        values = [row[what] for row in rows.values()]
        if what == "CPU":
            label, cells = (
                "CPU seconds of HAProxy for the streams",
                ["-", *(f"{value:.1f}" for value in values[1:]), "-"],
            )
        else:
            cells = [*(f"{value:.2f}" for value in values), f"{values[-1] - values[0]:.2f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
