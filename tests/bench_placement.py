#!/usr/bin/env python3
"""`make bench-placement`: what a gateway's choice of nodes does to coding sessions.

Replays sessions of many turns against four light engines, through HAProxy as it was (consistent hashing with bounded
loads), as it is (sticky sessions, new ones to the node with the fewest requests), and through vLLM's router by its
cache-aware policy. Writes docs/placement.md; fails where, at the larger load, the 90th percentile of a session's time
is above BUDGET of what hashing gives.

Time runs SPEED times as fast, and a word stands for WORD tokens, so that two cores carry it. All figures are in seconds
and tokens of the engines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / path) for path in ("tests/unit", "plugins/module_utils", ".")]
from cpu import cpu_seconds  # noqa: E402
from test_haproxy_template import HAPROXY, free_port, write_files  # noqa: E402

PAGE = ROOT / "docs/placement.md"
RESULTS = ROOT / "results/bench-placement/bench.json"
NODES = 4
BUDGET = 0.7
SPEED = 15
WORD = 64  # tokens
MINUTES = 50  # within which the sessions begin

# A node: what is published of vLLM on 8x B200 (docs/report.md), and what its profiles say.
PREFILL = 28_000  # tokens a second: 32 prompts of 8,192 tokens, all of them read after 9.3 s
DECODE = 41  # tokens a second of one request: 24.4 ms a token
CACHE = 1_200_000  # tokens: 60 GiB at 54 kB
SLOTS = 64  # --max-num-seqs

# Sessions, by TraceLab's trace of 4,300 sessions of Claude Code and Codex: median, and the sigma of a log-normal
# distribution that has the trace's 90th percentile too, or its mean. Where it would go on for hours it is cut.
STEPS, STEPS_MOST = (15, 1.71), 60  # of a session; 90th percentile 135
APPENDED = (800, 1.26)  # tokens that a step adds; 90th percentile 4,000
ANSWER, ANSWER_MOST = (240, 1.25), 8_000  # tokens; mean 523
TOOL, TOOL_MOST = (0.3, 2.97), 216  # seconds; 90th percentile 13.6, 99th 216
HUMAN, HUMAN_MOST = (84, 2.1), 1_236  # seconds; 90th percentile 1,236
BY_HUMAN = 0.108  # share of the steps that a human begins
SYSTEM = 16_000  # tokens that all sessions begin with: instructions and tools
CONTEXT = 200_000  # tokens at which a session is compacted
SUMMARY = 8_000

HASHING = """\
    http-request set-var(txn.session) uuid if !{ var(txn.session) -m found }
    balance hash var(txn.session)
    hash-type consistent sdbm avalanche
    hash-balance-factor 150
"""
POLICIES = {
    "hashing": "consistent hashing, bounded loads of 1.5 (before)",
    "sticky": "sticky, new sessions to the fewest requests (now)",
    "router": "vllm-router, cache-aware",
}

WORDS = """\
# Placement

