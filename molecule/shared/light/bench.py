"""`vllm bench serve` for the light engine: real requests at the engine, measured, with the real client's figures."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import aiohttp


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags that matter here; the others are taken as they come."""
    parser = argparse.ArgumentParser(prog="vllm bench serve")
    for name in ("random-output-len", "random-input-len", "num-prompts", "max-concurrency", "num-warmups"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("base-url", "endpoint", "model", "result-filename"):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_known_args(argv)[0]


async def request(session: aiohttp.ClientSession, options: argparse.Namespace) -> list[float]:
    """When it was sent and when each of its tokens came, in seconds."""
    body = {
        "model": options.model,
        "messages": [{"role": "user", "content": f"Say {options.random_output_len} words"}],
        "stream": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    times = [time.perf_counter()]
    async with session.post(options.base_url + options.endpoint, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {") and b'"content": "word' in line:
                times.append(time.perf_counter())
    return times


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    turn = asyncio.Semaphore(options.max_concurrency)
    done = 0
    async with aiohttp.ClientSession() as session:

        async def one(total: int) -> list[float] | None:
            nonlocal done
            async with turn:
                try:
                    times = await request(session, options)
                except aiohttp.ClientError:
                    return None
            done += 1
            print(f"{done}/{total} [", flush=True)
            return times

        await asyncio.gather(*(one(options.num_warmups) for _ in range(options.num_warmups)))
        done, began = 0, time.perf_counter()
        results = await asyncio.gather(*(one(options.num_prompts) for _ in range(options.num_prompts)))
        duration = time.perf_counter() - began
    whole = [times for times in results if times and len(times) == options.random_output_len + 1]
    tokens = len(whole) * options.random_output_len
    return {
        "duration": duration,
        "completed": len(whole),
        "failed": len(results) - len(whole),
        "output_throughput": tokens / duration,
        "total_token_throughput": (tokens + len(whole) * options.random_input_len) / duration,
        **spread("ttft", [times[1] - times[0] for times in whole]),
        **spread("tpot", [(times[-1] - times[1]) / max(1, len(times) - 2) for times in whole]),
        **spread("itl", [after - before for times in whole for before, after in zip(times[1:], times[2:])]),
        **spread("e2el", [times[-1] - times[0] for times in whole]),
    }


def spread(name: str, seconds: list[float]) -> dict[str, float]:
    """Mean and percentiles, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    percentiles = {f"p{percent}_{name}_ms": cuts[percent - 1] * 1000 for percent in (50, 90, 99)}
    return {f"mean_{name}_ms": statistics.mean(seconds) * 1000, **percentiles}


def main(argv: list[str]) -> None:
    options = parse(argv)
    Path(options.result_filename).write_text(json.dumps(asyncio.run(measure(options))))
