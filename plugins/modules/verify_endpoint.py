#!/usr/bin/python
"""Ansible module: ask an endpoint everything that tells whether it serves what it should."""

from __future__ import annotations

DOCUMENTATION = r"""
module: verify_endpoint
short_description: Check that a node serves the right model, with right answers, behind a guarded edge
description:
  - Makes all checks in one round trip, most of them beside one another, and returns each with what it saw.
  - No answer is asked for twice. Only the edge is given some seconds to see that the engine is ready, and a stream that
    came in one piece is asked for again, since a busy machine may bunch one, while a buffer holds back every one.
  - Prompts that must have a length are sized by the engine's own count of tokens, and the answer's usage proves it.
  - In a small window, as C(/v1/models) tells it in C(max_model_len), the long prompts are shorter, and C(find_fact)
    says so. C(long_answer) is left out where the window ends before it would, and C(models_list) says so.
  - At most 8 requests are made at once, since a node may take one at a time.
  - Requests go through the edge with the key, as a client's do; the temperature is 0.
  - A failed check is a result, not a failure of the module. Changes nothing.
options:
  url:
    description: The edge as the node reaches it. TLS is not verified where the address is the node's own.
    type: str
    required: true
  engine_url: {description: The engine behind the edge., type: str, required: true}
  models: {description: 'Served model names; the first is asked for everything, the others must answer too.',
           type: list, elements: str, required: true}
  listed_models: {description: Those that the list of models must show., type: list, elements: str, required: true}
  auth: {description: Whether the edge asks for keys., type: str, choices: [keys, none], default: keys}
  api_key: {description: A key that the edge takes., type: str, default: ""}
  questions:
    description: What to ask and what to expect, as in C(roles/verify/files/questions.yml).
    type: dict
    required: true
  metrics: {description: Metric names that the engine must report., type: list, elements: str, default: []}
  cached_tokens_metric: {description: Counter of prompt tokens found in the prefix cache., type: str, default: ""}
  refused_paths:
    description: Paths that the edge must refuse.
    type: list
    elements: str
    default: [/tokenize, /invocations, /v1/load_lora_adapter, /v1/unload_lora_adapter, /v1/loads]
  unit: {description: The engine's systemd unit., type: str, default: glm-engine.service}
  container: {description: The engine's container., type: str, default: glm-engine}
  image_digest: {description: 'Digest (C(sha256:...)) that the container must run.', type: str, required: true}
  gpu_count: {description: GPUs that the container must see., type: int, required: true}
  headers: {description: Headers of each request to the edge., type: dict, default: {}}
  result_file: {description: 'Where to note when it was and what failed; empty for nowhere.', type: path}
  timeout: {description: Seconds for one check., type: int, default: 120}
  ready_timeout: {description: Seconds for the edge to call the engine ready., type: int, default: 10}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Ask the endpoint
  glm.fleet.verify_endpoint:
    url: http://127.0.0.1:8000
    engine_url: http://127.0.0.1:8001
    models: [glm-5.2-fp8]
    listed_models: [glm-5.2-fp8]
    api_key: "{{ key }}"
    questions: "{{ lookup('ansible.builtin.file', 'questions.yml') | from_yaml }}"
    image_digest: "{{ digest }}"
    gpu_count: 8
"""

RETURN = r"""
ok: {description: Whether every check is., type: bool, returned: always}
checks:
  description: Each check with its name, whether it is ok, what it saw in one line, and its seconds.
  type: list
  elements: dict
  returned: always
"""

import concurrent.futures
import contextlib
import datetime
import json
import re
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.endpoint import Server, Wrong, need, shorten
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.metrics import samples