[rollout.md](rollout.md#gateways) says what a gateway does with sessions. `make bench-placement` measures what it is
worth: it replays coding sessions against four light engines behind one gateway, and writes this page. Compared are

- consistent hashing of the session's id with bounded loads (`hash-balance-factor 150`), as gateways did before,
- what they do now: a stick table, `balance leastconn` for new sessions, and for those that were silent for ten minutes,
- vLLM's router with its cache-aware policy and its own defaults.

A session's time is the sum of its requests' latencies, without its pauses.

## What is replayed

The sessions follow the figures of TraceLab (arXiv 2606.30560), a trace of 4,300 sessions of Claude Code and Codex by
43 developers. Each figure is drawn, by a fixed seed, from a log-normal distribution with the trace's median and 90th
percentile; of answers with its mean of 523 tokens, and the median that its 4.9 s of generation mean at 50 tokens a
second:

| | median | 90th percentile | cut at |
|---|---|---|---|
| steps of a session, each a request | 15 | 135 | 60 |
| tokens that a step appends | 800 | 4,000 | 100,000 |
| tokens of an answer | 240 | 1,190 | 8,000 |
| seconds that a tool takes | 0.3 | 13.6 | 216, the trace's 99th percentile |
| seconds until a human goes on, after 10.8 % of the steps | 84 | 1,236 | 1,236 |

So most sessions are short and some are long, and a session's prompt grows with each step, to 200,000 tokens, where it
is compacted. All begin with the same 16,000 tokens of instructions and tools. They begin at random within 50 minutes.

A node reads 28,000 tokens of prompts a second, one prompt after another (the published run of vLLM on 8x B200 read 32
prompts of 8,192 tokens in 9.3 s), gives each request 41 tokens a second (24.4 ms a token there), has room for 1.2
million tokens in its prefix cache (60 GiB at 54 kB; the oldest go first), and works on 64 requests at a time. A
prompt's tokens that are cached cost nothing. That decoding slows down as requests are added is left out, and so are
caches in the node's memory (`--kv-offloading-size`): with them the caches are full later. Prompts are text of a 30th
of their length, so a router that reads them takes more CPU time than here; HAProxy does not look into them.

Two loads are replayed: one that the nodes carry, and one that is more than they can, where requests wait for a place
and what is cached is thrown out before it is asked for again. How much of either a choice of nodes saves depends on how
near the load is to that point: an overloaded fleet is slow whichever node is chosen.

A machine that is busy with something else, or too small, measures itself: the replay needs about a core for each run
while sessions begin. On 2 cores, at 40 times real time, the same 800 sessions had a p90 of 1,400 seconds and hit rates
of 80 %, by either choice of HAProxy; what is below was measured on a quiet machine of 16 cores.

What these engines leave out, a B200 would add: read the columns beside each other, not as a promise of seconds.

## Results
"""


@dataclass
class Step:
    """What is added to the conversation, what is answered, and what time passes before the next one."""

    appended: int
    answer: int
    pause: float


@dataclass
class Session:
    """A conversation, and what became of it."""

    number: int
    begin: float
    steps: list[Step]
    seconds: float = 0
    failed: list[str] = field(default_factory=list)


def drawn(chance: random.Random, shape: tuple[float, float], most: float = math.inf) -> float:
    """A value of a log-normal distribution."""
    return min(chance.lognormvariate(math.log(shape[0]), shape[1]), most)


def workload(seed: int, sessions: int, minutes: float) -> list[Session]:
    """Sessions that begin at random within so many minutes."""
    chance = random.Random(seed)
    made = []
    for number in range(sessions):
        steps = [
            Step(
                appended=max(1, round(drawn(chance, APPENDED, CONTEXT / 2) / WORD)),
                answer=max(1, round(drawn(chance, ANSWER, ANSWER_MOST) / WORD)),
                pause=drawn(chance, HUMAN, HUMAN_MOST)
                if chance.random() < BY_HUMAN
                else drawn(chance, TOOL, TOOL_MOST),
            )
            for _ in range(max(1, round(drawn(chance, STEPS, STEPS_MOST))))
        ]
        made.append(Session(number, chance.uniform(0, minutes * 60), steps))
    return made


def words(name: str, count: int) -> str:
    """Text that no other session has."""
    return " ".join(f"{name}.{number}" for number in range(count))


async def ask(port: int, session: str, messages: list[dict[str, str]]) -> str:
    """What went wrong with one request, if anything. The client costs as little as it can: it shares the cores."""
    asked = {
        "model": "light",
        "messages": messages,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"X-Session-Id: {session}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        answer = await reader.read(-1)
        writer.close()
    except OSError as error:
        return str(error)
    return "" if answer.split(b" ", 2)[1:2] == [b"200"] else answer[:200].decode(errors="replace")


async def replay(session: Session, port: int) -> None:
    """One session: it asks, waits for the answer, then for its tool or its human."""
    await asyncio.sleep(session.begin / SPEED)
    name = f"s{session.number}"
    system = {"role": "system", "content": words("system", SYSTEM // WORD)}
    messages = [system]
    held = SYSTEM // WORD
    for number, step in enumerate(session.steps):
        if (held + step.appended) * WORD > CONTEXT:
            messages = [system, {"role": "user", "content": words(f"{name}.{number}.summary", SUMMARY // WORD)}]
            held = (SYSTEM + SUMMARY) // WORD
        question = f"Say {step.answer} words"
        messages += [
            {"role": "user", "content": words(f"{name}.{number}", step.appended - len(question.split()))},
            {"role": "user", "content": question},
        ]
        began = time.monotonic()
        problem = await ask(port, name, messages)
        session.seconds += (time.monotonic() - began) * SPEED
        if problem:
            session.failed.append(problem)
        messages.append({"role": "assistant", "content": " ".join(["word"] * step.answer)})
        held += step.appended + step.answer
        await asyncio.sleep(step.pause / SPEED)


async def replay_all(sessions: list[Session], port: int) -> float:
    """The latest that the event loop was, in seconds of the engines: what the figures may be wrong by."""
    late = 0.0

    async def watch() -> None:
        nonlocal late
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.05)
            late = max(late, (time.monotonic() - began - 0.05) * SPEED)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(replay(session, port) for session in sessions))
    watching.cancel()
    return late


def children(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def wait_for(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            sys.exit(f"bench-placement: {url} did not answer within {seconds:.0f} s")
        time.sleep(0.1)


@contextmanager
def running(command: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, until the end of the block."""
    with log.open("w") as out, subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextmanager
def engines(directory: Path, python: Path) -> Iterator[list[int]]:
    """The ports of four light engines."""
    (directory / "config.json").write_text("{}")
    environment = {
        "LIGHT_LOAD_SECONDS": "0",
        "LIGHT_QUESTIONS": str(ROOT / "roles/verify/files/questions.yml"),
        "LIGHT_TOKEN_SECONDS": str(WORD / DECODE / SPEED),
        "LIGHT_PREFILL_RATE": str(PREFILL * SPEED / WORD),
        "LIGHT_CACHE_TOKENS": str(CACHE // WORD),
        "LIGHT_SLOTS": str(SLOTS),
    }
    ports = [free_port() for _ in range(NODES)]
    with ExitStack() as stack:
        for port in ports:
            command = [str(python), str(ROOT / "molecule/shared/light/vllm"), "serve", str(directory)]
            command += ["--served-model-name", "light", "--host", "127.0.0.1", "--port", str(port)]
            stack.enter_context(running(command, directory / f"engine-{port}.log", **environment))
        for port in ports:
            wait_for(f"http://127.0.0.1:{port}/health")
        yield ports


def router(policy: str, directory: Path, python: Path, ports: list[int], port: int) -> list[str]:
    """The command line of what places."""
    if policy == "router":
        urls = [f"http://127.0.0.1:{engine}" for engine in ports]
        return [
            *(str(python.parent / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)),
            *("--policy", "cache_aware", "--prometheus-port", str(free_port()), "--worker-urls", *urls),
        ]
    servers = [{"name": f"node{n}", "address": "127.0.0.1", "port": engine} for n, engine in enumerate(ports)]
    config = write_files(
        directory,
        gateway_auth="none",
        gateway_bind_address="127.0.0.1",
        gateway_port=port,
        gateway_edges=True,
        gateway_servers=servers,
        gateway_max_connections=4000,
    )
    if policy == "hashing":
        lines = config.read_text().splitlines(keepends=True)
        first = next(n for n, line in enumerate(lines) if line.strip() == "balance leastconn")
        kept = [line for line in lines[first + 1 :] if not line.strip().startswith("stick")]
        config.write_text("".join(lines[:first]) + HASHING + "".join(kept))
    return [HAPROXY, "-f", str(config)]


def counted(ports: list[int]) -> tuple[float, float]:
    """Prompt tokens that the engines have been asked, and those of them that were cached."""
    asked = hits = 0.0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                name, _, value = line.partition("{")
                if name == "vllm:prefix_cache_queries_total":
                    asked += float(value.rpartition(" ")[2])
                if name == "vllm:prefix_cache_hits_total":
                    hits += float(value.rpartition(" ")[2])
    return asked, hits


def measure(policy: str, sessions: int, seed: int, python: Path) -> dict[str, Any]:
    """One run."""
    replayed = workload(seed, sessions, MINUTES)
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        with engines(directory, python) as ports:
            command = router(policy, directory, python, ports, port)
            with running(command, directory / "router.log") as process:
                wait_for(f"http://127.0.0.1:{port}/health")
                before = cpu_seconds(children(process.pid))
                late = asyncio.run(replay_all(replayed, port))
                spent = cpu_seconds(children(process.pid)) - before
                asked, hits = counted(ports)
    times = [session.seconds for session in replayed]
    return {
        "policy": policy,
        "sessions": sessions,
        "seed": seed,
        "requests": sum(len(session.steps) for session in replayed),
        "failed": [problem for session in replayed for problem in session.failed],
        "p90": statistics.quantiles(times, n=10)[-1],
        "mean": statistics.mean(times),
        "hits": 100 * hits / asked,
        "cpu": spent,
        "late": late,
    }


def spread(values: list[float], digits: int = 0) -> str:
    """Mean, and standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}"


def ratios(rows: list[dict[str, Any]], policy: str) -> list[float]:
    """By seed, the 90th percentile of a policy beside that of hashing."""
    of = {(row["policy"], row["seed"]): row["p90"] for row in rows}
    return [p90 / of["hashing", seed] for (name, seed), p90 in of.items() if name == policy]


def verdict(rows: list[dict[str, Any]]) -> float:
    """What the budget is for."""
    most = max(row["sessions"] for row in rows)
    return statistics.mean(ratios([row for row in rows if row["sessions"] == most], "sticky"))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The results of one load."""
    lines = [
        "| | p90, s | p90 by that of hashing | mean, s | prompt tokens from the cache, % | router's CPU, s |",
        "|" + "---|" * 6,
    ]
    for policy, name in POLICIES.items():
        runs = [row for row in rows if row["policy"] == policy]
        figures = [
            spread([row["p90"] for row in runs]),
            spread(ratios(rows, policy), 2),
            spread([row["mean"] for row in runs]),
            spread([row["hits"] for row in runs], 1),
            spread([row["cpu"] for row in runs], 1),
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def version(command: list[str]) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0].split(" - ")[0]


def page(rows: list[dict[str, Any]], python: Path) -> str:
    """The text of docs/placement.md."""
    loads = sorted({row["sessions"] for row in rows})
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    metadata = "import importlib.metadata as m; print('vllm-router', m.version('vllm-router'))"
    lines = [WORDS.strip(), ""]
    for load in loads:
        of_load = [row for row in rows if row["sessions"] == load]
        requests = spread([row["requests"] for row in of_load if row["policy"] == "hashing"])
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in of_load}))
        lines += [f"**{load:,} sessions within {MINUTES} minutes**, {requests} requests, seeds {seeds}:", ""]
        lines += [*table(of_load), ""]
    failed = sum(len(row["failed"]) for row in rows)
    lines += [
        f"Wanted is a p90 of at most {BUDGET} of hashing's at the larger load; it is {verdict(rows):.2f}.",
        "",
        f"Mean ± standard deviation over the seeds; {failed} requests failed. Made by `make bench-placement` with",
        f"{version([HAPROXY, '-v'])} and {version([str(python), '-c', metadata])}, on {os.cpu_count()} cores of "
        f"{model.partition(': ')[2]}, all on",
        f"loopback, {SPEED} times as fast as real time. The load generator was late by at most "
        f"{max(row['late'] for row in rows):.0f} s of these seconds.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sessions", type=int, nargs="+", default=[800, 1200], help="loads")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[11, 12, 13], help="all for the largest load, the first for the others"
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=max(1, cores * 3 // 4), help="runs at a time; each takes a core at first"
    )
    parser.add_argument("--python", type=Path, required=True, help="of an environment with tests/bench_placement.txt")
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    runs = [
        (policy, load, seed)
        for load in sorted(options.sessions, reverse=True)
        for seed in (options.seeds if load == max(options.sessions) else options.seeds[:1])
        for policy in options.policies
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(measure, *run, options.python) for run in runs]
        rows = []
        for future in as_completed(futures):
            rows.append(future.result())
            print(json.dumps({**rows[-1], "failed": rows[-1]["failed"][:1]}), flush=True)
            RESULTS.write_text(json.dumps(rows))
    if set(options.policies) != set(POLICIES):
        return 0
    PAGE.write_text(page(rows, options.python))
    full = verdict(rows)
    print(f"bench-placement: p90 is {full:.2f} of hashing's (wanted at most {BUDGET}): see {PAGE.relative_to(ROOT)}")
    return int(full > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
