"""verify_endpoint against an endpoint that is right, and against ones that are each wrong in one way."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import endpoint
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.endpoint import Wrong
from ansible_collections.glm.fleet.plugins.modules import verify_endpoint
from certificates import pem

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS: dict[str, Any] = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())
KEY = "sk-glm-" + "k" * 43
MODEL = "glm-5.2-fp8"
DIGEST = "sha256:" + "ab" * 32
METRICS = ["vllm:num_requests_running", "vllm:generation_tokens_total"]
METRICS_TEXT = """# HELP vllm:num_requests_running Requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="glm-5.2-fp8"} 0.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a b } c"} 1024.0
vllm:prefix_cache_hits_total{engine="0"} 7.0
"""
ALL = [
    "health",
    "streaming",
    "models_list",
    "exact_reply",
    "sum",
    "find_fact",
    "second_turn",
    "long_answer",
    "thinking",
    "effort",
    "tool_call",
    "tool_call_stream",
    "messages",
    "messages_stream",
    "messages_tool_stream",
    "count_tokens",
    "missing_key_refused",
    "wrong_key_refused",
    "unlisted_path_refused",
    "metrics_inside",
    "metrics_outside",
    "image_digest",
    "unit_state",
    "gpus_in_container",
]
CONTENT = {"exact_reply", "sum", "find_fact", "second_turn", "long_answer", "streaming", "thinking", "tool_call"}


CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
TOOLS = " with tools"  # behind the path, where a stream's events are changed


def words_of(body: dict[str, Any]) -> int:
    """This engine's tokens."""
    return sum(len(message["content"].split()) for message in body["messages"])


