"""What no play may say, and that every setting is one of the specification."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = [ROOT / "site.yml", *sorted((ROOT / "playbooks").glob("*.yml"))]
# They do not do what they say: with a rescue, with an unreachable node or in batches the run goes on, or healthy nodes
# are cut off in the middle (ansible#86574).
DECEPTIVE = {"max_fail_percentage", "any_errors_fatal", "ignore_errors", "ignore_unreachable", "strategy"}


def keys(node: Any) -> set[str]:
    """Every key of a YAML document, however deep."""
    if isinstance(node, dict):
        return {str(key) for key in node} | {key for value in node.values() for key in keys(value)}
    if isinstance(node, list):
        return {key for value in node for key in keys(value)}
    return set()


@pytest.mark.parametrize(
    "path",
    [*PLAYBOOKS, *sorted((ROOT / "roles").glob("*/tasks/*.yml"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_keyword_is_used_that_does_not_do_what_it_says(path: Path) -> None:
    assert not keys(yaml.safe_load(path.read_text())) & DECEPTIVE


def folded(node: yaml.Node) -> Iterator[str]:
    """The texts that are written to be one line."""
    if isinstance(node, yaml.ScalarNode) and node.style == ">" and "{{" in node.value:
        yield node.value
    for child in node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []:
        for part in child if isinstance(child, tuple) else (child,):
            yield from folded(part)


@pytest.mark.parametrize(
    "path",
    [*PLAYBOOKS, *sorted((ROOT / "roles").glob("*/tasks/*.yml"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_a_folded_text_is_one_line(path: Path) -> None:
    """YAML keeps the line breaks around a line that is indented more."""
    document = yaml.compose(path.read_text())
    for text in folded(document) if document else []:
        assert "\n" not in re.sub(r"\{\{.*?\}\}", "", text, flags=re.S).strip()


GATE = """
- hosts: nodes
  gather_facts: false
  tasks: [{ansible.builtin.fail: {msg: lost}, when: inventory_hostname == 'lost'}]
- hosts: nodes
  gather_facts: false
  serial: [2, 1]
  vars: {rollout_max_failures: 3}
  tasks:
    - ansible.builtin.include_role: {name: glm.fleet.rollout, tasks_from: begin_wave}
      when: inventory_hostname == 'next'
    - ansible.builtin.set_fact: {FACT: true}
      when: inventory_hostname == 'canary'
    - ansible.builtin.fail: {msg: the gate}
      when: inventory_hostname == 'canary'
"""


@pytest.mark.parametrize(
    ("fact", "said"), [("rollout_stop", "glm_stop_file asks"), ("rollout_denied", "nobody said yes")]
)
def test_no_wave_follows_a_no_where_a_node_had_failed_before(tmp_path: Path, fact: str, said: str) -> None:
    """Ansible itself takes only a wave whose hosts have all failed within it for the end."""
    play = tmp_path / "play.yml"
    play.write_text(GATE.replace("FACT", fact))
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("{nodes: {hosts: {lost: , canary: , next: }}}")
    command = [str(Path(sys.executable).parent / "ansible-playbook"), str(play), "-i", str(inventory)]
    run = subprocess.run([*command, "-c", "local"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert re.search(f"msg: .*next: its turn did not come.*{said}", run.stdout), run.stdout


@pytest.mark.parametrize(
    ("playbook", "refuses"),
    [
        ("site.yml", True),
        ("playbooks/plan.yml", True),
        *((f"playbooks/{name}.yml", False) for name in ("rollback", "verify", "status")),
    ],
)
def test_flags_are_refused_where_a_release_is_made_and_nowhere_else(
    playbook: str, refuses: bool, tmp_path: Path
) -> None:
    """A node can be looked at and taken back whatever the inventory wants of the next release."""
    inventory = tmp_path / "hosts.yml"
    settings = {"glm_port": 8002, "glm_engine_extra_args": {"--max-model-len": 131_000}}
    hosts = {"node-a": {"ansible_host": "127.0.0.1", "ansible_port": 1}}  # nobody listens there
    inventory.write_text(yaml.safe_dump({"nodes": {"hosts": hosts, "vars": settings}}))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), playbook, "-i", str(inventory)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    said = "unreachable=0" if refuses else "unreachable=1"
    assert said in run.stdout
    assert ("the engine cannot be started like this" in run.stdout + run.stderr) is refuses
    assert ("8002 is the port after" in run.stdout + run.stderr) is refuses


def test_settings_that_are_used_are_those_that_are_specified() -> None:
    spec = yaml.safe_load((ROOT / "roles/glm/meta/argument_specs.yml").read_text())
    known = set(spec["argument_specs"]["main"]["options"])
    readers = [ROOT / "roles/glm/vars/main.yml", ROOT / "plugins/filter/rollout.py"]
    texts = [path.read_text() for path in [*PLAYBOOKS, *readers]]
    texts += [path.read_text() for path in (ROOT / "roles/glm/tasks").glob("*.yml")]
    used = set(re.findall(r"(?<![\w-])glm_[a-z_]+", "\n".join(texts)))
    used -= {"glm_waves"}  # a group
    assert used - known == set(), "used, but in no specification"
    assert known - used == set(), "specified, but nobody reads it"
