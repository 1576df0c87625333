"""The other engine on a node that serves: an ordinary release, which is refused, taken back or verified."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from testbed import ROOT, Play, docker
from testinfra.host import Host

INVENTORY = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "inventory"
NODE = "sglang-1"
SUM: dict[str, Any] = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())["sum"]

# Settings that are refused before anything is stopped, and the one line that each gets.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "flag that SGLang does not know": (
        {"glm_engine_extra_args": {"--tool-call-parsr": "glm47"}},
        f"{NODE}: lmsysorg/sglang:latest-cu129 does not take the engine's arguments: unrecognized arguments: "
        "--tool-call-parsr glm47: mend glm_engine_extra_args or the profile reference; the engine was not touched",
    ),
    "value that does not fit its flag": (
        {"glm_engine_extra_args": {"--max-running-requests": "many"}},
        f"{NODE}: lmsysorg/sglang:latest-cu129 does not take the engine's arguments: argument --max-running-requests: "
        "invalid int value: 'many': mend glm_engine_extra_args or the profile reference; the engine was not touched",
    ),
    "context beyond the model's": (
        {"glm_engine_extra_args": {"--context-length": 2_000_000}},
        "context_length: glm_engine_extra_args asks for more context than the model has (found --context-length",
    ),
    "profile of the other engine": (
        {"glm_profile": "recipe"},
        "glm_profile: sglang has no profile recipe: set one of agentic, balanced, high-throughput, low-latency, "
        "reference",
    ),
}


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    return Play(tmp_path_factory.mktemp("sglang"), INVENTORY)


def release(host: Host) -> dict[str, Any]:
    return dict(json.loads(host.file("/opt/glm/current/release.json").content_string))


def container() -> str:
    """The id of the engine's container."""
    return docker("exec", f"glm-{NODE}", "docker", "ps", "--quiet", "--no-trunc", "--filter", "name=^/glm-engine$")


def answer() -> str:
    """What the endpoint, with the key that it had from the first, says to a sum."""
    key = (INVENTORY / "keys/api-keys.txt").read_text().splitlines()[-1].strip()
    client = openai.OpenAI(base_url="http://198.18.70.10:8000/v1", api_key=key, max_retries=0, timeout=60)
    said = client.chat.completions.create(
        model="glm-5.2-fp8",
        messages=[{"role": "user", "content": SUM["prompt"]}],
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        temperature=0,
    )
    return (said.choices[0].message.content or "").strip()


def report() -> dict[str, Any]:
    """What the last run reported of the node."""
    return dict(json.loads((ROOT / "results/sglang/report.json").read_text())["nodes"][NODE])


@pytest.fixture
def untouched(host: Host) -> Iterator[None]:
    """Before and after the test the same container serves the same release."""
    before = container(), release(host)
    assert answer() == SUM["expect"]
    yield
    assert (container(), release(host)) == before
    assert answer() == SUM["expect"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_stopped(name: str, play: Play, untouched: None) -> None:
    settings, line = REFUSED[name]
    run = play(**settings)
    assert run.code != 0
    assert run.line(line)
    assert run.recap("changed") == 0


def test_a_switch_can_be_looked_at_first(host: Host, play: Play, untouched: None) -> None:
    run = play("--check", "--diff", glm_engine="vllm")
    assert run.code == 0, run.messages
    assert f"-link to releases/{release(host)['id']}" in run.output


def test_a_switch_that_is_not_verified_is_taken_back(host: Host, play: Play) -> None:
    before = release(host)
    run = play(
        glm_engine="vllm",
        glm_benchmark="none",
        glm_verify_expectations={"sum": {"expect": "43"}},
        seconds=400,
    )
    assert run.code != 0
    line = rf"{NODE}: release [0-9a-f]{{12}} failed: (?:.*; )?sum: .*wanted '43'.*; release {before['id']} serves again"
    assert re.fullmatch(line, run.messages[-1]), run.messages
    assert release(host) == before
    assert answer() == SUM["expect"]
    said = report()
    assert (said["ok"], said["engine"]) == (False, "vllm")  # what was asked for, and is not served
    assert said["reason"] in run.messages[-1]
    assert said["outage_s"] > 0


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_switch_is_verified_and_its_outage_reported(engine: str, host: Host, play: Play) -> None:
    assert release(host)["engine"] != engine
    run = play(glm_engine=engine, seconds=400)
    assert run.code == 0, run.messages
    assert release(host)["engine"] == engine
    assert answer() == SUM["expect"]
    said = report()
    assert (said["ok"], said["engine"], said["benchmark"]["failed"]) == (True, engine, 0)
    assert 0 < said["outage_s"] < 400
    again = play(glm_engine=engine, glm_benchmark="none")
    assert (again.code, again.recap("changed")) == (0, 0)