# Seconds between the first and the last token. What was held back on the way comes faster than any engine speaks.
MIN_STREAM_SPREAD = 0.001
STREAM_PAUSES = (0.2, 0.5, 1, 3)  # seconds before another look: a node that is short of CPU reads a stream late, too
EXEC_PAUSES = (1, 3)  # seconds before another try where the container runtime, not the program, could not start
REFUSALS = (401, 403, 404)
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
# So many chains of checks at once: one asks for three facts beside one another, and one by both APIs, so that at most 8
# requests are under way. A node that takes one at a time answers the last of them within its time, too.
CHAINS_AT_ONCE = 5
SPARSE = 2048  # keys that sparse attention selects: it is reached by longer prompts alone
# What a prompt of the facts leaves of the window: for the answers, and for the second turn's question.
FACT_ROOM = 160
LONG_ANSWER = 512
EFFORT = 2048  # tokens to think and answer in, at each effort
TOOL_QUESTIONS = ("tool_call", "tool_call_plain", "tool_call_twice")  # with arguments, without, two in one turn


class Verification:
    """The checks; each returns what it saw, or raises Wrong."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.questions: dict[str, Any] = params["questions"]
        self.model, *self.other_models = params["models"]
        self.edge = Server(params["url"], params["timeout"], params["headers"])
        self.engine = Server(params["engine_url"], params["timeout"])
        self.window: int | None = None  # tokens of a prompt and its answer, where the list of models tells it
        self.facts: list[tuple[str, str]] = []  # the long prompts of find_fact, each with its code
        self.keys = {"Authorization": f"Bearer {params['api_key']}"} if params["auth"] == "keys" else {}

    def run(self) -> list[dict[str, Any]]:
        named = [["other_names"]] if self.other_models else []
        guarded = [["missing_key_refused"], ["wrong_key_refused"]] if self.params["auth"] == "keys" else []
        alone = self._chain(["health", "streaming", "models_list"])  # other requests would disturb the stream's times
        chains = [
            *named,
            ["exact_reply"],
            ["sum"],
            ["find_fact", "second_turn"],
            *([["long_answer"]] if self._holds_long_answer() else []),
            ["thinking"],
            ["effort"],
            ["tool_call"],
            ["tool_call_stream"],
            ["messages"],
            ["messages_stream"],
            ["messages_tool_stream"],
            ["count_tokens"],
            *guarded,
            *([["certificate"]] if self.edge.tls else []),
            ["unlisted_path_refused"],
            ["metrics_inside"],
            ["metrics_outside"],
            ["image_digest"],
            ["unit_state"],
            ["gpus_in_container"],
        ]
        with concurrent.futures.ThreadPoolExecutor(max_workers=CHAINS_AT_ONCE) as pool:
            return alone + [result for results in pool.map(self._chain, chains) for result in results]

    def _chain(self, names: list[str]) -> list[dict[str, Any]]:
        return [self._one(name, getattr(self, f"check_{name}")) for name in names]

    @staticmethod
    def _one(name: str, check: Callable[[], str]) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            ok, detail = True, check()
        except Wrong as problem:
            ok, detail = False, str(problem)
        except (LookupError, TypeError, AttributeError, ValueError) as problem:  # an answer of another shape
            ok, detail = False, f"the answer has an unexpected shape ({type(problem).__name__}: {problem})"
        return {"name": name, "ok": ok, "detail": shorten(detail, 300), "seconds": round(time.monotonic() - begin, 3)}

    # --- what is served ---

    def check_health(self) -> str:
        """The edge looks at a starting engine once a second, so it may be a moment behind."""
        begin = time.monotonic()
        while True:
            answer = self.edge.request("GET", "/health")
            waited = time.monotonic() - begin
            if answer.status != 503 or waited > self.params["ready_timeout"]:
                break
            time.sleep(0.1)
        need(answer, 200)
        return f"HTTP 200 without a key, after {waited:.1f} s"

    def check_models_list(self) -> str:
        answer = self.edge.request("GET", "/v1/models", headers=self.keys)
        need(answer, 200)
        models = answer.json()["data"]
        names = [model["id"] for model in models]
        window = next((model.get("max_model_len") for model in models if model["id"] == self.model), None)
        self.window = window if isinstance(window, int) else None
        missing = [name for name in self.params["listed_models"] if name not in names]
        if missing:
            raise Wrong(f"served are {', '.join(names) or 'no models'}, wanted {', '.join(missing)}")
        told = f"served: {', '.join(names)}" + (f"; window of {self.window} tokens" if self.window else "")
        return told if self._holds_long_answer() else f"{told}, too small for long_answer, which was not asked"

    def check_other_names(self) -> str:
        question = self.questions["exact_reply"]
        for name in self.other_models:
            body = {**self._chat_body(question, [{"role": "user", "content": question["prompt"]}], 64), "model": name}
            answer = self.edge.request("POST", CHAT, body, self.keys)
            need(answer, 200, name)
            self._expect(question, answer.json()["choices"][0]["message"].get("content") or "", name)
        return f"answered: {', '.join(self.other_models)}"

    def check_exact_reply(self) -> str:
        return self._question("exact_reply")

    def check_sum(self) -> str:
        return self._question("sum")

    def check_find_fact(self) -> str:
        """Several at once, each with a code of its own: an answer to another's prompt is wrong."""
        question = self.questions["find_fact"]
        surplus = 1.03  # a little longer than asked for: tokenizers count a prompt's end and start differently
        wanted = question["tokens"]
        if self.window:
            wanted = min(wanted, int((self.window - FACT_ROOM) / surplus))
        sentences = self._sentences(question, wanted * surplus)
        for depth in question["depths"]:
            code = str(1000 + secrets.randbelow(9000))
            self.facts.append((filled(self.questions, question, sentences, depth, code), code))
        answers = beside(self._one_fact, self.facts)
        least = min(answers)
        if least < wanted:
            raise Wrong(f"the prompt has {least} tokens, wanted at least {wanted}")
        told = f"{len(answers)} facts found at once, each in at least {least} prompt tokens"
        if wanted == question["tokens"]:
            return told
        told += f": the window of {self.window} holds no {question['tokens']}"
        return f"{told}; sparse attention is {'reached from' if least > SPARSE else 'not reached before'} {SPARSE} on"

    def _one_fact(self, fact: tuple[str, str]) -> int:
        """The engine's count of the prompt in which the fact was found."""
        prompt, code = fact
        question = self.questions["find_fact"]
        answer = self._chat(question, [{"role": "user", "content": prompt}])
        tokens = int(answer["usage"]["prompt_tokens"])
        self._expect(question, answer["choices"][0]["message"].get("content") or "", f"{tokens} tokens:", code)
        return tokens

    def check_long_answer(self) -> str:
        """Generation itself runs over a position of the context from which on engines have been wrong."""
        question = self.questions["long_answer"]
        crosses = question["crosses"]
        sentences = self._sentences(question, crosses - 60)
        prompt = filled(self.questions, question, sentences)
        answer = self._chat(question, [{"role": "user", "content": prompt}], max_tokens=LONG_ANSWER)
        usage = answer["usage"]
        begin, end = usage["prompt_tokens"], usage["prompt_tokens"] + usage["completion_tokens"]
        self._expect(question, answer["choices"][0]["message"].get("content") or "", f"tokens {begin} to {end}:")
        if not begin < crosses < end:
            raise Wrong(f"the answer goes from token {begin} to {end}, not over {crosses}")
        return f"every item right, from token {begin} to {end}"

    def _holds_long_answer(self) -> bool:
        return not self.window or self.questions["long_answer"]["crosses"] + LONG_ANSWER <= self.window

    def check_second_turn(self) -> str:
        """Whether the conversation's first turn was in the prefix cache is told, not judged."""
        if not self.facts:
            raise Wrong("find_fact had no prompt to go on from")
        prompt, code = self.facts[0]
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": code},
            {"role": "user", "content": self.questions["exact_reply"]["prompt"]},
        ]
        before = self._cached_tokens()
        question = self.questions["exact_reply"]
        answer = self._chat(question, turns, max_tokens=16)
        self._expect(question, answer["choices"][0]["message"].get("content") or "")
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is None and before is not None:
            cached = int((self._cached_tokens() or before) - before)
        told = "cached tokens are not reported" if cached is None else f"{cached} of them from the prefix cache"
        return f"answered; {usage['prompt_tokens']} prompt tokens, {told}"

    def check_streaming(self) -> str:
        for pause in (0, *STREAM_PAUSES):
            time.sleep(pause)
            told, spread = self._stream()
            if spread >= MIN_STREAM_SPREAD:
                return told
        raise Wrong(f"{told}: all at once, {1 + len(STREAM_PAUSES)} times; something between holds it back")

    def _stream(self) -> tuple[str, float]:
        """What a stream looked like, and the seconds between its first and its last token."""
        question = self.questions["streaming"]
        begin = time.monotonic()
        answer = self.edge.request(
            "POST",
            CHAT,
            {
                **self._chat_body(question, [{"role": "user", "content": question["prompt"]}], 256),
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            self.keys,
        )
        need(answer, 200)
        events = list(answer.events())
        tokens = [
            (moment, event["choices"][0]["delta"]["content"])
            for moment, event in events
            if event.get("choices") and event["choices"][0]["delta"].get("content")
        ]
        self._expect(question, "".join(text for _at, text in tokens))
        if len(tokens) < 2:
            raise Wrong(f"the whole answer came in {len(tokens)} chunk")
        first, last = tokens[0][0] - begin, tokens[-1][0] - begin
        usage = events[-1][1].get("usage")
        if not usage or not usage.get("completion_tokens"):
            raise Wrong("the last event of the stream holds no usage")
        self._expect_model(events[0][1])
        if not any(line == "data: [DONE]" for _at, line in answer.lines[-3:]):
            raise Wrong("the stream ends without [DONE]")
        return (
            f"{len(tokens)} chunks, the first after {first:.2f} s, the last after {last:.2f} s, "
            f"usage at the end: {usage['completion_tokens']} tokens"
        ), last - first

    def check_thinking(self) -> str:
        question = self.questions["thinking"]
        message = self._chat(question, max_tokens=2048)["choices"][0]["message"]
        field = next((name for name in ("reasoning_content", "reasoning") if message.get(name)), None)
        content = (message.get("content") or "").strip()
        if "<think>" in content or "</think>" in content:
            raise Wrong(f"the thinking is within the answer: {shorten(content)!r}")
        if field is None:
            raise Wrong(f"no reasoning beside the answer {shorten(content)!r}")
        self._expect(question, content)
        return f"{len(message[field])} characters in `{field}`, answer {content!r}"

    def check_effort(self) -> str:
        question, told = self.questions["effort"], []
        for effort in question["efforts"]:  # one after another: each may think for long
            told += beside(self._one_effort, [(path, effort) for path in (CHAT, MESSAGES)])
        return ", ".join(told)

    def _one_effort(self, asked: tuple[str, str]) -> str:
        """GLM-5.2's template makes the most of an effort that it does not know: thinking may fill all that is given."""
        path, effort = asked
        question, who = self.questions["effort"], f"{effort} on {path}:"
        turns = [{"role": "user", "content": question["prompt"]}]
        told = {"reasoning_effort": effort} if path == CHAT else {"output_config": {"effort": effort}}
        headers = self.keys if path == CHAT else self._anthropic_keys()
        answer = self.edge.request("POST", path, {**self._chat_body(question, turns, EFFORT), **told}, headers)
        need(answer, 200, who.rstrip(":"))
        body = answer.json()
        text = (body["choices"][0]["message"].get("content") if path == CHAT else text_of(body)) or ""
        finish = body["choices"][0]["finish_reason"] if path == CHAT else body["stop_reason"]
        if not text.strip() and finish in ("length", "max_tokens"):
            return f"{who} still thinking after {EFFORT} tokens"
        self._expect(question, text, who)
        return f"{who} {text.strip()!r}"

    def check_tool_call(self) -> str:
        question = self.questions["tool_call"]
        choice = self._chat(question, max_tokens=512, **self._tools(question))["choices"][0]
        calls = [
            {"id": call.get("id"), **call["function"], "arguments": parsed(call["function"]["arguments"])}
            for call in choice["message"].get("tool_calls") or []
        ]
        return expect_calls(question, calls, choice["message"].get("content") or "", choice["finish_reason"])

    def check_tool_call_stream(self) -> str:
        return "; ".join(map(self._one_tool_stream, TOOL_QUESTIONS))

    def _one_tool_stream(self, name: str) -> str:
        question = self.questions[name]
        turns = [{"role": "user", "content": question["prompt"]}]
        body = {**self._chat_body(question, turns, 512), **self._tools(question), "stream": True}
        answer = self.edge.request("POST", CHAT, body, self.keys)
        need(answer, 200, name)
        calls: dict[int, dict[str, Any]] = {}
        text, finish = "", None
        for _at, event in answer.events():
            for choice in event.get("choices") or []:
                text += choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
                for part in choice["delta"].get("tool_calls") or []:
                    call = calls.setdefault(part["index"], {"id": None, "name": None, "arguments": ""})
                    function = part.get("function") or {}
                    call["id"], call["name"] = part.get("id") or call["id"], function.get("name") or call["name"]
                    call["arguments"] += function.get("arguments") or ""
        for call in calls.values():
            call["arguments"] = parsed(call["arguments"])
        return expect_calls(question, list(calls.values()), text, finish)

    def check_messages_tool_stream(self) -> str:
        return "; ".join(map(self._one_messages_tool_stream, TOOL_QUESTIONS))

    def _one_messages_tool_stream(self, name: str) -> str:
        question = self.questions[name]
        turns = [{"role": "user", "content": question["prompt"]}]
        tools = [
            {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
            for tool in question["tools"]
        ]
        # Room for thinking: not every release lets this API turn it off.
        body = {**self._chat_body(question, turns, 2048), "tools": tools, "stream": True}
        answer = self.edge.request("POST", MESSAGES, body, self._anthropic_keys())
        need(answer, 200, name)
        blocks: dict[int, dict[str, Any]] = {}
        finish = None
        for _at, event in answer.events():
            if event["type"] == "content_block_start":
                blocks[event["index"]] = {**event["content_block"], "parts": ""}
            elif event["type"] == "content_block_delta":
                delta = event["delta"]
                blocks[event["index"]]["parts"] += delta.get("partial_json") or delta.get("text") or ""
            elif event["type"] == "message_delta":
                finish = event["delta"].get("stop_reason")
        text = "".join(block["parts"] for block in blocks.values() if block["type"] == "text")
        # A call without arguments may have no part at all, as the API has it.
        calls = [
            {"id": block["id"], "name": block["name"], "arguments": parsed(block["parts"] or "{}")}
            for block in blocks.values()
            if block["type"] == "tool_use"
        ]
        return expect_calls(question, calls, text, finish, "tool_use")

    def check_messages(self) -> str:
        answer = self.edge.request("POST", MESSAGES, self._messages_body(), self._anthropic_keys())
        need(answer, 200)
        body = answer.json()
        self._expect_model(body)
        text = text_of(body)
        self._expect(self.questions["messages"], text)
        return f"{text.strip()!r}, stop_reason {body['stop_reason']}, {body['usage']['output_tokens']} output tokens"

    def check_messages_stream(self) -> str:
        answer = self.edge.request("POST", MESSAGES, {**self._messages_body(), "stream": True}, self._anthropic_keys())
        need(answer, 200)
        events = [event for _at, event in answer.events()]
        kinds = [event["type"] for event in events]
        if kinds[:1] != ["message_start"] or kinds[-1] != "message_stop":
            raise Wrong(
                f"the stream goes from {(kinds or ['nothing'])[0]} to {(kinds or ['nothing'])[-1]}, "
                "wanted message_start to message_stop"
            )
        text = "".join(event["delta"].get("text") or "" for event in events if event["type"] == "content_block_delta")
        self._expect(self.questions["messages"], text)
        return f"{text.strip()!r} in {len(events)} events, message_start to message_stop"

    def check_count_tokens(self) -> str:
        return f"{self._count(self.questions['messages']['prompt'])} input tokens"

    # --- what is refused ---

    def check_missing_key_refused(self) -> str:
        return self._all_refused([("GET", "/v1/models", {}), ("POST", "/v1/chat/completions", {})], (401,))

    def check_wrong_key_refused(self) -> str:
        key = f"sk-glm-{secrets.token_urlsafe(32)}"
        return self._all_refused(
            [
                ("GET", "/v1/models", {"Authorization": f"Bearer {key}"}),
                ("GET", "/v1/models", {"x-api-key": key}),
                ("POST", MESSAGES, {"x-api-key": key}),
            ],
            (401,),
        )

    def check_certificate(self) -> str:
        """The one that the edge shows, whichever file it came from."""
        text = ssl.DER_cert_to_PEM_cert(self.edge.certificate())
        command = ["openssl", "x509", "-noout", "-enddate"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Wrong(f"openssl cannot read the certificate: {shorten(done.stderr)}")
        ends = datetime.datetime.fromtimestamp(
            ssl.cert_time_to_seconds(done.stdout.strip().partition("=")[2]), datetime.timezone.utc
        )
        days = (ends - datetime.datetime.now(datetime.timezone.utc)).total_seconds() / 86400
        if days < 0:
            raise Wrong(f"it expired on {ends:%Y-%m-%d}: renew it")
        return f"until {ends:%Y-%m-%d}, {days:.0f} days"

    def check_unlisted_path_refused(self) -> str:
        """With the right key: only the list of paths stands between."""
        return self._all_refused([("POST", path, self.keys) for path in self.params["refused_paths"]], REFUSALS)

    def check_metrics_outside(self) -> str:
        seen = self._all_refused([("GET", "/metrics", self.keys)], REFUSALS)
        address = outward_address()
        if address is None:
            return f"edge: {seen}"
        try:
            socket.create_connection((address, self.engine.port), timeout=5).close()
        except OSError:
            return f"edge: {seen}; {address}:{self.engine.port} takes no connection"
        raise Wrong(f"the engine's port {address}:{self.engine.port} is open to the network")

    def _all_refused(self, requests: list[tuple[str, str, dict[str, str]]], wanted: tuple[int, ...]) -> str:
        seen = []
        for method, path, headers in requests:
            status = self.edge.request(method, path, {} if method == "POST" else None, headers).status
            seen.append(f"{path} HTTP {status}")
            if status not in wanted:
                raise Wrong(f"{seen[-1]} where it must be refused ({', '.join(map(str, wanted))})")
        return ", ".join(dict.fromkeys(seen))

    # --- what runs ---

    def check_metrics_inside(self) -> str:
        names = set(self._metrics())
        missing = [name for name in self.params["metrics"] if name not in names]
        if missing:
            raise Wrong(f"the engine does not report {', '.join(missing)}")
        return f"{len(self.params['metrics'])} of {len(self.params['metrics'])} wanted metrics, {len(names)} in all"

    def check_image_digest(self) -> str:
        container, wanted = self.params["container"], self.params["image_digest"]
        image = command("docker", "inspect", "--type", "container", "--format", "{{.Image}}", container)
        digests = json.loads(command("docker", "image", "inspect", "--format", "{{json .RepoDigests}}", image)) or []
        if wanted not in [digest.rpartition("@")[2] for digest in digests]:
            raise Wrong(f"{container} runs {', '.join(digests) or image}, wanted {wanted}")
        return f"{container} runs {next(digest for digest in digests if digest.endswith(wanted))}"

    def check_unit_state(self) -> str:
        unit = self.params["unit"]
        shown = command("systemctl", "show", unit, "--property=ActiveState,SubState,NRestarts,Result")
        state = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        seen = f"{unit} is {state['ActiveState']} ({state['SubState']}), {state['NRestarts']} restarts"
        if state["ActiveState"] != "active":
            raise Wrong(f"{seen}, result {state['Result']}: journalctl -u {unit}")
        return seen

    def check_gpus_in_container(self) -> str:
        listed = in_container(self.params["container"], "nvidia-smi", "-L")
        gpus = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed, re.MULTILINE)
        seen = f"{len(gpus)} GPUs ({', '.join(sorted(set(gpus))) or 'none'})"
        if len(gpus) != self.params["gpu_count"]:
            raise Wrong(f"{seen}, wanted {self.params['gpu_count']}")
        return seen

    # --- helpers ---

    def _question(self, name: str) -> str:
        question = self.questions[name]
        content = self._chat(question)["choices"][0]["message"].get("content") or ""
        self._expect(question, content)
        return f"answered {content.strip()!r}"

    def _count(self, prompt: str) -> int:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        answer = self.edge.request("POST", f"{MESSAGES}/count_tokens", body, self._anthropic_keys())
        need(answer, 200, "count_tokens")
        count = answer.json().get("input_tokens")
        if not isinstance(count, int) or count <= 0:
            raise Wrong(f"input_tokens is {count!r}, wanted a positive number")
        return count

    def _sentences(self, question: dict[str, Any], tokens: float) -> int:
        """How many filler sentences make the prompt about so long, as the engine counts: tokenizers differ."""
        sentences = round(tokens / 16)
        for _round in range(2):
            sentences = round(sentences * tokens / self._count(filled(self.questions, question, sentences)))
        return sentences

    @staticmethod
    def _tools(question: dict[str, Any]) -> dict[str, Any]:
        return {"tools": [{"type": "function", "function": tool} for tool in question["tools"]], "tool_choice": "auto"}

    def _chat_body(self, question: dict[str, Any], messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        if self.window:  # engines refuse a request that could not end within it
            max_tokens = min(max_tokens, self.window // 2)
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        if not question.get("thinking", True):
            body["chat_template_kwargs"] = {"enable_thinking": False}
        return body

    def _chat(
        self, question: dict[str, Any], messages: list[dict[str, str]] | None = None, max_tokens: int = 64, **more: Any
    ) -> dict[str, Any]:
        messages = messages or [{"role": "user", "content": question["prompt"]}]
        answer = self.edge.request("POST", CHAT, {**self._chat_body(question, messages, max_tokens), **more}, self.keys)
        need(answer, 200)
        body: dict[str, Any] = answer.json()
        self._expect_model(body)
        return body

    def _messages_body(self) -> dict[str, Any]:
        question = self.questions["messages"]
        # Room for thinking: not every release lets this API turn it off.
        return self._chat_body(question, [{"role": "user", "content": question["prompt"]}], 2048)

    def _anthropic_keys(self) -> dict[str, str]:
        key = {"x-api-key": self.params["api_key"]} if self.params["auth"] == "keys" else {}
        return {"anthropic-version": "2023-06-01", **key}

    def _expect(self, question: dict[str, Any], answer: str, who: str = "", code: str = "") -> None:
        wanted = str(question["expect"]).replace("{code}", code)
        if not re.fullmatch(wanted, answer.strip()):
            raise Wrong(f"{who and who + ' '}answered {shorten(answer.strip())!r}, wanted {shorten(wanted)!r}")

    def _expect_model(self, body: dict[str, Any]) -> None:
        if body.get("model") != self.model:
            raise Wrong(f"the answer is from the model {body.get('model')!r}, wanted {self.model!r}")

    def _metrics(self) -> dict[str, float]:
        answer = self.engine.request("GET", "/metrics")
        need(answer, 200)
        values: dict[str, float] = samples(answer.body.decode(errors="replace"))
        return values

    def _cached_tokens(self) -> float | None:
        name = self.params["cached_tokens_metric"]
        return self._metrics().get(name) if name else None


def filled(questions: dict[str, Any], question: dict[str, Any], count: int, depth: float = 0.0, code: str = "") -> str:
    """The question behind filler sentences, with its fact, where it has one, at a depth from 0 to 1 of them.

    The mark in front differs on each call, so that the prefix cache holds none of it.
    """
    filler = questions["find_fact"]["filler"]
    sentences = [filler[number % len(filler)] for number in range(count)]
    if "fact" in question:
        sentences.insert(round(depth * count), question["fact"].replace("{code}", code))
    return " ".join([f"[{secrets.token_hex(4)}]", *sentences, question["prompt"]])


def beside(ask: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What each call returns, all made at once; the first that is wrong is told."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(items)) as pool:
        return list(pool.map(ask, items))


def text_of(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def parsed(arguments: str) -> Any:
    """The arguments of a call, or the text where it is not JSON."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def expect_calls(
    question: dict[str, Any],
    calls: list[dict[str, Any]],
    text: str,
    finish: str | None,
    wanted_finish: str = "tool_calls",
) -> str:
    """The calls in one line, or Wrong: as many as wanted, right, in any order, each with an id of its own."""

    def line(call: dict[str, Any]) -> str:
        arguments = call["arguments"]
        # Text that is not JSON is told as it came.
        told = arguments if isinstance(arguments, str) else json.dumps(arguments, sort_keys=True)
        return f"{call['name']}({shorten(told)})"

    seen, wanted = sorted(map(line, calls)), sorted(map(line, question["expect_calls"]))
    if seen != wanted:
        told = "".join(f", {call}" for call in seen)
        raise Wrong(f"{len(calls)} tool calls{told}, text {shorten(text)!r}, wanted {', '.join(wanted)}")
    if len({call["id"] for call in calls if call["id"]}) != len(calls):
        raise Wrong(f"{', '.join(seen)}, with the ids {', '.join(repr(call['id']) for call in calls)}")
    if finish != wanted_finish:
        raise Wrong(f"{', '.join(seen)}, but it ends with {finish!r}, wanted {wanted_finish!r}")
    return ", ".join(seen)


def command(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise Wrong(f"{argv[0]}: {problem}") from None
    if done.returncode:
        raise Wrong(f"{' '.join(argv[:2])} failed: {shorten(done.stderr or done.stdout) or f'exit {done.returncode}'}")
    return done.stdout.strip()


def in_container(container: str, *argv: str) -> str:
    """What a command in the container prints. A busy runtime may fail to start one: that is not of the engine."""
    for pause in EXEC_PAUSES:
        try:
            return command("docker", "exec", container, *argv)
        except Wrong as problem:
            if "OCI runtime exec failed" not in str(problem):
                raise
        time.sleep(pause)
    return command("docker", "exec", container, *argv)


def outward_address() -> str | None:
    """The address from which this node reaches others; connecting a datagram socket sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if address.startswith("127.") else address


def note(path: str, failed: list[str]) -> None:
    """When the node was asked last, and what failed; a directory that is not there yet is no reason to fail."""
    result = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "ok": not failed, "failed": failed}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(result, file)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "engine_url": {"type": "str", "required": True},
            "models": {"type": "list", "elements": "str", "required": True},
            "listed_models": {"type": "list", "elements": "str", "required": True},
            "auth": {"type": "str", "choices": ["keys", "none"], "default": "keys"},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "questions": {"type": "dict", "required": True},
            "metrics": {"type": "list", "elements": "str", "default": []},
            "cached_tokens_metric": {"type": "str", "default": "", "no_log": False},
            "refused_paths": {
                "type": "list",
                "elements": "str",
                "default": [
                    "/tokenize",
                    "/invocations",
                    "/v1/load_lora_adapter",
                    "/v1/unload_lora_adapter",
                    "/v1/loads",
                ],
            },
            "unit": {"type": "str", "default": "glm-engine.service"},
            "container": {"type": "str", "default": "glm-engine"},
            "image_digest": {"type": "str", "required": True},
            "gpu_count": {"type": "int", "required": True},
            "headers": {"type": "dict", "default": {}},
            "result_file": {"type": "path"},
            "timeout": {"type": "int", "default": 120},
            "ready_timeout": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
        no_log=True,  # the questions need not be in the journal
    )
    try:
        checks = Verification(module.params).run()
    except ValueError as problem:
        module.fail_json(str(problem))
    failed = [check["name"] for check in checks if not check["ok"]]
    if module.params["result_file"]:
        note(module.params["result_file"], failed)
    module.exit_json(changed=False, ok=not failed, checks=checks)


if __name__ == "__main__":
    main()
