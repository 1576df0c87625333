"""What the accounts say, against the counters of real vLLM and against what the clients themselves were told."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from conftest import RESULTS
from fleet import Fleet, provided
from testbed import ROOT, Play, crowd

INVENTORY = ROOT / "molecule/edge/accounts"
NODE, EDGE = "accounts-1", "http://198.18.78.10:8000"
REQUESTS, AT_ONCE = 10_000, 32
NAMES = ("alice", "bob", "carol")
WORDS = ["cat", "dog", "sun", "moon", "tree", "river", "stone", "cloud", "bird", "fish"]
# Of 1,000 requests; those that tell their client what they took, and others. Of a stream that is broken off the engine
# makes two or three tokens more before it knows, and more on a crowded machine: nobody gets those, and nobody is
# charged for them.
TELLING = {
    "chat": 250, "chat stream": 250, "completion": 100, "completion stream": 100, "message": 80, "message stream": 70
}  # fmt: skip
MIXED = TELLING | {"silent chat stream": 145, "broken off": 5}
MOST = 0.001  # how far apart the sums may be
COUNTERS = {"input": "vllm:prompt_tokens_total", "output": "vllm:generation_tokens_total"}


class Client:
    """One of many sessions at once; what each key was told that it used."""

    def __init__(self, keys: dict[str, str], mix: dict[str, int]) -> None:
        self.keys, self.mix = keys, mix
        self.told: dict[str, Counter[str]] = {name: Counter() for name in keys}
        self.kinds: Counter[str] = Counter()

    async def run(self, requests: int) -> None:
        numbers = iter(range(requests))
        options: dict[str, Any] = {"base_url": EDGE, "timeout": 120, "trust_env": False}
        async with httpx2.AsyncClient(**options) as client:

            async def session() -> None:
                for number in numbers:
                    await self.ask(client, random.Random(number))

            await asyncio.gather(*(session() for _ in range(AT_ONCE)))

    async def ask(self, client: httpx2.AsyncClient, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        kind = rng.choices([*self.mix], [*self.mix.values()])[0]
        self.kinds[kind] += 1
        streamed = "stream" in kind or kind == "broken off"
        prompt = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 200])))
        body: dict[str, Any] = {"model": "glm-5.2-fp8", "stream": streamed, "max_tokens": rng.choice([4, 16, 40])}
        if "completion" in kind:
            path, body["prompt"] = "/v1/completions", prompt
        else:
            path = "/v1/messages" if "message" in kind else "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": prompt}]
        if kind in ("chat stream", "completion stream"):
            body["stream_options"] = {"include_usage": True}
        if kind == "broken off":
            body |= {"max_tokens": 200, "min_tokens": 200, "ignore_eos": True}
        headers = {"x-api-key": self.keys[name], "anthropic-version": "2023-06-01"}
        self.told[name]["requests"] += 1
        if not streamed:
            answer = await client.post(path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            self.tell(name, answer.json()["usage"])
            return
        async with client.stream("POST", path, json=body, headers=headers) as stream:
            assert stream.status_code == 200
            seen: dict[str, Any] = {}
            lines = 0
            async for line in stream.aiter_lines():
                lines += line.startswith("data: ")
                if kind == "broken off" and lines > 20:
                    self.told[name]["broken_off"] += 1
                    return
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    found = event.get("usage") or event.get("message", {}).get("usage") or {}
                    assert "silent" not in kind or (not found and event["choices"])
                    seen |= {what: number for what, number in found.items() if isinstance(number, int)}
            self.tell(name, seen)

    def tell(self, name: str, usage: dict[str, Any]) -> None:
        anthropic = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        self.told[name]["input"] += usage.get("prompt_tokens") or sum(usage.get(part) or 0 for part in anthropic)
        self.told[name]["output"] += usage.get("completion_tokens") or usage.get("output_tokens", 0)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    play = Play(tmp_path_factory.mktemp("accounts"), INVENTORY)
    images = ["vllm/vllm-openai:glm52-cu129"]
    with provided(Fleet(play, (NODE,), {NODE: EDGE}, {}), "ACCOUNTS_KEEP", images) as fleet:
        run = fleet.play(seconds=1500)
        assert run.code == 0, run.messages
        yield fleet


def counters(fleet: Fleet) -> dict[str, float]:
    text = fleet.run(NODE, "curl -s http://127.0.0.1:8001/metrics")
    return {
        what: sum(float(value) for value in re.findall(rf"^{name}\{{.*?\}} (\S+)$", text, re.M))
        for what, name in COUNTERS.items()
    }


def usage(fleet: Fleet) -> dict[str, Counter[str]]:
    """By key, as a user asks for it."""
    command = [sys.executable, "-m", "glm_fleet", "usage", "-i", str(INVENTORY), "--days", "2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sums: dict[str, Counter[str]] = {}
    for row in json.loads(done.stdout)["nodes"][NODE]["usage"]["rows"]:
        sums.setdefault(row["key"], Counter()).update({what: row[what] for what in row if isinstance(row[what], int)})
    return sums


def test_ten_thousand_mixed_requests(fleet: Fleet) -> None:
    for name in NAMES:
        run = fleet.play(playbook="playbooks/keys.yml", glm_key_action="add", glm_key_name=name)
        assert run.code == 0, run.messages
    keys = {words[1]: words[0] for words in fleet.key_lines() if words[1:]}
    before, known = counters(fleet), usage(fleet)
    client = Client({name: keys[name] for name in NAMES}, MIXED)
    asyncio.run(client.run(REQUESTS))
    after, sums = counters(fleet), usage(fleet)

    rows, worst = [], 0.0
    for what in COUNTERS:
        engine = after[what] - before[what]
        counted = sum(sums[name][what] for name in NAMES)
        apart = abs(counted - engine) / engine
        worst = max(worst, apart)
        rows.append(f"| {what} | {engine:,.0f} | {counted:,} | {apart:.4%} |")
    table = [f"{REQUESTS:,} requests: {', '.join(f'{count:,} {kind}' for kind, count in sorted(client.kinds.items()))}"]
    table += ["", "| tokens | counted by vLLM | by the accounts | apart |", "|---|---|---|---|", *rows]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "accounts.md").write_text("\n".join(table) + "\n")
    assert worst <= MOST * crowd(), rows
    # Others used nothing meanwhile.
    assert {name: sums[name] for name in sums if name not in NAMES} == known
    for name in NAMES:
        told = client.told[name]
        assert sums[name]["requests"] == told["requests"], name
        # One whose rest is on its way already when its client leaves has ended.
        assert 0 < sums[name]["broken_off"] <= told["broken_off"], name
        assert sums[name]["failed"] == sums[name]["unmeasured"] == 0, sums[name]


def test_what_a_client_is_told_is_what_is_counted(fleet: Fleet) -> None:
    keys = {words[1]: words[0] for words in fleet.key_lines() if words[1:]}
    before = usage(fleet)
    client = Client({name: keys[name] for name in NAMES}, TELLING)
    asyncio.run(client.run(500))
    after = usage(fleet)
    for name in NAMES:
        for what in ("input", "output", "requests"):
            assert after[name][what] - before[name][what] == client.told[name][what], (name, what)
