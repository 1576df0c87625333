"""The clients' files, as playbooks/clients.yml writes them, with the real SDKs and the real Claude Code."""

from __future__ import annotations

import json
import os
import secrets
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import claude_code
import openai
import pytest
import yaml
from claude_code import sourced
from testbed import ROOT, Play
from testinfra.host import Host

INVENTORY = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "inventory"
QUESTIONS: dict[str, Any] = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())
EXACT, SUM, COUNT, WEATHER, AGENT = (
    QUESTIONS[name] for name in ("exact_reply", "sum", "streaming", "tool_call", "agent_tool")
)
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
MODES = {
    "claude-code.env": 0o600,
    "curl.sh": 0o700,
    "ncode.env": 0o600,
    "ncode.sh": 0o700,
    "openai-sdk.py": 0o600,
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What clients.yml says, once for all nodes."""
    done = Play(tmp_path_factory.mktemp("clients"), INVENTORY)(playbook="playbooks/clients.yml")
    assert done.code == 0, done.messages
    return done.output


@pytest.fixture(scope="module")
def files(run: str, node: str) -> Path:
    return INVENTORY / "keys/clients" / node


@pytest.fixture(scope="module")
def engine(host: Host) -> str:
    return str(json.loads(host.file("/opt/glm/current/release.json").content_string)["engine"])


@pytest.fixture(scope="module")
def gpt(files: Path) -> openai.OpenAI:
    settings = sourced(files / "ncode.env")
    return openai.OpenAI(
        base_url=settings["OPENAI_BASE_URL"], api_key=settings["OPENAI_API_KEY"], max_retries=0, timeout=60
    )


@pytest.fixture(scope="module")
def claude(files: Path) -> anthropic.Anthropic:
    settings = sourced(files / "claude-code.env")
    return anthropic.Anthropic(
        base_url=settings["ANTHROPIC_BASE_URL"], api_key=settings["ANTHROPIC_API_KEY"], max_retries=0, timeout=60
    )


@pytest.fixture(scope="module")
def model(files: Path) -> str:
    return sourced(files / "claude-code.env")["ANTHROPIC_MODEL"]


def test_the_files_are_private(files: Path) -> None:
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files.iterdir()} == MODES
    assert stat.S_IMODE(files.stat().st_mode) == 0o700


def test_no_key_is_in_the_output(run: str, files: Path) -> None:
    assert sourced(files / "ncode.env")["OPENAI_API_KEY"] not in run


def test_claude_code_is_told_what_either_engine_needs(files: Path) -> None:
    settings = sourced(files / "claude-code.env")
    assert settings["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    assert settings["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == settings["ANTHROPIC_MODEL"]


def test_the_real_claude_code_answers(files: Path, tmp_path: Path) -> None:
    answer = claude_code.ask(sourced(files / "claude-code.env"), tmp_path, EXACT["prompt"])
    assert (answer["result"].strip(), answer["num_turns"]) == (EXACT["expect"], 1)


def test_the_real_claude_code_calls_a_tool(files: Path, tmp_path: Path) -> None:
    code = f"{secrets.randbelow(9000) + 1000}"
    (tmp_path / "note.txt").write_text(AGENT["fact"].format(code=code))
    answer = claude_code.ask(sourced(files / "claude-code.env"), tmp_path, AGENT["prompt"])
    assert (answer["result"].strip(), answer["num_turns"]) == (AGENT["expect"].format(code=code), 2)


def test_the_second_turn_of_claude_code_comes_from_the_cache(run: str) -> None:
    """Both engines tell it: every profile of either has the flag for it."""
    line = next(line for line in run.splitlines() if "claude-code: " in line)
    prompt, cached = (int(line.split(mark)[0].split()[-1]) for mark in (" prompt tokens", " of them from the"))
    assert prompt / 2 < cached < prompt


def test_curl(files: Path) -> None:
    done = subprocess.run([files / "curl.sh"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip() == EXACT["expect"]


def test_the_openai_snippet(files: Path) -> None:
    command = [sys.executable, files / "openai-sdk.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == EXACT["expect"]


def test_the_command_line_of_ncode(files: Path, tmp_path: Path) -> None:
    """With a program that shows how it is called, since ncode itself is built by whoever uses it."""
    program = tmp_path / "ncode"
    program.write_text('#!/bin/sh\necho "$OPENAI_MODEL"; for word; do echo "$word"; done\n')
    program.chmod(0o755)
    done = subprocess.run(
        [files / "ncode.sh"], env={**os.environ, "NCODE": str(program)}, capture_output=True, text=True, check=True
    )
    name = "my-glm-5.2-fp8"
    assert done.stdout.splitlines() == [
        name,
        *("--model", name, "--print", "--max-turns", "1", "Reply exactly: ok"),
    ]


def test_openai_lists_the_models(gpt: openai.OpenAI, engine: str) -> None:
    assert [item.id for item in gpt.models.list()] == ["glm-5.2-fp8", "my-glm-5.2-fp8"][: 2 if engine == "vllm" else 1]


@pytest.mark.parametrize("name", ["glm-5.2-fp8", "my-glm-5.2-fp8"])
def test_openai_chat(gpt: openai.OpenAI, name: str) -> None:
    answer = gpt.chat.completions.create(
        model=name, messages=[{"role": "user", "content": SUM["prompt"]}], extra_body=NO_THINKING, temperature=0
    )
    assert (answer.choices[0].message.content or "").strip() == SUM["expect"]
    assert answer.usage and answer.usage.completion_tokens > 0


def test_openai_stream(gpt: openai.OpenAI, model: str) -> None:
    stream = gpt.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": COUNT["prompt"]}],
        extra_body=NO_THINKING,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(texts).strip() == COUNT["expect"]
    assert len(texts) > 1
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens > 0


def test_openai_tools(gpt: openai.OpenAI, model: str) -> None:
    answer = gpt.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": WEATHER["prompt"]}],
        tools=[{"type": "function", "function": tool} for tool in WEATHER["tools"]],
        tool_choice="auto",
        extra_body=NO_THINKING,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls or []
    called = [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in calls]
    assert called == WEATHER["expect_calls"]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_errors(gpt: openai.OpenAI, model: str, engine: str) -> None:
    turn: list[Any] = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.AuthenticationError, match="Missing or unknown API key"):
        gpt.with_options(api_key="sk-glm-" + "0" * 43).models.list()
    with pytest.raises(openai.BadRequestError):
        gpt.chat.completions.create(model=model, messages=turn, max_tokens=-1)
    with pytest.raises(openai.PermissionDeniedError, match="not served here"):
        gpt.post("../tokenize", cast_to=object, body={"prompt": "x"})
    if engine == "vllm":  # SGLang looks at no name
        with pytest.raises(openai.NotFoundError, match="no-such-model"):
            gpt.chat.completions.create(model="no-such-model", messages=turn)


def test_anthropic_message(claude: anthropic.Anthropic, model: str) -> None:
    message = claude.messages.create(
        model=model,
        max_tokens=256,
        messages=[{"role": "user", "content": SUM["prompt"]}],
        extra_body={**NO_THINKING, "temperature": 0},
    )
    assert "".join(block.text for block in message.content if block.type == "text").strip() == SUM["expect"]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0


def test_anthropic_stream(claude: anthropic.Anthropic, model: str) -> None:
    with claude.messages.stream(
        model=model,
        max_tokens=256,
        messages=[{"role": "user", "content": COUNT["prompt"]}],
        extra_body={**NO_THINKING, "temperature": 0},
    ) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts).strip() == COUNT["expect"]
    assert len(texts) > 1
    assert final.stop_reason == "end_turn"


def test_anthropic_tools(claude: anthropic.Anthropic, model: str) -> None:
    message = claude.messages.create(
        model=model,
        max_tokens=512,
        messages=[{"role": "user", "content": WEATHER["prompt"]}],
        tools=[
            {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
            for tool in WEATHER["tools"]
        ],
        extra_body={"temperature": 0},
    )
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [{"name": call.name, "arguments": call.input} for call in calls] == WEATHER["expect_calls"]
    assert message.stop_reason == "tool_use"


def test_anthropic_counts_tokens(claude: anthropic.Anthropic, model: str) -> None:
    short = claude.messages.count_tokens(model=model, messages=[{"role": "user", "content": "ok"}])
    longer = claude.messages.count_tokens(model=model, messages=[{"role": "user", "content": "ok " * 100}])
    assert 0 < short.input_tokens < longer.input_tokens


def test_anthropic_errors(claude: anthropic.Anthropic, model: str) -> None:
    turn: list[Any] = [{"role": "user", "content": "hello"}]
    with pytest.raises(anthropic.AuthenticationError, match="Missing or unknown API key"):
        claude.with_options(api_key="sk-glm-" + "0" * 43).messages.create(model=model, max_tokens=8, messages=turn)
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=model, max_tokens=8, messages=[{"role": "nobody", "content": "hello"}])  # type: ignore[typeddict-item]