class Endpoint(ThreadingHTTPServer):
    """Edge and engine in one: what needs the edge is told by `guarded`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, guarded: bool, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.guarded = guarded
        self.auth = True
        self.paths_open: set[str] = set()
        self.health = 200
        self.not_ready = 0
        self.models = [MODEL]
        self.metrics = METRICS_TEXT
        self.stream_pause = 0.002
        self.count: Callable[[int], int] = lambda words: words + 4
        self.status: dict[str, int] = {}
        self.change_chat: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda request, answer: answer
        self.change_events: Callable[[str, list[Any]], list[Any]] = lambda path, events: events
        self.refuse: Callable[[dict[str, Any]], bool] = lambda body: False
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.window: int | None = None
        self.pause, self.running, self.most = 0.0, 0, 0  # seconds of an answer; requests at once, now and at most
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def answer(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:  # noqa: PLR0911
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        server.bodies.append((self.path, body))
        if self.path in server.status:
            return self.answer(server.status[self.path], {"error": {"message": "told to"}})
        if self.path == "/health":
            server.not_ready -= 1
            return self.answer(503 if server.not_ready >= 0 else server.health, {})
        if not self.path.startswith("/v1/") or "lora" in self.path or self.path == "/v1/loads":
            if server.guarded and self.path not in server.paths_open:
                return self.answer(403, {"error": {}})
            return self.answer(200, server.metrics)
        sent = [self.headers.get("x-api-key"), (self.headers.get("Authorization") or "").removeprefix("Bearer ")]
        if server.guarded and server.auth and KEY not in sent:
            return self.answer(401, {"error": {}})
        if self.path == "/v1/models":
            window = {"max_model_len": server.window} if server.window else {}
            return self.answer(200, {"data": [{"id": name, **window} for name in server.models]})
        if not body:
            return self.answer(422, {"error": {"message": "no body"}})
        if server.refuse(body):
            return self.answer(400, {"error": {"message": "told to"}})
        if self.path == "/v1/messages/count_tokens":
            return self.answer(200, {"input_tokens": server.count(words_of(body))})
        if server.window and words_of(body) + 4 + body["max_tokens"] > server.window:
            return self.answer(400, {"error": {"message": f"more than {server.window} tokens"}})
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
        time.sleep(server.pause)
        try:
            return self.chat(body) if self.path == "/v1/chat/completions" else self.messages(body)
        finally:
            with server.lock:
                server.running -= 1

    do_POST = do_GET

    def reply(self, body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"]
        if found := re.search(r"blue door is (\d{4})", asked):
            return found[1]
        return next(str(q["expect"]) for q in QUESTIONS.values() if "expect" in q and asked.endswith(q["prompt"]))

    def calls(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = body["messages"][-1]["content"]
        wanted = next(q["expect_calls"] for q in QUESTIONS.values() if q["prompt"] == asked)
        return [
            {"id": f"call-{n}", "name": call["name"], "arguments": json.dumps(call["arguments"])}
            for n, call in enumerate(wanted)
        ]

    def chat(self, body: dict[str, Any]) -> None:
        message: dict[str, Any] = {"role": "assistant", "reasoning_content": None, "tool_calls": []}
        finish = "stop"
        if "tools" in body:
            calls = [
                {"id": call["id"], "type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
                for call in self.calls(body)
            ]
            message.update(content=None, tool_calls=calls)
            finish = "tool_calls"
        else:
            message["content"] = f"\n{self.reply(body)}"
            if body.get("chat_template_kwargs", {}).get("enable_thinking", True):
                message["reasoning"] = "The user wants ok."
        output = len((message["content"] or "").split())
        answer = self.server.change_chat(
            body,
            {
                "model": MODEL,
                "choices": [{"message": message, "finish_reason": finish}],
                "usage": {
                    "prompt_tokens": words_of(body) + 4,
                    "completion_tokens": output,
                    "prompt_tokens_details": None,
                },
            },
        )
        if not body.get("stream"):
            return self.answer(200, answer)
        events: list[Any] = [{"model": MODEL, "choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        for index, call in enumerate(message["tool_calls"]):
            function = call["function"]
            head = {**call, "index": index, "function": {"name": function["name"], "arguments": ""}}
            events.append({"choices": [{"delta": {"tool_calls": [head]}}]})
            events += [
                {"choices": [{"delta": {"tool_calls": [{"index": index, "function": {"arguments": part}}]}}]}
                for part in re.findall(".{1,6}", function["arguments"])
            ]
        words = [word for word in re.split(r"(?= )", (message["content"] or "").strip()) if word]
        events += [{"choices": [{"delta": {"content": word}}]} for word in words]
        events += [
            {"choices": [{"delta": {}, "finish_reason": finish}]},
            {"choices": [], "usage": {"completion_tokens": len(words)}},
            "[DONE]",
        ]
        return self.stream(events, tools="tools" in body)

    def messages(self, body: dict[str, Any]) -> None:
        if "tools" in body:
            return self.stream(self.tool_events(body), tools=True)
        text = self.reply(body)
        if not body.get("stream"):
            answer = {
                "type": "message",
                "model": MODEL,
                "stop_reason": "end_turn",
                "usage": {"output_tokens": 2},
                "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": text}],
            }
            return self.answer(200, self.server.change_chat(body, answer))
        return self.stream(
            [
                {"type": "message_start", "message": {}},
                {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
                {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "Hm."}},
                {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
                {"type": "message_stop"},
            ]
        )

    def tool_events(self, body: dict[str, Any]) -> list[Any]:
        """A call without arguments has no delta, as the API has it."""
        events: list[Any] = [
            {"type": "message_start", "message": {}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
            {"type": "content_block_stop", "index": 0},
        ]
        for index, call in enumerate(self.calls(body), 1):
            block = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}
            events.append({"type": "content_block_start", "index": index, "content_block": block})
            parts = re.findall(".{1,6}", call["arguments"]) if call["arguments"] != "{}" else []
            for part in parts:
                delta = {"type": "input_json_delta", "partial_json": part}
                events.append({"type": "content_block_delta", "index": index, "delta": delta})
            events.append({"type": "content_block_stop", "index": index})
        return [
            *events,
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
            {"type": "message_stop"},
        ]

    def stream(self, events: list[Any], *, tools: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        lines = []
        for event in self.server.change_events(self.path + TOOLS * tools, events):
            if isinstance(event, dict) and "type" in event:
                lines.append(f"event: {event['type']}\n".encode())
            lines.append(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
        for line in lines if self.server.stream_pause else [b"".join(lines)]:
            self.wfile.write(line)
            time.sleep(self.server.stream_pause)


class Node:
    """Edge, engine and the node's programs, all right unless a test says otherwise."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.edge, self.engine = Endpoint(guarded=True), Endpoint(guarded=False)
        self.directory = directory
        self.params: dict[str, Any] = {
            "url": f"http://127.0.0.1:{self.edge.server_port}",
            "engine_url": f"http://127.0.0.1:{self.engine.server_port}",
            "models": [MODEL],
            "listed_models": [MODEL],
            "auth": "keys",
            "api_key": KEY,
            "questions": deepcopy(QUESTIONS),
            "metrics": list(METRICS),
            "cached_tokens_metric": "vllm:prefix_cache_hits_total",
            "refused_paths": yaml.safe_load(verify_endpoint.DOCUMENTATION)["options"]["refused_paths"]["default"],
            "unit": "glm-engine.service",
            "container": "glm-engine",
            "image_digest": DIGEST,
            "gpu_count": 8,
            "headers": {},
            "timeout": 10,
            "ready_timeout": 1,
        }
        self.say("inspect", "sha256:1d")
        self.say("image", json.dumps([f"vllm/vllm-openai@{DIGEST}"]))
        self.say("exec", "".join(f"GPU {n}: NVIDIA B200 (UUID: GPU-{n})\n" for n in range(8)))
        self.say("show", "ActiveState=active\nSubState=running\nNRestarts=0\nResult=success")
        for name in ("docker", "systemctl"):
            program = directory / name
            program.write_text(f"""#!/bin/sh
cat "{directory}/$1.out"
test ! -e "{directory}/$1.err" || {{ cat "{directory}/$1.err" >&2; exit 1; }}
""")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(directory), prepend=":")
        monkeypatch.setattr(verify_endpoint, "outward_address", lambda: "127.0.0.2")

    def say(self, subcommand: str, output: str) -> None:
        (self.directory / f"{subcommand}.out").write_text(output)

    def fail(self, subcommand: str, error: str) -> None:
        (self.directory / f"{subcommand}.err").write_text(error)

    def checks(self) -> dict[str, dict[str, Any]]:
        return {check["name"]: check for check in verify_endpoint.Verification(self.params).run()}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    made = Node(tmp_path, monkeypatch)
    yield made
    made.edge.stop()
    made.engine.stop()


