"""Clients of the fleet: short requests and streams of many sessions, until SIGTERM; then the counts as JSON.

load.py SHORT STREAMS URL [URL ...] < key     sessions of each kind; each URL is a gateway's, a session keeps to one
"""

from __future__ import annotations

import asyncio
import collections
import json
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import yaml

PAUSE = 1.0  # seconds between two requests of a session
LIMIT = 1800  # seconds after which it ends by itself, and has failed
TOKENS = 40  # of a stream; the light engine makes one a word
# Either engine knows the answer.
QUESTION = yaml.safe_load((Path(__file__).resolve().parents[2] / "roles/verify/files/questions.yml").read_text())["sum"]


class Load:
    """What was sent, what failed, and which node each session was on."""

    def __init__(self, urls: list[str], key: str) -> None:
        self.urls, self.key = urls, key
        self.sent = self.done = self.streams = 0
        self.failed: list[str] = []
        self.cut: list[str] = []
        self.moves = 0
        self.homes: dict[str, str] = {}
        self.visits: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.stop = asyncio.Event()
        # SSL_CERT_FILE names an authority for gateways with TLS.
        self.authority = ssl.create_default_context()

    async def session(self, number: int, stream: bool) -> None:
        name = f"{'stream' if stream else 'short'}-{number}"
        url = self.urls[number % len(self.urls)]
        headers = {"Authorization": f"Bearer {self.key}", "x-session-id": name}
        options: dict[str, Any] = {"headers": headers, "timeout": 300, "trust_env": False, "verify": self.authority}
        async with httpx2.AsyncClient(base_url=url, **options) as client:
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
        answer = await client.post("/v1/chat/completions", json=self.body(QUESTION["prompt"], max_tokens=64))
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}: {answer.text[:200]}"
        self.seen(name, answer.headers["X-Glm-Node"])
        said = answer.json()["choices"][0]["message"]["content"]
        return "" if said == QUESTION["expect"] else f"answered {said!r:.200}"

    async def stream(self, client: httpx2.AsyncClient, name: str) -> str:
        self.streams += 1
        tokens, ended = 0, False
        # The same number of tokens from either engine: one counts words, the other is held to its limits.
        exactly = {"min_tokens": TOKENS, "max_tokens": TOKENS, "ignore_eos": True}
        body = self.body(f"Say {TOKENS} words", stream=True, stream_options={"include_usage": True}, **exactly)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"HTTP {answer.status_code}: {(await answer.aread())[:200]!r}"
            self.seen(name, answer.headers["X-Glm-Node"])
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
        return (
            "" if ended and tokens == TOKENS else f"{tokens} of {TOKENS} tokens, end {'seen' if ended else 'missing'}"
        )

    def seen(self, session: str, node: str) -> None:
        self.visits[session][node] += 1
        self.moves += self.homes.get(session, node) != node
        self.homes[session] = node

    def give_up(self) -> None:
        self.failed.append(f"nobody ended it within {LIMIT} s")
        self.stop.set()

    async def run(self, short: int, streams: int) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.call_later(LIMIT, self.give_up)
        numbers = [*((number, False) for number in range(short)), *((number, True) for number in range(streams))]
        await asyncio.gather(*(self.session(number, stream) for number, stream in numbers))

    def result(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "done": self.done,
            "failed": self.failed,
            "streams": self.streams,
            "cut": self.cut,
            "moves": self.moves,
            "visits": self.visits,
        }


def main() -> None:
    short, streams, *urls = sys.argv[1:]
    load = Load(urls, sys.stdin.readline().strip())
    asyncio.run(load.run(int(short), int(streams)))
    print(json.dumps(load.result()))


if __name__ == "__main__":
    main()
