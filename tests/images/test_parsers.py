"""Every profile's command line, read by the engine's own parser in the engine's image: no flag is unknown to it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import release

ENGINES = Path(__file__).resolve().parents[2] / "engines"
PROFILES = sorted(ENGINES.glob("*/profiles/*.yml"))
SETTINGS: dict[str, Any] = {
    "model": "/models/zai-org/GLM-5.2-FP8",
    "served_model_names": ["glm-5.2-fp8"],
    "host": "127.0.0.1",
    "port": 8001,
    "shutdown_timeout": 120,
}
IMAGES = {"vllm": "vllm/vllm-openai:glm52-cu129", "sglang": "lmsysorg/sglang:latest-cu129"}
UNKNOWN = "--no-such-flag"


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return data


def answer(engine: str, arguments: list[str]) -> str:
    """What the engine's parser says, as a run of site.yml asks it; empty where it takes them."""
    socket = os.environ.get("DOCKER_HOST", "") or os.access("/var/run/docker.sock", os.W_OK)
    command = [*([] if socket else ["sudo", "-n"]), "docker", "run", "--rm", "--entrypoint", "python3"]
    command += ["--network", "none", IMAGES[engine], "-W", "ignore", "-c", (ENGINES / engine / "parse.py").read_text()]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    said = (done.stderr.strip().splitlines() or [""])[-1]
    assert done.returncode in (0, 2), said
    return said if done.returncode else ""


def line(engine: str, profile: str) -> list[str]:
    path = ENGINES / engine / "profiles" / f"{profile}.yml"
    arguments: list[str] = release.engine_flags(load(ENGINES / f"{engine}.yml"), load(path), SETTINGS)
    return arguments


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_profile(path: Path) -> None:
    assert answer(path.parts[-3], line(path.parts[-3], path.stem)) == ""


@pytest.mark.parametrize("engine", IMAGES)
def test_an_unknown_flag_is_named(engine: str) -> None:
    assert UNKNOWN in answer(engine, [*line(engine, "reference"), UNKNOWN])


@pytest.mark.parametrize("engine", IMAGES)
@pytest.mark.parametrize(("flag", "name"), [("--tool-call-parser", "glm47"), ("--reasoning-parser", "glm45")])
def test_an_unknown_parser_is_named_with_the_known_ones(engine: str, flag: str, name: str) -> None:
    wrong = [f"no-{name}" if word == name else word for word in line(engine, "reference")]
    said = answer(engine, wrong)
    assert f"argument {flag}: invalid choice: 'no-{name}'" in said
    assert name in said.partition("choose from")[2]


def test_arguments_that_do_not_go_together() -> None:
    alone = [word for word in line("vllm", "reference") if word not in ("--tool-call-parser", "glm47")]
    assert "requires --tool-call-parser" in answer("vllm", alone)
