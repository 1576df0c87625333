"""Accounts: what a real HAProxy takes out of requests and answers, and what becomes of its log."""

from __future__ import annotations

import http.client
import json
import os
import random
import stat
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exposure import MOST, exposure
from test_haproxy_template import KEY, VARS, Edge, QuietHandler, QuietServer, entry, start, template

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/gateway/files/accounts"
CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
)  # fmt: skip
# Real vLLM writes its JSON without blanks.
DENSE = (",", ":")
WITH_ACCOUNTS = {
    "__gateway_counts": True,
    "__gateway_log": VARS["__gateway_log_request"] | VARS["__gateway_log_tokens"],
    "__gateway_edge_keys": [entry(KEY, "alice")],
}
AT_END = {"stream_options": {"include_usage": True}}
AS_IT_GOES = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
__all__ = ["start"]  # a fixture


def usage(output: int, *, cached: int | None = None) -> dict[str, Any]:
    told: dict[str, Any] = {"prompt_tokens": 11, "total_tokens": 11 + output, "completion_tokens": output}
    return told | ({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}})


def openai_events(body: dict[str, Any], answers: int = 3) -> list[dict[str, Any]]:
    """As vLLM streams an answer with a text that looks like its own end."""
    options = body.get("stream_options") or {}
    head = {"id": "x", "object": "chat.completion.chunk"}
    events = []
    for number in range(1, answers + 1):
        choice = {"index": 0, "delta": {"content": '},"usage":{"a":1}, "choices":[]\n\n'}, "finish_reason": None}
        more = {"usage": usage(number)} if options.get("continuous_usage_stats") else {}
        events.append({**head, "choices": [choice], **more})
    if options.get("include_usage"):
        events.append({**head, "choices": [], "usage": usage(answers, cached=4)})
    return events


def anthropic_events(answers: int = 3) -> list[dict[str, Any]]:
    read = {"input_tokens": 2, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 5}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word "}}
    return [
        {"type": "message_start", "message": {"role": "assistant", "usage": {**read, "output_tokens": 0}}},
        *[delta] * answers,
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {**read, "output_tokens": 5}},
        {"type": "message_stop"},
    ]


def text_of(path: str, events: list[dict[str, Any]]) -> bytes:
    """A stream, as its interface writes it."""
    if path == MESSAGES:
        return b"".join(
            f"event: {event['type']}\ndata: {json.dumps(event, separators=DENSE)}\n\n".encode() for event in events
        )
    lines = [f"data: {json.dumps(event, separators=DENSE)}\n\n".encode() for event in events]
    return b"".join([*lines, b"data: [DONE]\n\n"])


class Engine(QuietServer):
    """Answers with figures, and remembers what it was asked. A stream comes in pieces of some bytes."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.piece = 1 << 20
        self.answers = 3
        self.stops_after = 0  # bytes; then it waits for the client to leave
        super().__init__(EngineHandler)


class EngineHandler(QuietHandler):
    server: Engine

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        raw = self.body()
        self.server.asked.append(raw)
        try:
            body = json.loads(raw)
        except ValueError:
            self.send_response(400)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if body.get("stream"):
            events = anthropic_events() if self.path == MESSAGES else openai_events(body, self.server.answers)
            self.stream(text_of(self.path, events))
            return
        told = {"input_tokens": 11, "output_tokens": 5} if self.path in (MESSAGES, RESPONSES) else usage(5, cached=4)
        answer = json.dumps({"id": "x", "text": "a" * 40000, "usage": told, "kv_transfer_params": None}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def stream(self, text: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.server.stops_after:
            part = text[: self.server.stops_after]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.connection.settimeout(20)
            self.connection.recv(1)
            return
        for at in range(0, len(text), self.server.piece):
            part = text[at : at + self.server.piece]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
            if self.server.piece < 100:
                time.sleep(0.0005)
        self.wfile.write(b"0\r\n\r\n")


class Counted:
    """A node's edge with accounts, and the engine behind it."""

    def __init__(self, edge: Edge, engine: Engine) -> None:
        self.edge, self.tokens = edge, engine

    def send(
        self, path: str, body: dict[str, Any] | bytes, *, chunk: int = 0, **headers: str
    ) -> http.client.HTTPResponse:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.edge.connect()
        parts = iter([data[at : at + chunk] for at in range(0, len(data), chunk)]) if chunk else data
        sent = {"x-api-key": KEY, "Content-Type": "application/json", **headers}
        connection.request("POST", path, parts, sent, encode_chunked=bool(chunk))
        return connection.getresponse()

    def ask(self, path: str, body: dict[str, Any] | bytes, **more: Any) -> bytes:
        answer = self.send(path, body, **more)
        assert answer.status == 200, answer.read()
        return answer.read()

    def line(self) -> dict[str, Any]:
        """The log of the request that was just made."""
        text = self.edge.logs.recv(65536).decode()
        found: dict[str, Any] = json.loads(text[text.index("{") :])
        return found

    def tokens_of_line(self) -> tuple[int, int, int]:
        line = self.line()
        return line["input"], line["cached"], line["output"]


