"""engines/*/parse.py over stubs of the engines' packages, laid out as the releases are; and what the role does with it.

tests/upstream looks the names up in the releases' real source, tests/images runs the programs in the engines' images.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "engines/vllm/parse.py"
PLACES: dict[str, tuple[str, ...]] = next(
    ast.literal_eval(node.value)
    for node in ast.parse(PROGRAM.read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PLACES"
)
CLI = """
def make_arg_parser(parser):
    from vllm.platforms import current_platform
    if not current_platform.device_type:
        raise RuntimeError("Failed to infer device type")
    for flag in ("--model", "--tool-call-parser", "--reasoning-parser", "--tool-parser-plugin", "--chat-template"):
        parser.add_argument(flag)
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    return parser

def validate_parsed_serve_args(arguments):
    assert arguments.chat_template is None
    if arguments.enable_auto_tool_choice and not arguments.tool_call_parser:
        raise TypeError("Error: --enable-auto-tool-choice requires --tool-call-parser")
"""
STUBS = {
    "vllm.platforms": "class Platform:\n    device_type = ''\ncurrent_platform = Platform()\n",
    "vllm.utils.argparse_utils": "from argparse import ArgumentParser as FlexibleArgumentParser\n",
    "vllm.tool_parsers": "class ToolParserManager:\n    list_registered = staticmethod(lambda: ['glm47', 'glm45'])\n",
    "vllm.reasoning": "class ReasoningParserManager:\n    list_registered = staticmethod(lambda: ['glm45'])\n",
}


def lay_out(folder: Path, modules: dict[str, str]) -> None:
    for name, text in modules.items():
        path = folder / name.replace(".", "/")
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(text)
        for parent in path.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()


def parse(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", PROGRAM.read_text(), *arguments]
    done = subprocess.run(command, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture(params=PLACES["make_arg_parser"])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    lay_out(tmp_path, {**STUBS, request.param: CLI})
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--model /m --tool-call-parser glm47 --reasoning-parser glm45 --enable-auto-tool-choice", 0, ""),
        ("--model /m --no-such-flag", 2, "error: unrecognized arguments: --no-such-flag"),
        ("--tool-call-parser glm74", 2, "--tool-call-parser: invalid choice: 'glm74' (choose from glm45, glm47)"),
        ("--reasoning-parser glm54", 2, "--reasoning-parser: invalid choice: 'glm54' (choose from glm45)"),
        ("--tool-call-parser mine --tool-parser-plugin /mine.py", 0, ""),
        ("--enable-auto-tool-choice", 2, "error: Error: --enable-auto-tool-choice requires --tool-call-parser"),
        ("--chat-template /models/chat_template.jinja", 0, ""),
    ],
)
def test_each_layout(package: Path, arguments: str, code: int, said: str) -> None:
    assert parse(package, *arguments.split()) == (
        code,
        f"vllm serve: error: argument {said}" if said[:2] == "--" else said and f"vllm serve: {said}",
    )


def test_an_unknown_layout_is_told_from_wrong_arguments(tmp_path: Path) -> None:
    lay_out(tmp_path, {**STUBS, "vllm.entrypoints.elsewhere.cli_args": CLI})
    code, said = parse(tmp_path, "--model", "/m")
    assert code == 3
    assert "this release of vLLM has no vllm.entrypoints.common.cli_args" in said


def test_a_module_that_lacks_something_is_not_taken_for_another_layout(tmp_path: Path) -> None:
    lay_out(tmp_path, {**STUBS, PLACES["make_arg_parser"][-1]: "import libcuda_is_not_here\n" + CLI})
    assert parse(tmp_path, "--model", "/m") == (3, "ModuleNotFoundError: No module named 'libcuda_is_not_here'")


PLAY = """
- hosts: all
  connection: local
  gather_facts: false
  environment: {PATH: "PROGRAMS:{{ lookup('env', 'PATH') }}"}
  vars:
    inference_service_parse_timeout: 20
    inference_service_gpu_device: nvidia.com/gpu=all
    inference_service_image: {ref: "vllm/vllm-openai:new", pull_ref: "vllm/vllm-openai@sha256:0"}
    inference_service_engine: {name: vllm}
    inference_service_profile_name: reference
    inference_service_release: {flags: [--model, /m]}
  tasks:
    - ansible.builtin.include_role: {name: glm.fleet.inference_service, tasks_from: parse}
    - ansible.builtin.copy: {dest: NOTES, content: "{{ inference_service_notes | default([]) | to_json }}"}
"""


@pytest.mark.parametrize(
    ("code", "said", "notes"),
    [
        (0, "", []),
        (3, "ImportError: no parser", ["status 3, ImportError: no parser"]),
        (124, "", ["status 124"]),
        (2, "usage: of another program", ["status 2, usage: of another program"]),
    ],
)
def test_the_role_notes_what_it_could_not_check(tmp_path: Path, code: int, said: str, notes: list[str]) -> None:
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {code}\n" if said else f"#!/bin/sh\nexit {code}\n")
    docker.chmod(0o755)
    play = tmp_path / "play.yml"
    play.write_text(PLAY.replace("PROGRAMS", str(docker.parent)).replace("NOTES", str(tmp_path / "notes.json")))
    program = str(Path(sys.executable).parent / "ansible-playbook")
    done = subprocess.run([program, str(play), "-i", "n1,"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    start = "the engine's arguments were not checked before the start, vllm/vllm-openai:new could not read them: "
    assert json.loads((tmp_path / "notes.json").read_text()) == [start + note for note in notes]
    assert all(note in done.stdout for note in notes)
