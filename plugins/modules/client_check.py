#!/usr/bin/python
"""Ansible module: ask an endpoint as a client of a given kind will."""

from __future__ import annotations

DOCUMENTATION = r"""
module: client_check
short_description: Send what a client sends, with that client's own settings
description:
  - Takes each client's settings by the names of its environment variables, and makes the requests of that client with
    them, from where the module runs.
  - C(claude_code) holds a conversation through C(/v1/messages), streamed, with a system prompt as long as Claude
    Code's, a tool and the thinking, effort and answer length of the settings. It has two turns with an answer and one
    in which the tool is called; then its tokens are counted. Each model of the settings is asked.
  - C(openai) asks for one streamed chat completion.
  - A client that is not served is a result, not a failure of the module. Changes nothing.
options:
  clients:
    description:
      - What to try, by a name of the caller's choice. C(kind) is V(claude_code) or V(openai); C(environment) holds
        C(ANTHROPIC_BASE_URL), C(ANTHROPIC_API_KEY), the C(ANTHROPIC_..._MODEL) ones, C(CLAUDE_CODE_MAX_OUTPUT_TOKENS)
        and C(CLAUDE_CODE_EFFORT_LEVEL), or C(OPENAI_BASE_URL), C(OPENAI_API_KEY) and C(OPENAI_MODEL).
    type: dict
    required: true
  questions:
    description: What to ask and what to expect; C(exact_reply) and C(agent) of C(roles/verify/files/questions.yml).
    type: dict
    required: true
  timeout: {description: Seconds for one answer., type: int, default: 120}
  ca_file: {description: 'Certificates of an authority to trust besides, in PEM.', type: path, default: ""}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Try the client's settings
  glm.fleet.client_check:
    clients:
      chat:
        kind: openai
        environment: {OPENAI_BASE_URL: "http://198.51.100.7:8000/v1", OPENAI_API_KEY: "{{ key }}", OPENAI_MODEL: glm}
    questions: "{{ lookup('ansible.builtin.file', 'questions.yml') | from_yaml }}"
  delegate_to: localhost
"""

RETURN = r"""
ok: {description: Whether every client was served., type: bool, returned: always}
clients:
  description: By client, whether it is ok, and in C(detail) what was seen in one line.
  type: dict
  returned: always
  contains:
    ok: {description: Whether it was served., type: bool}
    detail: {description: What was seen., type: str}
    cached_tokens:
      description: Of the second turn's prompt, the tokens that came from the prefix cache; null where that is not told.
      type: int
"""

import concurrent.futures
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.endpoint import Response, Server, Wrong, need, shorten


