"""The questions with the changes of a user or of an installed release, in today's shape and in the old one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import questions

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS: dict[str, Any] = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())
WEATHER = QUESTIONS["tool_call"]["tools"][0]
TIME = {"name": "get_time", "parameters": {"type": "object"}}

CHANGES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "of today": ({"sum": {"expect": "43"}}, {"sum": {"expect": "43"}}),
    "other arguments": (
        {"tool_call": {"prompt": "And in Rome?", "expect_arguments": {"city": "Rome"}}},
        {
            "tool_call": {
                "prompt": "And in Rome?",
                "tools": [WEATHER],
                "expect_calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}],
            }
        },
    ),
    "another name of the tool": (
        {"tool_call": {"tool": {"name": "weather"}}},
        {
            "tool_call": {
                "tools": [{**WEATHER, "name": "weather"}],
                "expect_calls": [{"name": "weather", "arguments": {"city": "Paris"}}],
            }
        },
    ),
    "the calls of today win": (
        {"tool_call": {"expect_arguments": {"city": "Rome"}, "expect_calls": []}},
        {"tool_call": {"tools": [WEATHER], "expect_calls": []}},
    ),
    "short prompts": ({"find_fact": {"repeat": 24}}, {"find_fact": {"tokens": 384}}),
    "one filler": ({"find_fact": {"filler": "Trucks arrive."}}, {"find_fact": {"filler": ["Trucks arrive."]}}),
    "the agent's tool": (
        {"agent": {"tool": {"name": "Shell"}, "repeat": 12}},
        {"agent": {"tools": [{**QUESTIONS["agent"]["tools"][0], "name": "Shell"}], "repeat": 12}},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_have_the_shape_of_today(name: str) -> None:
    given, wanted = CHANGES[name]
    before = json.dumps(QUESTIONS)
    expected = {name: {**question, **wanted.get(name, {})} for name, question in QUESTIONS.items()}
    assert questions.with_changes(QUESTIONS, given) == expected
    assert json.dumps(QUESTIONS) == before
    assert questions.question_problems(given, QUESTIONS) == [], "what worked before is not refused"


def test_a_question_of_a_later_release_is_no_harm() -> None:
    assert questions.with_changes(QUESTIONS, {"later": {"expect": "ok"}}) == {**QUESTIONS, "later": {"expect": "ok"}}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"exact_replay": {"expect": "43"}}, "there is no question exact_replay: did you mean exact_reply?"),
        ({"sum": {"expects": "43"}}, "sum has no expects: did you mean expect?"),
        ({"sum": {"repeat": 3}}, "sum has no repeat: remove it, or see roles/verify/files/questions.yml"),
        ({"sum": "43"}, "sum is '43': write a mapping such as {expect: ...}"),
    ],
)
def test_what_nobody_reads_is_refused_in_one_line(given: dict[str, Any], line: str) -> None:
    assert questions.question_problems(given, QUESTIONS) == [f"glm_verify_expectations: {line}"]


PLAY = """
- hosts: localhost
  gather_facts: false
  vars_files: [{root}/roles/verify/vars/main.yml, {root}/roles/clients/vars/main.yml]
  vars:
    role_path: {root}/roles/clients
    verify_questions: &old {{tool_call: {{expect_arguments: {{city: Rome}}}}}}
    clients_questions: *old
  tasks:
    - ansible.builtin.copy:
        content: "{{{{ [__verify_questions, __clients_questions] }}}}"
        dest: {directory}/told.json
        mode: "0600"
"""


def test_both_roles_that_ask_take_changes_in_the_old_shape(tmp_path: Path) -> None:
    play = tmp_path / "play.yml"
    play.write_text(PLAY.format(root=ROOT, directory=tmp_path))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/questions.yml").write_text((ROOT / "roles/verify/files/questions.yml").read_text())
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local", str(play)]
    command += ["-e", f"ansible_python_interpreter={sys.executable}", "-e", "ansible_become=false"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout
    for told in json.loads((tmp_path / "told.json").read_text()):
        assert told["tool_call"]["expect_calls"][0]["arguments"] == {"city": "Rome"}
