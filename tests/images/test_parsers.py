"""Every profile's command line, read by the engine's own parser in the engine's image: no flag is unknown to it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import release
import yaml

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
# Reads {name: arguments} and writes {name: what the parser says}; empty where it takes them.
PARSE = """
import contextlib, io, json, sys
%s
answers = {}
for name, arguments in json.load(sys.stdin).items():
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(arguments)
        answers[name] = ""
    except SystemExit:
        answers[name] = said.getvalue().strip().splitlines()[-1]
print(json.dumps(answers))
"""
PARSERS = {
    "vllm": """
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
def parse(arguments):
    validate_parsed_serve_args(parser.parse_args(arguments))
""",
    "sglang": """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
parse = parser.parse_args
""",
}
UNKNOWN = "--no-such-flag"


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return data


@functools.cache
def answers(engine: str) -> dict[str, str]:
    """What the engine's parser says of each of its profiles, and of one with a flag that there is not."""
    data = load(ENGINES / f"{engine}.yml")
    lines = {
        path.stem: release.engine_flags(data, load(path), SETTINGS) for path in PROFILES if path.parts[-3] == engine
    }
    lines[UNKNOWN] = [*lines["reference"], UNKNOWN]
    socket = os.environ.get("DOCKER_HOST", "") or os.access("/var/run/docker.sock", os.W_OK)
    command = [*([] if socket else ["sudo", "-n"]), "docker", "run", "--rm", "-i", "--entrypoint", "python3"]
    command += ["--network", "none", IMAGES[engine], "-W", "ignore", "-c", PARSE % PARSERS[engine]]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_profile(path: Path) -> None:
    assert answers(path.parts[-3])[path.stem] == ""


@pytest.mark.parametrize("engine", IMAGES)
def test_an_unknown_flag_is_named(engine: str) -> None:
    assert UNKNOWN in answers(engine)[UNKNOWN]