def test_all_is_well(node: Node) -> None:
    checks = node.checks()
    assert list(checks) == ALL
    assert [check for check in checks.values() if not check["ok"]] == []
    for check in checks.values():
        assert set(check) == {"name", "ok", "detail", "seconds"}
        assert check["detail"] and "\n" not in check["detail"] and KEY not in check["detail"]
    assert checks["sum"]["detail"] == "answered '42'"
    assert "`reasoning`" in checks["thinking"]["detail"]
    assert checks["tool_call"]["detail"] == 'get_weather({"city": "Paris"})'
    assert "0 of them from the prefix cache" in checks["second_turn"]["detail"]
    assert checks["gpus_in_container"]["detail"] == "8 GPUs (NVIDIA B200)"
    assert "10 chunks" in checks["streaming"]["detail"]
    assert re.fullmatch(
        r"3 facts found at once, each in at least 8[0-4]\d\d prompt tokens", checks["find_fact"]["detail"]
    )
    assert re.fullmatch(r"every item right, from token 40\d\d to 41\d\d", checks["long_answer"]["detail"])
    assert checks["effort"]["detail"] == ", ".join(
        f"{effort} on {path}: '42'" for effort in ("low", "high") for path in ("/v1/chat/completions", "/v1/messages")
    )
    streamed = (
        'get_weather({"city": "Paris"}); get_time({}); get_weather({"city": "Oslo"}), get_weather({"city": "Rome"})'
    )
    assert checks["tool_call_stream"]["detail"] == checks["messages_tool_stream"]["detail"] == streamed


def test_an_open_edge_has_no_keys_to_refuse(node: Node) -> None:
    node.edge.auth = False
    node.params.update(auth="none", api_key="")
    checks = node.checks()
    assert list(checks) == [name for name in ALL if not name.endswith("_key_refused")]
    assert all(check["ok"] for check in checks.values())


def test_every_name_answers(node: Node) -> None:
    node.params["models"] = [MODEL, "my-glm", "glm"]
    assert node.checks()["other_names"]["detail"] == "answered: my-glm, glm"
    node.edge.change_chat = lambda body, answer: {**answer, "choices": []} if body["model"] == "glm" else answer
    assert not node.checks()["other_names"]["ok"]


def test_every_listed_name_is_looked_for(node: Node) -> None:
    node.params["models"] = node.params["listed_models"] = [MODEL, "my-glm"]
    assert node.checks()["models_list"]["detail"] == "served are glm-5.2-fp8, wanted my-glm"


def test_requests_are_as_the_questions_say(node: Node) -> None:
    node.checks()
    bodies = [body for path, body in node.edge.bodies if path == "/v1/chat/completions" and body]
    assert all(body["temperature"] == 0 and body["max_tokens"] > 0 and body["model"] == MODEL for body in bodies)
    thinking = {body["messages"][-1]["content"] for body in bodies if "chat_template_kwargs" not in body}
    assert thinking == {QUESTIONS["thinking"]["prompt"], QUESTIONS["effort"]["prompt"]}
    assert sorted(body["reasoning_effort"] for body in bodies if "reasoning_effort" in body) == ["high", "low"]
    asked = [body for path, body in node.edge.bodies if path == "/v1/messages" and "output_config" in body]
    assert sorted(body["output_config"]["effort"] for body in asked) == ["high", "low"]
    prompts = [body["messages"][0]["content"] for body in bodies if len(body["messages"]) == 1]
    facts = {found[1]: found.start() / len(p) for p in prompts if (found := re.search(r"is (\d{4})\.", p))}
    assert sorted(facts.values()) == pytest.approx(QUESTIONS["find_fact"]["depths"], abs=0.02)


