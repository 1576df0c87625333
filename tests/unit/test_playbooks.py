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


def tasks_in(node: Any) -> Iterator[dict[str, Any]]:
    """Every task of a file, however deep."""
    if isinstance(node, list):
        for value in node:
            yield from tasks_in(value)
    elif isinstance(node, dict):
        yield node
        for name in ("block", "rescue", "always", "tasks"):
            yield from tasks_in(node.get(name) or [])


def lockers() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Tasks that want a lock of apt or dpkg, each with the words of its command."""
    for path in sorted((ROOT / "roles").glob("*/tasks/*.yml")):
        for task in tasks_in(yaml.safe_load(path.read_text())):
            name = f"{path.relative_to(ROOT / 'roles')}: {task.get('name')}"
            argv = str(task.get("ansible.builtin.command", {}).get("argv", ""))
            if "ansible.builtin.apt" in task or re.search(r"apt-get|apt-mark|dpkg", argv):
                yield name, task, argv


@pytest.mark.parametrize(("task", "argv"), [pytest.param(task, argv, id=name) for name, task, argv in lockers()])
def test_who_wants_apts_lock_waits_for_it(task: dict[str, Any], argv: str) -> None:
    """Unattended upgrades hold it for minutes. Only `apt-get install` knows how to wait by itself."""
    if "ansible.builtin.apt" in task:
        assert task["ansible.builtin.apt"]["lock_timeout"] == 600
    elif "'install'" in argv:
        assert "DPkg::Lock::Timeout=600" in argv
    else:
        assert "lock" in task["until"] and task["retries"] * task["delay"] == 600


def test_the_fabrics_modules_are_loaded_between_their_packages_and_the_fabric_manager() -> None:
    """On Ubuntu the transaction brings the package that holds ib_umad; the fabric manager does not start without."""
    tasks = ROOT / "roles/nvidia_driver/tasks"
    included = [task["ansible.builtin.include_tasks"] for task in yaml.safe_load((tasks / "apply.yml").read_text())]
    assert included == ["install.yml", "modules.yml", "services.yml"]
    assert "modules.yml" not in (tasks / "install.yml").read_text()


def test_a_waves_proxy_is_installed_before_the_first_wave() -> None:
    """A wave that waits for apt's lock, or fails by it, does so with fewer nodes in rotation."""
    text = (ROOT / "roles/rollout/tasks/prepare.yml").read_text()
    roles = [task.get("ansible.builtin.include_role", {}) for task in yaml.safe_load(text)]
    assert {"name": "glm.fleet.gateway", "tasks_from": "install"} in roles


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
    readers = [
        ROOT / "roles/glm/vars/main.yml",
        ROOT / "plugins/filter/rollout.py",
        ROOT / "plugins/plugin_utils/edges.py",
    ]
    texts = [path.read_text() for path in [*PLAYBOOKS, *readers]]
    texts += [path.read_text() for path in (ROOT / "roles/glm/tasks").glob("*.yml")]
    used = set(re.findall(r"(?<![\w-])glm_[a-z_]+", "\n".join(texts)))
    used -= {"glm_waves"}  # a group
    assert used - known == set(), "used, but in no specification"
    assert known - used == set(), "specified, but nobody reads it"
