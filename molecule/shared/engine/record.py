#!/usr/bin/env python3
"""Records what a running engine answers to the requests that matter here:   record.py URL > answers.json

tests/fixtures/vllm/answers.json was recorded from the engine image with the small checkpoint. The light engine is held
to the same shapes by tests/images/test_light.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import requests
import yaml

MODEL = "glm-5.2-fp8"
ASK = {
    "model": MODEL,
    "temperature": 0,
    "max_tokens": 128,
    "messages": [{"role": "user", "content": "Reply exactly: ok"}],
}
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
QUESTIONS = yaml.safe_load((Path(__file__).resolve().parents[3] / "roles/verify/files/questions.yml").read_text())


def tools(name: str) -> dict[str, Any]:
    """One of the questions with a tool, as the chat API takes it."""
    question = QUESTIONS[name]
    functions = [{"type": "function", "function": tool} for tool in question["tools"]]
    return {"messages": [{"role": "user", "content": question["prompt"]}], "tools": functions, "tool_choice": "auto"}


def anthropic_tools(name: str) -> dict[str, Any]:
    question = QUESTIONS[name]
    described = [
        {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
        for tool in question["tools"]
    ]
    return {"messages": [{"role": "user", "content": question["prompt"]}], "tools": described}


REQUESTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "models": ("/v1/models", None),
    "version": ("/version", None),
    "chat": (CHAT, {**ASK, **PLAIN}),
    "chat, thinking": (CHAT, ASK),
    "chat, stream": (CHAT, {**ASK, **PLAIN, **STREAM}),
    "chat, thinking, stream": (CHAT, {**ASK, **STREAM}),
    "chat, low effort": (CHAT, {**ASK, "reasoning_effort": "low"}),
    "tool": (CHAT, {**ASK, **PLAIN, **tools("tool_call")}),
    "tool, stream": (CHAT, {**ASK, **PLAIN, **tools("tool_call"), **STREAM}),
    "tool without arguments, stream": (CHAT, {**ASK, **PLAIN, **tools("tool_call_plain"), **STREAM}),
    "two calls, stream": (CHAT, {**ASK, **PLAIN, **tools("tool_call_twice"), **STREAM}),
    "two calls, thinking, stream": (CHAT, {**ASK, **tools("tool_call_twice"), **STREAM}),
    "messages": (MESSAGES, ASK),
    "messages, no thinking": (MESSAGES, {**ASK, **PLAIN}),
    "messages, stream": (MESSAGES, {**ASK, "stream": True}),
    "messages, low effort": (MESSAGES, {**ASK, "output_config": {"effort": "low"}}),
    "messages, tool": (MESSAGES, {**ASK, **PLAIN, **anthropic_tools("tool_call")}),
    "messages, tool, stream": (MESSAGES, {**ASK, **PLAIN, **anthropic_tools("tool_call"), "stream": True}),
    "messages, tool without arguments, stream": (
        MESSAGES,
        {**ASK, **PLAIN, **anthropic_tools("tool_call_plain"), "stream": True},
    ),
    "messages, two calls, stream": (MESSAGES, {**ASK, **anthropic_tools("tool_call_twice"), "stream": True}),
    "count_tokens": (f"{MESSAGES}/count_tokens", {name: ASK[name] for name in ("model", "messages")}),
    "chat, other model": (CHAT, {**ASK, "model": "another"}),
    "messages, other model": (MESSAGES, {**ASK, "model": "another"}),
    "chat, no messages": (CHAT, {"model": MODEL}),
}


def answer(url: str, name: str) -> dict[str, Any]:
    """Status, and the body or the events of the stream."""
    path, body = REQUESTS[name]
    session = requests.Session()
    session.trust_env = False
    reply = session.request("GET" if body is None else "POST", url + path, json=body, timeout=60)
    kind = reply.headers.get("Content-Type", "").partition(";")[0]
    told: dict[str, Any] = {"status": reply.status_code, "type": kind}
    if kind == "text/event-stream":
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        told["done"] = lines[-1] == "[DONE]"
        told["events"] = [json.loads(line) for line in lines if line != "[DONE]"]
    else:
        told["body"] = reply.json()
    return told


def metrics(url: str) -> list[str]:
    """Names of the metrics that carry the engine's own prefix."""
    session = requests.Session()
    session.trust_env = False
    text = session.get(f"{url}/metrics", timeout=60).text
    return sorted({line.split()[2] for line in text.splitlines() if line.startswith("# TYPE vllm:")})


if __name__ == "__main__":
    json.dump(
        {"answers": {name: answer(sys.argv[1], name) for name in REQUESTS}, "metrics": metrics(sys.argv[1])},
        sys.stdout,
        indent=1,
    )
    print()
