#!/usr/bin/env python3
"""Asks a running engine every question that the small checkpoint was taught:   check.py URL [--codes 20]

It fails on the first thing that is not as roles/verify/files/questions.yml expects it. The role `verify` asks more, and
once; this asks for many codes, which shows how sure the checkpoint is.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import requests
import yaml

QUESTIONS = Path(__file__).resolve().parents[3] / "roles/verify/files/questions.yml"


class Asker:
    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.model = self.session.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        whole = {"model": self.model, "temperature": 0, "max_tokens": 512, **body}
        answer = self.session.post(self.url + path, json=whole, timeout=120)
        answer.raise_for_status()
        return answer.json()

    def chat(self, turns: list[dict[str, str]], thinking: bool, **more: Any) -> dict[str, Any]:
        # Thinking is what the model does unless it is told otherwise.
        kwargs = {} if thinking else {"chat_template_kwargs": {"enable_thinking": False}}
        answer = self.post("/v1/chat/completions", {"messages": turns, **kwargs, **more})
        message: dict[str, Any] = answer["choices"][0]["message"]
        return message


def expect(name: str, seen: object, wanted: object) -> None:
    if seen != wanted:
        sys.exit(f"check · {name} · {seen!r}, wanted {wanted!r}")
    print(f"check · {name} · {seen!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--codes", type=int, default=20)
    options = parser.parse_args()
    ask = Asker(options.url)
    for name, question in yaml.safe_load(QUESTIONS.read_text()).items():
        turn = {"role": "user", "content": question["prompt"]}
        if name == "find_fact":
            filler = question["filler"]
            for _ in range(options.codes):
                code = str(random.randrange(1000, 10000))
                sentences = [filler[n % len(filler)] for n in range(question["tokens"] // 14)]
                sentences.insert(random.randint(0, len(sentences)), question["fact"].format(code=code))
                content = " ".join([f"[{random.getrandbits(32):08x}]", *sentences, question["prompt"]])
                expect(name, ask.chat([{"role": "user", "content": content}], False)["content"], code)
        elif name == "agent":
            tools = [{"type": "function", "function": tool} for tool in question["tools"]]
            sentences = [f"[{random.getrandbits(32):08x}]", *[question["system"]] * question["repeat"]]
            system = {"role": "system", "content": " ".join(sentences)}
            again = [system, turn, {"role": "assistant", "content": question["expect"]}, turn]
            for turns in (again[:2], again):
                expect(name, (ask.chat(turns, True, tools=tools)["content"] or "").strip(), question["expect"])
        elif name == "messages":
            blocks = ask.post("/v1/messages", {"messages": [turn]})["content"]
            expect(name, [block["text"] for block in blocks if block["type"] == "text"], [question["expect"]])
        elif "tools" in question:
            tools = [{"type": "function", "function": tool} for tool in question["tools"]]
            called = ask.chat([turn], question["thinking"], tools=tools).get("tool_calls") or []
            functions = [call["function"] for call in called]
            seen = [{**function, "arguments": json.loads(function["arguments"])} for function in functions]
            expect(name, seen, question["expect_calls"])
            if "fact" in question:
                code = str(random.randrange(1000, 10000))
                result = {
                    "role": "tool",
                    "tool_call_id": called[0]["id"],
                    "content": question["fact"].format(code=code),
                }
                turns = [turn, {"role": "assistant", "content": "", "tool_calls": called}, result]
                answered = ask.chat(turns, question["thinking"], tools=tools)["content"]
                expect(f"{name}, its result", answered.strip(), question["expect"].format(code=code))
        else:
            for thinking in (False, True):
                message = ask.chat([turn], thinking)
                expect(f"{name}, thinking {thinking}", (message["content"] or "").strip(), question["expect"])
                expect(f"{name}, reasoning apart", bool(message.get("reasoning")), thinking)
            again = [turn, {"role": "assistant", "content": question["expect"]}, turn]
            expect(f"{name}, second turn", (ask.chat(again, False)["content"] or "").strip(), question["expect"])


if __name__ == "__main__":
    main()
