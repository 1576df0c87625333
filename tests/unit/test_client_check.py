"""client_check against an endpoint that serves the clients, and against ones that are each wrong in one way."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.modules import client_check

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS: dict[str, Any] = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())
KEY = "sk-glm-" + "k" * 43


class Endpoint(ThreadingHTTPServer):
    """Answers `ok` by both APIs, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.refuse: Callable[[dict[str, Any]], int] = lambda body: 0
        self.change: Callable[[list[Any]], list[Any]] = lambda events: events
        self.text = "ok"
        text = json.dumps(QUESTIONS["agent_tool"]["expect_calls"][0]["arguments"])
        self.arguments = [text[:9], text[9:]]
        self.cached: int | None = 40
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body, _ in self.asked if at == path]


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
        if status := server.refuse(body):
            return self.answer(status, '{"error": {"message": "told to"}}')
        if "count_tokens" in self.path:
            return self.answer(200, '{"input_tokens": 55}')
        events = (
            self.messages(body) if "/messages" in self.path else [{"choices": [{"delta": {"content": server.text}}]}]
        )
        return self.answer(200, "".join(f"data: {json.dumps(event)}\n\n" for event in server.change(events)))

    def messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A thought, and the text, the call or what the call's result says."""
        cached = {} if self.server.cached is None else {"cache_read_input_tokens": self.server.cached}
        last = body["messages"][-1]["content"][-1]
        if last.get("text") == QUESTIONS["agent_tool"]["prompt"]:
            block = {"type": "tool_use", "id": "call-1", "name": "Bash", "input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in self.server.arguments]
        else:
            block = {"type": "text", "text": ""}
            code = re.search(r"[0-9]+", last["content"]) if last["type"] == "tool_result" else None
            text = QUESTIONS["agent_tool"]["expect"].format(code=code[0]) if code else self.server.text
            deltas = [{"type": "text_delta", "text": text}]
        return [
            {"type": "message_start", "message": {"usage": {"input_tokens": 15, "output_tokens": 0, **cached}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
            {"type": "content_block_start", "index": 1, "content_block": block},
            *({"type": "content_block_delta", "index": 1, "delta": delta} for delta in deltas),
            {"type": "message_delta", "usage": {"input_tokens": None, "output_tokens": 3}},
            {"type": "message_stop"},
        ]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def attempt(endpoint: Endpoint, kind: str, **more: str) -> dict[str, Any]:
    url = f"http://127.0.0.1:{endpoint.server_port}"
    environment = {
        "openai": {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "my-glm"},
        "claude_code": {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": KEY,
            "ANTHROPIC_MODEL": "glm",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "glm",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "32000",
            "CLAUDE_CODE_EFFORT_LEVEL": "high",
        },
    }[kind]
    client = {"kind": kind, "environment": {**environment, **more}}
    result: dict[str, Any] = client_check.attempt(client, {"questions": QUESTIONS, "timeout": 5, "ca_file": ""})
    assert KEY not in result["detail"] and "\n" not in result["detail"]
    return result


def test_openai(endpoint: Endpoint) -> None:
    assert attempt(endpoint, "openai") == {"ok": True, "detail": "my-glm answered 'ok'", "cached_tokens": None}
    ((path, body, headers),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["stream"]) == ("my-glm", True)


def test_claude_code(endpoint: Endpoint) -> None:
    outcome = attempt(endpoint, "claude_code")
    assert outcome["ok"] and outcome["cached_tokens"] == 40
    assert outcome["detail"] == (
        "glm answered 2 turns and called a tool in a third; 55 prompt tokens in the second, 40 of them from the prefix "
        "cache; 55 counted"
    )
    assert all(headers["x-api-key"] == KEY for _, _, headers in endpoint.asked)
    first, second, ask, result = endpoint.bodies("/v1/messages?beta=true")
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"][0]["text"] == "ok"
    assert first["tools"][0]["input_schema"]["required"] == ["command"]
    assert first["system"] == second["system"]
    assert (first["max_tokens"], first["output_config"]) == (32000, {"effort": "high"})
    assert [turn["role"] for turn in result["messages"]] == ["user", "assistant", "user"]
    assert result["messages"][0] == ask["messages"][0]
    assert [block["type"] for block in result["messages"][1]["content"]] == ["tool_use"]
    assert result["messages"][1]["content"][0]["input"]["command"] == "cat note.txt"
    assert result["messages"][2]["content"][0]["tool_use_id"] == "call-1"


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        ([], "called Bash with {}"),
        (['{"commnd": "cat note.txt"}'], "called Bash with {'commnd': 'cat note.txt'}"),
        (['{"command": "ca'], "unexpected shape"),
    ],
)
def test_claude_code_with_other_arguments_of_the_call(endpoint: Endpoint, arguments: list[str], detail: str) -> None:
    endpoint.arguments = arguments
    result = attempt(endpoint, "claude_code")
    assert not result["ok"] and detail in result["detail"]


def test_claude_code_that_calls_no_tool(endpoint: Endpoint) -> None:
    endpoint.change = lambda events: [
        event for event in events if "tool_use" not in str(event) and "json" not in str(event)
    ]
    assert "called no tool, but answered ''" in attempt(endpoint, "claude_code")["detail"]


def test_claude_code_that_does_not_read_the_result(endpoint: Endpoint) -> None:
    endpoint.change = lambda events: json.loads(re.sub("[0-9]{4}", "0", json.dumps(events)))
    assert "answered 'code-0' to the tool's result, which says 'code-" in attempt(endpoint, "claude_code")["detail"]


def test_every_model_is_asked_once(endpoint: Endpoint) -> None:
    attempt(endpoint, "claude_code", ANTHROPIC_DEFAULT_OPUS_MODEL="other", ANTHROPIC_SMALL_FAST_MODEL="other")
    assert [body["model"] for body in endpoint.bodies("/v1/messages?beta=true")] == [*["glm"] * 4, "other"]


def test_cached_tokens_that_are_not_told_are_no_failure(endpoint: Endpoint) -> None:
    endpoint.cached = None
    result = attempt(endpoint, "claude_code")
    assert result["ok"] and result["cached_tokens"] is None
    assert "cached tokens are not reported" in result["detail"]


WRONG: dict[str, tuple[Callable[[Endpoint], None], str]] = {
    "refused": (lambda server: setattr(server, "refuse", lambda body: 401), "HTTP 401: told to"),
    "other answer": (lambda server: setattr(server, "text", "lkj 0"), "answered 'lkj 0', wanted 'ok'"),
    "no answer": (lambda server: setattr(server, "change", lambda events: []), ""),
    "another shape": (lambda server: setattr(server, "change", lambda events: [{"choices": [{}]}]), "shape"),
}


@pytest.mark.parametrize("kind", ["openai", "claude_code"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong(endpoint: Endpoint, name: str, kind: str) -> None:
    mutate, detail = WRONG[name]
    mutate(endpoint)
    result = attempt(endpoint, kind)
    assert not result["ok"]
    assert detail in result["detail"]


def test_claude_code_second_turn_refused(endpoint: Endpoint) -> None:
    endpoint.refuse = lambda body: 400 if len(body["messages"]) > 1 else 0
    assert attempt(endpoint, "claude_code")["detail"] == "HTTP 400: told to"


def test_claude_code_stream_that_breaks_off(endpoint: Endpoint) -> None:
    endpoint.change = lambda events: events[:-1]
    assert "from message_start to message_delta" in attempt(endpoint, "claude_code")["detail"]
    endpoint.change = lambda events: [*events[:1], {"type": "error", "error": {"message": "out of memory"}}]
    assert "out of memory" in attempt(endpoint, "claude_code")["detail"]


def test_nobody_there() -> None:
    environment = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "glm"}
    client = {"kind": "openai", "environment": environment}
    result = client_check.attempt(client, {"questions": QUESTIONS, "timeout": 2, "ca_file": ""})
    assert not result["ok"] and "/v1/chat/completions of 127.0.0.1:9: " in result["detail"]