@pytest.fixture
def counted(start: Callable[..., Edge]) -> Iterator[Counted]:
    engine = Engine()
    server = {"name": "node0", "address": "127.0.0.1", "port": engine.server_port}
    yield Counted(start(gateway_servers=[server], **WITH_ACCOUNTS), engine)
    engine.shutdown()


MESSAGE = {"messages": [{"role": "user", "content": 'Say "stream": true {["'}], "model": "glm-5.2"}


@pytest.mark.parametrize("asks", [{}, AT_END, AS_IT_GOES], ids=["nothing", "at the end", "as it goes"])
@pytest.mark.parametrize("piece", [1 << 20, 37], ids=["whole", "in pieces"])
def test_a_stream_is_counted_and_its_client_gets_what_it_asked_for(
    counted: Counted, asks: dict[str, Any], piece: int
) -> None:
    counted.tokens.piece = piece
    body = {**MESSAGE, "stream": True, **asks}
    assert counted.ask(CHAT, body) == text_of(CHAT, openai_events(body))
    assert counted.tokens_of_line() == (11, 4, 3)
    assert json.loads(counted.tokens.asked[-1]) == {**body, **AS_IT_GOES}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES, "/v1/chat%2Fcompletions"])
def test_an_answer_that_is_no_stream_is_counted(counted: Counted, path: str) -> None:
    answer = json.loads(counted.ask(path, MESSAGE))
    assert answer["usage"] and len(answer["text"]) == 40000
    cached = 0 if path in (MESSAGES, RESPONSES) else 4
    assert counted.tokens_of_line() == (11, cached, 5)
    assert json.loads(counted.tokens.asked[-1]) == MESSAGE


def test_a_stream_that_is_broken_off_is_counted_as_far_as_it_came(counted: Counted) -> None:
    events = openai_events({**AS_IT_GOES}, 100)
    counted.tokens.answers = 100
    counted.tokens.stops_after = len(text_of(CHAT, events[:40])) - len(b"data: [DONE]\n\n") + 9
    answer = counted.send(CHAT, {**MESSAGE, "stream": True})
    assert answer.read(100)
    answer.close()
    line = counted.line()
    assert (line["input"], line["output"], line["ended"][0], line["estimated"]) == (11, 40, "C", 0)


def test_anthropic_streams_tell_their_tokens_themselves(counted: Counted) -> None:
    body = {**MESSAGE, "stream": True}
    assert counted.ask(MESSAGES, body) == text_of(MESSAGES, anthropic_events())
    assert json.loads(counted.tokens.asked[-1]) == body
    line = counted.line()
    assert (line["input"], line["cached"], line["output"], line["estimated"]) == (11, 4, 5, 0)
    counted.tokens.stops_after = len(text_of(MESSAGES, anthropic_events()[:3]))
    answer = counted.send(MESSAGES, body)
    assert answer.read(100)
    answer.close()
    line = counted.line()
    assert (line["input"], line["cached"], line["output"], line["estimated"]) == (11, 4, 2, 1)


