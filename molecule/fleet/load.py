"""Clients of the fleet: short requests and streams of many sessions, until SIGTERM; then the counts as JSON.

load.py URL [URL ...] < key     each URL is a gateway's; a session keeps to one of them
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import signal
import sys
import time
from typing import Any

import httpx2

SHORT, STREAMS = 24, 9  # sessions of each kind
PAUSE = 0.15  # seconds between two requests of a session
LIMIT = 1800  # seconds after which it ends by itself
WORDS = 40


class Load:
    """What was sent, what failed, and which node each session was on."""

    def __init__(self, urls: list[str], key: str) -> None:
        self.urls, self.key = urls, key
        self.sent = self.done = self.streams = 0
        self.failed: list[str] = []
        self.cut: list[str] = []
        self.moves = 0
        self.homes: dict[str, str] = {}
        self.nodes: collections.Counter[str] = collections.Counter()
        self.stop = asyncio.Event()

    async def session(self, number: int, stream: bool) -> None:
        name = f"{'stream' if stream else 'short'}-{number}"
        url = self.urls[number % len(self.urls)]
        headers = {"Authorization": f"Bearer {self.key}", "x-session-id": name}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as client:
            while not self.stop.is_set():
                self.sent += 1
                began = time.strftime("%H:%M:%S")
                try:
                    problem = await (self.stream(client, name) if stream else self.short(client, name))
                except (httpx2.HTTPError, ValueError) as error:
                    problem = f"{type(error).__name__}: {error}"
                if problem:
                    (self.cut if stream else self.failed).append(f"{began} {name}: {problem}")
                else:
                    self.done += 1
                await asyncio.sleep(PAUSE)

    def body(self, prompt: str, **more: Any) -> dict[str, Any]:
        thinking = {"chat_template_kwargs": {"enable_thinking": False}}
        return {"model": "glm-5.2-fp8", "messages": [{"role": "user", "content": prompt}], **thinking, **more}

    async def short(self, client: httpx2.AsyncClient, name: str) -> str:
        answer = await client.post("/v1/chat/completions", json=self.body("hello"))
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}: {answer.text[:200]}"
        self.seen(name, answer.headers["X-Glm-Node"])
        return "" if answer.json()["choices"][0]["message"]["content"] == "ok" else f"answered {answer.text[:200]}"

    async def stream(self, client: httpx2.AsyncClient, name: str) -> str:
        self.streams += 1
        words, ended = 0, False
        body = self.body(f"Say {WORDS} words", stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"HTTP {answer.status_code}: {(await answer.aread())[:200]!r}"
            self.seen(name, answer.headers["X-Glm-Node"])
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    words += sum(bool(choice["delta"].get("content")) for choice in json.loads(line[6:])["choices"])
        return "" if ended and words == WORDS else f"{words} of {WORDS} words, end {'seen' if ended else 'missing'}"

    def seen(self, session: str, node: str) -> None:
        self.nodes[node] += 1
        self.moves += self.homes.get(session, node) != node
        self.homes[session] = node

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.call_later(LIMIT, self.stop.set)
        numbers = itertools.chain(((n, False) for n in range(SHORT)), ((n, True) for n in range(STREAMS)))
        await asyncio.gather(*(self.session(number, stream) for number, stream in numbers))

    def result(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "done": self.done,
            "failed": self.failed,
            "streams": self.streams,
            "cut": self.cut,
            "moves": self.moves,
            "nodes": dict(self.nodes),
        }


def main() -> None:
    load = Load(sys.argv[1:], sys.stdin.readline().strip())
    asyncio.run(load.run())
    print(json.dumps(load.result()))


if __name__ == "__main__":
    main()