class Client:
    """What each kind of client has: its settings, a question and a way to ask it."""

    question_name: str

    def __init__(self, environment: dict[str, str], params: dict[str, Any]) -> None:
        self.environment, self.timeout, self.ca_file = environment, params["timeout"], params["ca_file"]
        self.question: dict[str, Any] = params["questions"][self.question_name]

    def post(self, base_url: str, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        base = urlsplit(base_url)
        server = Server(base_url, self.timeout, own_name=False, ca_file=self.ca_file)
        answer = server.request("POST", base.path.rstrip("/") + path, body, headers)
        need(answer, 200)
        return answer

    def expect(self, text: str) -> None:
        if not re.fullmatch(self.question["expect"], text.strip()):
            raise Wrong(f"answered {shorten(text.strip())!r}, wanted {self.question['expect']!r}")


class OpenAI(Client):
    """One streamed chat completion."""

    question_name = "exact_reply"

    def run(self) -> dict[str, Any]:
        model = self.environment["OPENAI_MODEL"]
        answer = self.post(
            self.environment["OPENAI_BASE_URL"],
            "/chat/completions",
            {
                "model": model,
                "messages": [{"role": "user", "content": self.question["prompt"]}],
                "stream": True,
                "temperature": 0,
                "max_tokens": 2048,
                "chat_template_kwargs": {"enable_thinking": False},
            },
            {"Authorization": f"Bearer {self.environment['OPENAI_API_KEY']}"},
        )
        deltas = [event["choices"][0]["delta"] for _at, event in answer.events() if event.get("choices")]
        text = "".join(delta.get("content") or "" for delta in deltas)
        self.expect(text)
        return {"detail": f"{model} answered {text.strip()!r}", "cached_tokens": None}


@dataclass
class Answer:
    """A streamed turn of the model: its blocks without the thinking, the text in them, and what it says it cost."""

    content: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(block["text"] for block in self.content if block["type"] == "text").strip()

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [block for block in self.content if block["type"] == "tool_use"]


class ClaudeCode(Client):
    """Two turns of a conversation through /v1/messages, and one with a call of a tool."""

    question_name = "agent"

    def __init__(self, environment: dict[str, str], params: dict[str, Any]) -> None:
        super().__init__(environment, params)
        # A mark that is new on each run, so that the first turn is in no cache yet.
        sentences = [self.question["system"]] * self.question["repeat"]
        self.system_text = " ".join([f"[{secrets.token_hex(4)}]", *sentences])
        self.with_call: dict[str, Any] = params["questions"]["agent_tool"]
        self.code = f"{secrets.randbelow(9000) + 1000}"

    def run(self) -> dict[str, Any]:
        names = [name for name in self.environment if name.startswith("ANTHROPIC_") and name.endswith("_MODEL")]
        model, *others = dict.fromkeys(self.environment[name] for name in names)
        turns = [self.turn("user", [self.text(self.question["prompt"])])]
        turns += [self.turn("assistant", self.reply(model, turns).content), *turns]
        usage = self.reply(model, turns).usage
        self.call(model)
        count = self.messages("/count_tokens", self.body(model, turns)).json()["input_tokens"]
        for other in others:
            self.reply(other, turns[:1])
        cached = usage.get("cache_read_input_tokens")
        prompt = usage["input_tokens"] + (cached or 0)
        told = "cached tokens are not reported" if cached is None else f"{cached} of them from the prefix cache"
        return {
            "detail": f"{model} answered 2 turns and called a tool in a third; {prompt} prompt tokens in the second, "
            f"{told}; {count} counted",
            "cached_tokens": cached,
        }

    @staticmethod
    def text(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}

    @staticmethod
    def turn(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"role": role, "content": content}

    def body(self, model: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
        tools = [
            {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
            for tool in self.question["tools"]
        ]
        return {"model": model, "system": [self.text(self.system_text)], "messages": turns, "tools": tools}

    def messages(self, path: str, body: dict[str, Any]) -> Response:
        key = {"x-api-key": self.environment["ANTHROPIC_API_KEY"], "anthropic-version": "2023-06-01"}
        base = self.environment["ANTHROPIC_BASE_URL"].rstrip("/")
        return self.post(base, f"/v1/messages{path}?beta=true", body, key)

    def reply(self, model: str, turns: list[dict[str, Any]]) -> Answer:
        """The expected answer to the last turn."""
        answer = self.ask(model, turns)
        self.expect(answer.text)
        return answer

    def call(self, model: str) -> None:
        """Turns with calls of a tool, and an answer that names what only their results say."""
        turns = [self.turn("user", [self.text(self.with_call["prompt"])])]
        result = self.with_call["fact"].format(code=self.code)
        required = {tool["name"]: set(tool["parameters"].get("required", [])) for tool in self.question["tools"]}
        for _turn in range(4):  # a model may look around first
            answer = self.ask(model, turns)
            if not answer.calls:
                break
            for call in answer.calls:
                if call["name"] not in required or not required[call["name"]] <= set(call["input"]):
                    raise Wrong(f"called {shorten(str(call['name']))} with {shorten(str(call['input']))}")
            results = [{"type": "tool_result", "tool_use_id": call["id"], "content": result} for call in answer.calls]
            turns += [self.turn("assistant", answer.content), self.turn("user", results)]
        if len(turns) == 1:
            raise Wrong(f"called no tool, but answered {shorten(answer.text)!r}")
        if self.code not in answer.text:
            raise Wrong(f"answered {shorten(answer.text)!r} to the tool's result, which says {result!r}")

    def ask(self, model: str, turns: list[dict[str, Any]]) -> Answer:
        wanted = {
            "max_tokens": int(self.environment["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]),
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": self.environment["CLAUDE_CODE_EFFORT_LEVEL"]},
            "stream": True,
            "temperature": 0,
        }
        stream = self.messages("", {**self.body(model, turns), **wanted})
        answer, kinds = Answer(), []
        blocks: dict[int, dict[str, Any]] = {}
        arguments: dict[int, str] = {}
        for _at, event in stream.events():
            kinds.append(event["type"])
            if event["type"] == "error":
                raise Wrong(shorten(str(event["error"])))
            if event["type"] == "message_start":
                answer.usage.update(event["message"]["usage"])
            elif event["type"] == "message_delta":
                answer.usage.update({name: value for name, value in event["usage"].items() if value is not None})
            elif event["type"] == "content_block_start":
                blocks[event["index"]] = event["content_block"]
            elif event["type"] == "content_block_delta":
                index, delta = event["index"], event["delta"]
                if delta["type"] == "text_delta":
                    blocks[index]["text"] += delta["text"]
                elif delta["type"] == "input_json_delta":
                    arguments[index] = arguments.get(index, "") + delta["partial_json"]
        if kinds[:1] != ["message_start"] or kinds[-1] != "message_stop":
            raise Wrong(f"the stream goes from {(kinds or ['nothing'])[0]} to {(kinds or ['nothing'])[-1]}")
        for index, text in arguments.items():
            blocks[index]["input"] = json.loads(text)
        answer.content = [block for block in blocks.values() if block["type"] in ("text", "tool_use")]
        return answer


KINDS: dict[str, type[OpenAI | ClaudeCode]] = {"openai": OpenAI, "claude_code": ClaudeCode}


def attempt(client: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, **KINDS[client["kind"]](client["environment"], params).run()}
    except Wrong as problem:
        detail = str(problem)
    except (LookupError, TypeError, AttributeError, ValueError) as problem:  # an answer of another shape
        detail = f"the answer has an unexpected shape ({type(problem).__name__}: {problem})"
    return {"ok": False, "detail": shorten(detail, 300), "cached_tokens": None}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "clients": {"type": "dict", "required": True},  # the task that fills it in has no_log
            "questions": {"type": "dict", "required": True},
            "timeout": {"type": "int", "default": 120},
            "ca_file": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
        no_log=True,
    )
    clients: dict[str, dict[str, Any]] = module.params["clients"]
    wrong = [name for name, client in clients.items() if client.get("kind") not in KINDS]
    if wrong:
        module.fail_json(msg=f"clients: the kind of {wrong[0]} must be one of: {', '.join(KINDS)}")
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        answers = list(pool.map(lambda client: attempt(client, module.params), clients.values()))
    results = dict(zip(clients, answers))
    module.exit_json(changed=False, ok=all(answer["ok"] for answer in answers), clients=results)


if __name__ == "__main__":
    main()