def test_requests_of_every_size_reach_the_engine_as_they_are(counted: Counted) -> None:
    rng = random.Random(5)
    letters = string.printable + "äö\U0001f600"
    # Around HAProxy's buffer, too, which has no room left then.
    sizes = [*range(16384 - 400, 16384 + 100, 40), *range(15360 - 400, 15360 + 60, 40), 1, 3000, 100000, 2000000]
    for number, size in enumerate(sizes):
        text = "".join(rng.choices(letters, k=min(size, 5000))) * (size // 5000 + 1)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": text[:size]}, {"role": "tool", "content": [{"stream": True}]}],
            "metadata": {"stream": True, "text": '}\\"'},
            "stop": ['"stream":true', "\\"],
        }
        if number % 2:
            body["stream"] = True
        if number % 3 == 0:
            body = dict(reversed(body.items()))
        answer = counted.ask(CHAT, body, chunk=rng.choice([0, 0, 777, 20000]))
        assert answer.endswith(b"[DONE]\n\n") if number % 2 else json.loads(answer)["id"] == "x"
        assert json.loads(counted.tokens.asked[-1]) == {**body, **(AS_IT_GOES if number % 2 else {})}, size
        assert counted.tokens_of_line() == (11, 4, 3 if number % 2 else 5)


@pytest.mark.parametrize("body", [b"no JSON", b"{", b"[]", b'{"stream": true', b"\xff\xfe{}", b"  "])
def test_what_is_no_request_reaches_the_engine_too(counted: Counted, body: bytes) -> None:
    answer = counted.send(CHAT, body)
    assert answer.status in (200, 400, 502)
    assert counted.tokens.asked[-1].rstrip(b" ") == body.rstrip(b" ")


def test_a_line_of_the_log_is_json_whatever_a_client_sends(counted: Counted) -> None:
    session = 's"\\\u00e9{' + "x" * 200
    answer = counted.send('/v1/"quoted\\path', b"{}", **{"x-session-id": session})  # type: ignore[arg-type]
    assert answer.status == 200
    line = counted.line()
    assert line["path"] == "/v1/?quoted?path" and line["session"].startswith("s???{xxx") and len(line["session"]) == 80
    assert line["key"] == "alice" and line["status"] == 200 and line["node"] == "node0"


def test_a_gateway_leaves_the_counting_to_the_nodes() -> None:
    text = template("haproxy.cfg.j2", gateway_edges=True)
    assert "lua" not in text and "txn.input" not in text


@pytest.mark.parametrize("name", ["glm-accounts.service"])
def test_the_unit_may_do_no_more_than_it_must(tmp_path: Path, name: str) -> None:
    unit = tmp_path / name
    unit.write_text(template(f"{name}.j2"))
    assert exposure(unit) <= MOST


# --- what becomes of the log ---

JOURNALCTL = r"""#!/usr/bin/env python3
import json, sys
from pathlib import Path
options = dict(o[2:].partition("=")[::2] for o in sys.argv[1:])
assert options["identifier"] == "haproxy" and options["output"] == "json"
lines = [json.loads(line) for line in Path(sys.argv[0]).with_name("journal").read_text().splitlines()]
if "after-cursor" in options:
    places = [line["__CURSOR"] for line in lines]
    if options["after-cursor"] not in places:
        print("Failed to seek to cursor: Invalid argument", file=sys.stderr)
        sys.exit(1)
    lines = lines[places.index(options["after-cursor"]) + 1 :]
elif "since" in options:
    lines = [line for line in lines if int(line["__REALTIME_TIMESTAMP"]) / 1e6 >= float(options["since"][1:])]
for line in lines:
    print(json.dumps(line))
"""
NOON = 1_800_000_000  # 2027-01-15 08:00 UTC
DAY = 86400