def test_thinking_that_fills_all_that_is_given_is_no_wrong_answer(node: Node) -> None:
    """As GLM-5.2 does at an effort that its template does not know."""

    def think(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if request.get("reasoning_effort") == "low":
            answer["choices"][0]["message"]["content"] = None
            answer["choices"][0]["finish_reason"] = "length"
        return answer

    node.edge.change_chat = think
    checks = node.checks()
    assert checks["effort"]["ok"]
    assert checks["effort"]["detail"].startswith("low on /v1/chat/completions: still thinking after 2048 tokens, ")


def test_few_are_asked_at_once_and_the_facts_among_them(node: Node) -> None:
    """A node that takes one request at a time is slow for each of those that wait."""
    node.edge.pause = 0.05
    assert all(check["ok"] for check in node.checks().values())
    assert 3 <= node.edge.most <= 8


@pytest.mark.parametrize(
    ("window", "least", "reached"),
    [(8192, 7798, "reached from 2048 on"), (5000, 4699, "reached from"), (2048, 1833, "not reached before 2048 on")],
)
def test_a_small_window_is_asked_for_what_it_holds(node: Node, window: int, least: int, reached: str) -> None:
    node.edge.window = window
    checks = node.checks()
    assert [check for check in checks.values() if not check["ok"]] == []
    told = checks["find_fact"]["detail"]
    found = re.fullmatch(
        rf"3 facts found at once, each in at least (\d+) prompt tokens: the window of {window} .*", told
    )
    assert found and least <= int(found[1]) <= window, told
    assert f"holds no 8000; sparse attention is {reached}" in told
    holds = window >= 4096 + 512
    assert ("long_answer" in checks) == holds
    asked = f"served: {MODEL}; window of {window} tokens"
    assert checks["models_list"]["detail"] == asked + (
        "" if holds else ", too small for long_answer, which was not asked"
    )


def test_a_large_window_changes_nothing(node: Node) -> None:
    node.edge.window = 202752
    checks = node.checks()
    assert list(checks) == ALL and all(check["ok"] for check in checks.values())
    assert checks["find_fact"]["detail"].endswith("prompt tokens")
    assert checks["models_list"]["detail"] == f"served: {MODEL}; window of 202752 tokens"


def test_a_wrong_answer_in_a_small_window_is_one(node: Node) -> None:
    node.edge.window = 8192
    changed(CONTENT_AT, "0000", asks("find_fact"))(node)
    assert {name for name, check in node.checks().items() if not check["ok"]} == {"find_fact"}


def test_the_documented_defaults_are_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def module(**arguments: Any) -> None:
        given.update(arguments["argument_spec"])
        raise SystemExit

    monkeypatch.setattr(verify_endpoint, "AnsibleModule", module)
    with pytest.raises(SystemExit):
        verify_endpoint.main()
    options = yaml.safe_load(verify_endpoint.DOCUMENTATION)["options"]
    assert {name: option.get("default") for name, option in options.items()} == {
        name: option.get("default") for name, option in given.items()
    }


def changed(
    path: tuple[Any, ...], value: Any, when: Callable[[dict[str, Any]], bool] = lambda request: True
) -> Callable[[Node], None]:
    """A mutation of the answer to the requests for which `when` holds."""

    def mutate(node: Node) -> None:
        def change(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
            if when(request):
                place: Any = answer
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = value
            return answer

        node.edge.change_chat = change

    return mutate


def asks(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda request: QUESTIONS[name]["prompt"] in request["messages"][-1]["content"]


def events(path: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Node], None]:
    def mutate(node: Node) -> None:
        node.edge.change_events = lambda at, sent: change(sent) if at == path else sent

    return mutate


def attribute(name: str, value: Any, server: str = "edge") -> Callable[[Node], None]:
    return lambda node: setattr(getattr(node, server), name, value)


def says(subcommand: str, output: str) -> Callable[[Node], None]:
    return lambda node: node.say(subcommand, output)


def fails(subcommand: str, error: str) -> Callable[[Node], None]:
    return lambda node: node.fail(subcommand, error)


def chat(name: str) -> Callable[[dict[str, Any]], bool]:
    """That check's own request alone: others ask the same."""
    return lambda request: asks(name)(request) and request["max_tokens"] == 64 and len(request["messages"]) == 1


CONTENT_AT = ("choices", 0, "message", "content")
TOOL_AT = ("choices", 0, "message", "tool_calls")
CALL: dict[str, Any] = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def unstreamed(request: dict[str, Any]) -> bool:
    return asks("tool_call")(request) and not request.get("stream")


def long_prompts(request: dict[str, Any]) -> bool:
    return words_of(request) > 2048


def in_calls(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[Any]], list[Any]]:
    """A change of each part of a streamed call of the chat API."""

    def of(sent: list[Any]) -> list[Any]:
        for event in sent:
            for choice in event.get("choices", []) if isinstance(event, dict) else []:
                for part in choice["delta"].get("tool_calls", []):
                    change(part)
        return sent

    return of


def without_calls(sent: list[Any]) -> list[Any]:
    return [
        event
        for event in sent
        if not (isinstance(event, dict) and (event.get("choices") or [{"delta": {}}])[0]["delta"].get("tool_calls"))
    ]


MUTATIONS: dict[str, tuple[Callable[[Node], None], set[str], str]] = {
    "not healthy": (attribute("health", 503), {"health"}, "HTTP 503"),
    "another model listed": (attribute("models", ["other"]), {"models_list"}, "served are other, wanted glm-5.2-fp8"),
    "no model listed": (attribute("models", []), {"models_list"}, "no models"),
    "more than asked": (
        changed(CONTENT_AT, "ok!", chat("exact_reply")),
        {"exact_reply"},
        "answered 'ok!', wanted 'ok'",
    ),
    "wrong sum": (changed(CONTENT_AT, "41", chat("sum")), {"sum"}, "answered '41', wanted '42'"),
    "no content": (changed(CONTENT_AT, None, chat("sum")), {"sum"}, "answered '', wanted '42'"),
    "garbage with HTTP 200": (changed(CONTENT_AT, "!!!!!!!! \u2028 !!!", chat("sum")), {"sum"}, "wanted '42'"),
    "wrong code": (changed(CONTENT_AT, "0000", asks("find_fact")), {"find_fact"}, "answered '0000', wanted '"),
    "wrong code at one depth": (
        changed(CONTENT_AT, "0000", lambda request: request["messages"][0]["content"].find("blue door is") > 20000),
        {"find_fact"},
        "tokens: answered '0000'",
    ),
    "long prompts are garbage": (
        changed(CONTENT_AT, "lkj 0 ~~", long_prompts),
        {"find_fact", "second_turn", "long_answer"},
        "tokens: answered 'lkj 0 ~~'",
    ),
    "one item wrong past 4,096": (
        changed(CONTENT_AT, QUESTIONS["long_answer"]["expect"].replace("97", "7"), asks("long_answer")),
        {"long_answer"},
        "answered '1 2 3",
    ),
    "a prompt that is counted short": (
        changed(("usage", "prompt_tokens"), 7999, asks("find_fact")),
        {"find_fact"},
        "the prompt has 7999 tokens, wanted at least 8000",
    ),
    "an answer that begins past 4,096": (
        changed(("usage", "prompt_tokens"), 4097, asks("long_answer")),
        {"long_answer"},
        "from token 4097 to 4196, not over 4096",
    ),
    "low effort refused": (
        lambda node: setattr(node.edge, "refuse", lambda body: body.get("reasoning_effort") == "low"),
        {"effort"},
        "low on /v1/chat/completions: HTTP 400",
    ),
    "low effort on messages answered wrong": (
        changed(("content",), [{"type": "text", "text": "41"}], lambda request: "output_config" in request),
        {"effort"},
        "low on /v1/messages: answered '41'",
    ),
    "streamed calls dropped": (events(CHAT + TOOLS, without_calls), {"tool_call_stream"}, "0 tool calls"),
    "streamed arguments cut": (
        events(
            CHAT + TOOLS, in_calls(lambda part: part["function"].update(arguments=part["function"]["arguments"][:5]))
        ),
        {"tool_call_stream"},
        "1 tool calls, get_weather({",
    ),
    "streamed call without a name": (
        events(CHAT + TOOLS, in_calls(lambda part: part["function"].pop("name", None))),
        {"tool_call_stream"},
        "None({",
    ),
    "streamed calls in one": (
        events(CHAT + TOOLS, in_calls(lambda part: part.update(index=0))),
        {"tool_call_stream"},
        '{"city": "Oslo"}{"city": "Rome"}',
    ),
    "streamed calls with one id": (
        events(CHAT + TOOLS, in_calls(lambda part: part.update(id="call"))),
        {"tool_call_stream"},
        "with the ids 'call', 'call'",
    ),
    "streamed calls that end as text": (
        events(
            CHAT + TOOLS, lambda sent: [*sent[:-3], {"choices": [{"delta": {}, "finish_reason": "stop"}]}, *sent[-2:]]
        ),
        {"tool_call_stream"},
        "ends with 'stop', wanted 'tool_calls'",
    ),
    "message calls dropped": (
        events(MESSAGES + TOOLS, lambda sent: [event for event in sent if not event.get("index")]),
        {"messages_tool_stream"},
        "0 tool calls",
    ),
    "message arguments cut": (
        events(
            MESSAGES + TOOLS, lambda sent: [e for e in sent if "Pa" not in e.get("delta", {}).get("partial_json", "")]
        ),
        {"messages_tool_stream"},
        "get_weather({",
    ),
    "message calls that end as text": (
        events(
            MESSAGES + TOOLS,
            lambda sent: [*sent[:-2], {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, sent[-1]],
        ),
        {"messages_tool_stream"},
        "ends with 'end_turn', wanted 'tool_use'",
    ),
    "message calls without an id": (
        events(MESSAGES + TOOLS, lambda sent: [e.get("content_block", {}).update(id="") or e for e in sent]),
        {"messages_tool_stream"},
        "with the ids ''",
    ),
    "no usage on the second turn": (
        changed(("usage",), {}, lambda request: len(request["messages"]) > 1),
        {"second_turn"},
        "unexpected shape",
    ),
    "another model answers": (changed(("model",), "other"), CONTENT - {"streaming"} | {"messages"}, "model 'other'"),
    "no choices": (changed(("choices",), [], chat("sum")), {"sum"}, "unexpected shape"),
    "stream in one chunk": (
        events(
            CHAT, lambda sent: [{"choices": [{"delta": {"content": QUESTIONS["streaming"]["expect"]}}]}, *sent[-2:]]
        ),
        {"streaming"},
        "1 chunk",
    ),
    "stream of another model": (
        events(CHAT, lambda sent: [{**sent[0], "model": "other"}, *sent[1:]]),
        {"streaming"},
        "model 'other'",
    ),
    "stream held back": (attribute("stream_pause", 0), {"streaming"}, "all at once"),
    "stream without usage": (events(CHAT, lambda sent: [*sent[:-2], sent[-1]]), {"streaming"}, "no usage"),
    "stream cut": (events(CHAT, lambda sent: sent[:-1]), {"streaming"}, "without [DONE]"),
    "stream with a wrong word": (events(CHAT, lambda sent: [*sent[:3], *sent[4:]]), {"streaming"}, "wanted '1 2 3"),
    "stream broken": (events(CHAT, lambda sent: [*sent[:3], "{oops"]), {"streaming"}, "not JSON"),
    "stream empty": (events(CHAT, lambda sent: []), {"streaming"}, "answered ''"),
    "thinking within the answer": (
        changed(CONTENT_AT, "<think>Hm</think>ok", asks("thinking")),
        {"thinking"},
        "within the answer",
    ),
    "no thinking": (
        changed(("choices", 0, "message", "reasoning"), "", asks("thinking")),
        {"thinking"},
        "no reasoning",
    ),
    "wrong answer after thinking": (changed(CONTENT_AT, "fine", asks("thinking")), {"thinking"}, "'fine'"),
    "no tool call": (changed(TOOL_AT, [], unstreamed), {"tool_call"}, "0 tool calls"),
    "another tool": (
        changed(TOOL_AT, [{**CALL, "function": {**CALL["function"], "name": "get_time"}}], unstreamed),
        {"tool_call"},
        "get_time(",
    ),
    "other arguments": (
        changed(TOOL_AT, [{**CALL, "function": {**CALL["function"], "arguments": '{"city": "Rome"}'}}], unstreamed),
        {"tool_call"},
        "Rome",
    ),
    "broken arguments": (
        changed(TOOL_AT, [{**CALL, "function": {**CALL["function"], "arguments": '{"city"'}}], unstreamed),
        {"tool_call"},
        "wanted get_weather",
    ),
    "tool call that ends as text": (
        changed(("choices", 0, "finish_reason"), "stop", unstreamed),
        {"tool_call"},
        "ends with 'stop'",
    ),
    "wrong message": (changed(("content",), [{"type": "text", "text": "no"}]), {"messages", "effort"}, "answered 'no'"),
    "message stream cut": (events(MESSAGES, lambda sent: sent[:-1]), {"messages_stream"}, "to message_delta"),
    "message stream wrong": (events(MESSAGES, lambda sent: sent[:3] + sent[4:]), {"messages_stream"}, "answered ''"),
    "no message API": (
        attribute("status", {MESSAGES: 404, f"{MESSAGES}/count_tokens": 404}),
        {
            "messages",
            "messages_stream",
            "messages_tool_stream",
            "count_tokens",
            "wrong_key_refused",
            "effort",
            "find_fact",
            "second_turn",
            "long_answer",
        },
        "HTTP 404",
    ),
    "no tokens counted": (
        attribute("count", lambda words: 0),
        {"count_tokens", "find_fact", "second_turn", "long_answer"},
        "input_tokens is 0",
    ),
    "keys not asked for": (attribute("auth", False), {"missing_key_refused", "wrong_key_refused"}, "must be refused"),
    "inference without a key": (
        attribute("paths_open", {"/invocations"}),
        {"unlisted_path_refused"},
        "/invocations HTTP 200",
    ),
    "LoRA adapters may be loaded": (
        attribute("paths_open", {"/v1/load_lora_adapter"}),
        {"unlisted_path_refused"},
        "/v1/load_lora_adapter HTTP 200",
    ),
    "metrics outside": (attribute("paths_open", {"/metrics"}), {"metrics_outside"}, "/metrics HTTP 200"),
    "metrics missing": (attribute("metrics", "# none\n", "engine"), {"metrics_inside"}, "does not report vllm:num"),
    "metrics garbled": (
        attribute("metrics", "a b c\n", "engine"),
        {"metrics_inside", "second_turn"},
        "unexpected shape",
    ),
    "another image": (says("image", '["vllm/vllm-openai@sha256:00"]'), {"image_digest"}, "wanted sha256:abab"),
    "an image without a digest": (says("image", "null"), {"image_digest"}, "runs sha256:1d, wanted"),
    "no container": (fails("inspect", "Error: No such container: glm-engine"), {"image_digest"}, "No such container"),
    "unit failed": (
        says("show", "ActiveState=failed\nSubState=failed\nNRestarts=3\nResult=exit-code"),
        {"unit_state"},
        "failed (failed), 3 restarts, result exit-code",
    ),
    "7 GPUs": (
        says("exec", "".join(f"GPU {n}: NVIDIA B200 (UUID: GPU-{n})\n" for n in range(7))),
        {"gpus_in_container"},
        "7 GPUs (NVIDIA B200), wanted 8",
    ),
    "nvidia-smi fails": (fails("exec", "Failed to initialize NVML"), {"gpus_in_container"}, "NVML"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_fault_fails_its_check_and_no_other(node: Node, mutation: str) -> None:
    mutate, failing, said = MUTATIONS[mutation]
    mutate(node)
    checks = node.checks()
    assert {name for name, check in checks.items() if not check["ok"]} == failing, checks
    assert any(said in checks[name]["detail"] for name in failing), [checks[name]["detail"] for name in failing]


def test_every_check_can_fail() -> None:
    assert set().union(*(failing for _, failing, _ in MUTATIONS.values())) == set(ALL)


def test_an_engine_open_to_the_network_is_found(node: Node) -> None:
    node.engine.stop()
    node.engine = Endpoint(guarded=False, host="0.0.0.0")
    node.params["engine_url"] = f"http://127.0.0.1:{node.engine.server_port}"
    checks = node.checks()
    assert {name for name, check in checks.items() if not check["ok"]} == {"metrics_outside"}
    assert "open to the network" in checks["metrics_outside"]["detail"]


def test_a_dead_edge_fails_every_check_of_it_with_one_line(node: Node) -> None:
    node.params["url"] = "http://127.0.0.1:9"
    checks = node.checks()
    assert not any(check["ok"] for name, check in checks.items() if name in CONTENT | {"health", "models_list"})
    assert "127.0.0.1:9" in checks["sum"]["detail"] and "refused" in checks["sum"]["detail"]


def test_a_stream_that_a_busy_machine_bunched_once_is_no_fault(node: Node) -> None:
    def bunch_once(path: str, sent: list[Any]) -> list[Any]:
        node.edge.stream_pause = 0.002 if node.edge.stream_pause == 0 else 0
        return sent

    node.edge.stream_pause = 0.002
    node.edge.change_events = bunch_once
    assert node.checks()["streaming"]["ok"]


def sleep_by(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], object]) -> None:
    """Of the module alone: subprocess sleeps too, where a process takes long to end."""
    monkeypatch.setattr(verify_endpoint, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))


RUNTIME = "OCI runtime exec failed: exec failed: unable to start container process: read init-p: connection reset"


def test_a_runtime_that_cannot_start_a_process_once_is_no_fault(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.fail("exec", RUNTIME)
    sleep_by(monkeypatch, lambda seconds: (node.directory / "exec.err").unlink())
    assert verify_endpoint.Verification(node.params).check_gpus_in_container() == "8 GPUs (NVIDIA B200)"


def test_a_runtime_that_never_can_is_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    node.fail("exec", RUNTIME)
    sleep_by(monkeypatch, slept.append)
    with pytest.raises(Wrong, match="OCI runtime exec failed"):
        verify_endpoint.Verification(node.params).check_gpus_in_container()
    assert slept == list(verify_endpoint.EXEC_PAUSES)


def test_an_edge_that_is_a_moment_behind_is_waited_for(node: Node) -> None:
    node.edge.not_ready = 3
    assert all(check["ok"] for check in node.checks().values())


def test_an_engine_that_hangs_is_given_up(node: Node) -> None:
    def hang(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if asks("sum")(request):
            time.sleep(2)
        return answer

    node.edge.change_chat, node.params["timeout"] = hang, 1
    check = node.checks()["sum"]
    assert not check["ok"] and "within 1 s" in check["detail"]


def test_an_endless_stream_is_given_up(node: Node) -> None:
    node.edge.change_events = lambda path, sent: sent[:4] * 1000 if path == CHAT else sent
    node.edge.stream_pause, node.params["timeout"] = 0.01, 1
    check = node.checks()["streaming"]
    assert not check["ok"] and "still answering after 1 s" in check["detail"]


def test_expectations_can_be_told(node: Node) -> None:
    node.params["questions"]["sum"]["expect"] = "42|forty-two"
    changed(CONTENT_AT, "forty-two", asks("sum"))(node)
    assert node.checks()["sum"]["ok"]


def test_the_cached_tokens_that_the_engine_tells(node: Node) -> None:
    changed(("usage", "prompt_tokens_details"), {"cached_tokens": 384})(node)
    assert "384 of them from the prefix cache" in node.checks()["second_turn"]["detail"]


def test_the_fact_is_in_the_prompt_once() -> None:
    question = QUESTIONS["find_fact"]
    prompts = [verify_endpoint.filled(QUESTIONS, question, 20, depth / 19, "4711") for depth in range(20)]
    assert len(set(prompts)) == 20
    for prompt in prompts:
        assert prompt.count("4711") == 1 and prompt.endswith(question["prompt"])
        assert sum(prompt.count(sentence) for sentence in question["filler"]) == 20
    assert [prompt.index("4711") for prompt in prompts] == sorted(prompt.index("4711") for prompt in prompts)


@pytest.mark.parametrize("per_word", [0.6, 1, 1.4, 2.5])
def test_prompts_have_their_length_with_any_tokenizer(node: Node, per_word: float) -> None:
    """Facts in no more than 5 % over what is asked for, and a long answer that begins before its mark."""
    node.edge.count = lambda words: round(words * per_word) + 9
    verification = verify_endpoint.Verification(node.params)
    question = QUESTIONS["find_fact"]
    for tokens in (question["tokens"] * 1.03, QUESTIONS["long_answer"]["crosses"] - 60):
        prompt = verify_endpoint.filled(QUESTIONS, question, verification._sentences(question, tokens))
        assert abs(node.edge.count(len(prompt.split())) - tokens) < 30


def test_a_wrong_address_is_refused() -> None:
    with pytest.raises(ValueError, match="not an http"):
        endpoint.Server("localhost:8000", 1)


@pytest.mark.parametrize(
    ("days", "said"), [(40, r"until \d{4}-\d\d-\d\d, 40 days"), (-2, "it expired on .*: renew it")]
)
def test_the_certificate_that_is_shown_is_read(days: int, said: str, node: Node, tmp_path: Path) -> None:
    path = tmp_path / "edge.pem"
    path.write_text("".join(pem(days=days)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as plain, context.wrap_socket(plain, server_side=True) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        (check,) = verify_endpoint.Verification({**node.params, "url": url})._chain(["certificate"])
    assert check["ok"] is (days > 0) and re.fullmatch(said, check["detail"])
