"""The real Claude Code with the file that the role writes, against an endpoint that keeps to its window."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import claude_code
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS: dict[str, Any] = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  roles:
    - role: glm.fleet.clients
      clients_url: {url}
      clients_models: [glm-5.2-fp8]
      clients_auth: none
      clients_directory: {directory}
"""
# What makes the client keep to the window.
UNSET = ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_AUTO_COMPACT_WINDOW")


class Endpoint(ThreadingHTTPServer):
    """Answers as the questions want, and refuses what does not fit its window, in vLLM's words."""

    daemon_threads = True

    def __init__(self, window: int | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.window = window
        self.listed = 200  # status of the list of models
        self.asked: list[tuple[bool, dict[str, Any]]] = []  # whether it was refused, and what
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, refused: bool) -> int:
        return sum(was is refused for was, _ in self.asked)

    @property
    def summaries(self) -> int:
        """How often a summary of the conversation was asked for."""
        return sum("Respond with TEXT ONLY" in last_text(body) for _, body in self.asked)


def last_text(body: dict[str, Any]) -> str:
    """Of the user's last turn; the client puts a turn of the system behind it."""
    content = [turn for turn in body["messages"] if turn["role"] == "user"][-1]["content"]
    return content if isinstance(content, str) else str(content[-1].get("text") or content[-1].get("content"))


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/event-stream")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        model = {"id": "glm-5.2-fp8", "max_model_len": self.server.window}
        self.answer(self.server.listed, json.dumps({"data": [model]} if self.server.listed == 200 else {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "/chat/completions" in self.path:
            return self.answer(200, 'data: {"choices": [{"delta": {"content": "ok"}}]}\n\n')
        # Three characters for a token: more tokens than the client takes its own text for.
        tokens = sum(len(json.dumps(body.get(name, ""))) for name in ("system", "tools", "messages")) // 3
        if "count_tokens" in self.path:
            return self.answer(200, json.dumps({"input_tokens": tokens}))
        refused = tokens + body["max_tokens"] > (self.server.window or 0)
        self.server.asked.append((refused, body))
        if refused:
            message = (
                f"This model's maximum context length is {self.server.window} tokens. However, you requested "
                f"{body['max_tokens']} output tokens and your prompt contains at least {tokens} input tokens."
            )
            error = {"type": "invalid_request_error", "message": message}
            return self.answer(400, json.dumps({"type": "error", "error": error}))
        events = "".join(
            f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in self.events(body, tokens)
        )
        return self.answer(200, events)

    @staticmethod
    def events(body: dict[str, Any], tokens: int) -> Iterator[dict[str, Any]]:
        text, call = last_text(body), QUESTIONS["agent_tool"]
        if text == call["prompt"]:
            block = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(call["expect_calls"][0]["arguments"])}
        else:
            block = {"type": "text", "text": ""}
            said = "<summary>Much was said.</summary>" if "Respond with TEXT ONLY" in text else "ok"
            result = re.fullmatch(call["fact"].format(code="([0-9]+)"), text)
            delta = {"type": "text_delta", "text": call["expect"].format(code=result[1]) if result else said}
        usage = {"input_tokens": tokens, "output_tokens": 1}
        # The client takes two answers with one id for one.
        message = {"id": str(uuid.uuid4()), "type": "message", "role": "assistant", "model": body["model"]}
        reason = "tool_use" if block["type"] == "tool_use" else "end_turn"
        yield {"type": "message_start", "message": {**message, "content": [], "stop_reason": None, "usage": usage}}
        yield {"type": "content_block_start", "index": 0, "content_block": block}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage}
        yield {"type": "message_stop"}


@pytest.fixture
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    server = Endpoint(request.param)
    yield server
    server.shutdown()
    server.server_close()


def write(endpoint: Endpoint, tmp_path: Path, code: int = 0) -> str:
    """Runs the role, and gives what it says; the files are in the folder `clients`."""
    play = tmp_path / "play.yml"
    play.write_text(PLAY.format(url=endpoint.url, directory=tmp_path / "clients"))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(play)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def settings(tmp_path: Path) -> dict[str, str]:
    return claude_code.sourced(tmp_path / "clients/claude-code.env")


def hold(
    endpoint: Endpoint, given: dict[str, str], folder: Path, lengths: list[int], until: Callable[[], bool]
) -> list[str]:
    """The answers of a session with turns of these lengths in characters."""
    endpoint.asked.clear()
    session = str(uuid.uuid4())
    answers: list[str] = []
    for length in lengths:
        text = ("Keep this text in mind. " * (length // 24)) + "Reply exactly: ok"
        option = "--resume" if answers else "--session-id"
        answers.append(claude_code.ask(given, folder, text, option, session)["result"])
        if until():
            break
    return answers


@pytest.mark.parametrize(
    ("endpoint", "lengths"),
    [(49152, [6_000] * 9), (131072, [*[45_000] * 3, *[12_000] * 12])],  # the latter: close to the edge in small steps
    indirect=["endpoint"],
    ids=["least", "recipe"],
)
def test_a_session_longer_than_the_window_compacts(endpoint: Endpoint, lengths: list[int], tmp_path: Path) -> None:
    write(endpoint, tmp_path)
    given = settings(tmp_path)
    answers = hold(endpoint, given, tmp_path, lengths, until=lambda: endpoint.summaries > 0)
    assert endpoint.count(refused=True) == 0
    assert endpoint.summaries == 1
    assert set(answers) == {"ok"}
    # What the settings are for: without them the endpoint refuses requests of such a session.
    without = {name: value for name, value in given.items() if name not in UNSET}
    hold(endpoint, without, tmp_path, lengths[:1] * 9, until=lambda: endpoint.count(refused=True) > 0)
    assert endpoint.count(refused=True) > 0


@pytest.mark.parametrize("endpoint", [131072], indirect=True)
def test_what_it_asks_for(endpoint: Endpoint, tmp_path: Path) -> None:
    write(endpoint, tmp_path)
    given = settings(tmp_path)
    assert given["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == given["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(131072 - 12000)
    endpoint.asked.clear()
    (tmp_path / "note.txt").write_text(QUESTIONS["agent_tool"]["fact"].format(code=4711))
    answer = claude_code.ask(given, tmp_path, QUESTIONS["agent_tool"]["prompt"], "--effort", "low")
    assert (answer["result"], answer["num_turns"]) == (QUESTIONS["agent_tool"]["expect"].format(code=4711), 2)
    assert [(body["max_tokens"], body["output_config"]) for _, body in endpoint.asked] == [
        (32000, {"effort": "high"})
    ] * 2
    assert not any("billing" in str(body["system"]) for _, body in endpoint.asked)


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        (16384, "claude-code: left out, since a window of 16384 tokens is served and it needs 49152: raise --max-"),
        (None, "/v1/models does not tell max_model_len of glm-5.2-fp8"),
    ],
    indirect=["endpoint"],
    ids=["small", "untold"],
)
def test_a_window_that_does_not_hold_it(endpoint: Endpoint, reason: str, tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients/claude-code.env").write_text("of an earlier, larger window")
    output = write(endpoint, tmp_path)
    assert reason in output
    assert endpoint.asked == [], "it is not tried"
    assert {path.name for path in (tmp_path / "clients").iterdir()} == {"curl.sh", "openai-sdk.py"}


@pytest.mark.parametrize("endpoint", [131072], indirect=True)
@pytest.mark.parametrize(("status", "reason"), [(503, "503"), (204, "did not list the models")])
def test_a_file_is_kept_where_the_window_was_not_told_once(
    endpoint: Endpoint, status: int, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients/claude-code.env").write_text("of an earlier run")
    endpoint.listed = status
    output = write(endpoint, tmp_path, code=2)
    (line,) = [line for line in output.splitlines() if line.startswith("[ERROR]")]
    assert "no file was written" in line and reason in line and line.rstrip().endswith("run it again")
    assert [path.name for path in (tmp_path / "clients").iterdir()] == ["claude-code.env"]