class Node:
    """A journal, and the program that reads it."""

    def __init__(self, directory: Path) -> None:
        self.bin, self.accounts = directory / "bin", directory / "accounts"
        self.bin.mkdir()
        (self.bin / "journalctl").write_text(JOURNALCTL)
        (self.bin / "journalctl").chmod(0o755)
        self.journal = self.bin / "journal"
        self.journal.write_text("")
        self.count = 0

    def logs(self, at: float = NOON, **request: Any) -> None:
        self.says(json.dumps({**self.request(), **request}), at)

    def request(self) -> dict[str, Any]:
        fields = VARS["__gateway_log_request"] | VARS["__gateway_log_tokens"]
        asked = {"key": "alice", "node": "engine", "path": CHAT, "status": 200, "ended": "----", "session": "-"}
        return dict.fromkeys(fields, 0) | asked | {"input": 100, "cached": 60, "output": 10}

    def says(self, message: Any, at: float = NOON) -> None:
        self.count += 1
        line = {
            "MESSAGE": message,
            "__CURSOR": f"c{self.count}",
            "__REALTIME_TIMESTAMP": str(int(at * 1e6) + self.count),
        }
        with self.journal.open("a") as journal:
            journal.write(json.dumps(line) + "\n")

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, PROGRAM, self.accounts, *arguments],
            env={
                **os.environ,
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT / "plugins/module_utils"),
            },
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    def day(self, name: str = "2027-01-15") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.accounts / f"{name}.json").read_text())
        return found

    def sums(self, key: str = "alice", name: str = "2027-01-15") -> dict[str, int]:
        return {what: number for what, number in self.day(name)["keys"][key].items() if number}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_each_request_is_counted_once(node: Node) -> None:
    node.says("Loading success.")
    node.logs()
    node.says('{"at":1, damaged')
    node.says([1, 2, 3])  # journald's way to tell of bytes that are no text
    node.logs(key="bob", path=MESSAGES)
    node.run()
    node.run()
    node.logs(output=5)
    node.run()
    assert node.sums() == {"requests": 2, "input": 200, "cached": 120, "output": 15}
    assert node.sums("bob") == {"requests": 1, "input": 100, "cached": 60, "output": 10}
    assert stat.S_IMODE((node.accounts / "2027-01-15.json").stat().st_mode) == 0o644


def test_what_counts_as_what(node: Node) -> None:
    nothing = {"input": 0, "cached": 0, "output": 0}
    node.logs(status=429, node="<NOSRV>", **nothing)  # refused
    node.logs(status=503, node="<NOSRV>", **nothing)
    node.logs(status=403, node="<NOSRV>", **nothing)  # nobody's
    node.logs(status=200, path="/health", **nothing)
    node.logs(status=502, **nothing)  # failed
    node.logs(status=-1, **nothing)
    node.logs(status=-1, ended="CH--", **nothing)  # broken off before the answer
    node.logs(ended="CD--", estimated=1)
    node.logs(path="/v1/models", **nothing)
    node.run()
    assert node.sums() == {
        "requests": 5, "refused": 2, "failed": 2, "broken_off": 2, "unmeasured": 1,
        "input": 100, "cached": 60, "output": 10, "estimated": 10,
    }  # fmt: skip


def test_a_day_ends_by_utc_and_totals_go_on(node: Node) -> None:
    node.logs()
    node.run()
    node.logs(at=NOON + 16 * 3600 - 1)
    node.logs(at=NOON + 16 * 3600)
    node.logs(at=NOON + 2 * DAY)
    node.run()
    assert node.sums()["requests"] == 2
    assert node.sums(name="2027-01-16")["requests"] == node.sums(name="2027-01-17")["requests"] == 1
    text = (node.accounts / "metrics.prom").read_text()
    assert (
        'glm_account_requests_total{key="alice"} 4\n' in text
        and 'glm_account_input_tokens_total{key="alice"} 400' in text
    )
    assert "# TYPE glm_account_lost_lines_total counter" in text


def test_a_damaged_file_is_counted_anew_from_the_journal(node: Node) -> None:
    node.logs()
    node.run()
    node.logs(at=NOON + DAY)
    node.run()
    (node.accounts / "2027-01-16.json").write_text('{"day": "20')
    node.logs(at=NOON + DAY)
    node.run()
    assert node.sums()["requests"] == 1 and node.sums(name="2027-01-16")["requests"] == 2


def test_a_journal_that_forgot_the_place_goes_on_by_time(node: Node) -> None:
    node.logs()
    node.run()
    node.journal.write_text("")
    node.logs(at=NOON + 60)
    node.run()
    assert node.sums()["requests"] == 2


def test_rows_of_some_days_are_printed(node: Node) -> None:
    now = time.time()
    node.logs(at=now - 3 * DAY)
    node.logs(at=now)
    found = json.loads(node.run("--days", "2"))
    (row,) = found["rows"]
    assert row["key"] == "alice" and row["requests"] == 1 and found["lost_lines"] == 0
    assert len(json.loads(node.run("--days", "5"))["rows"]) == 2
