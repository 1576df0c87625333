"""Every role says what its variables are, and the documents made from that are fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "role_docs.py"
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if (path / "tasks").is_dir())
NAMES = [path.name for path in ROLES]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def specs(role: Path) -> dict[str, dict[str, Any]]:
    return dict(load(role / "meta" / "argument_specs.yml").get("argument_specs", {}))


def role_docs(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--root", str(root), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("role", ROLES, ids=NAMES)
def test_defaults_and_specs_have_the_same_keys(role: Path) -> None:
    defaults = load(role / "defaults" / "main.yml")
    options = {name: option for entry in specs(role).values() for name, option in (entry.get("options") or {}).items()}
    required = {name for name, option in options.items() if option.get("required")}
    assert set(defaults) == set(options) - required, "a variable has a default and a spec, or is required"


@pytest.mark.parametrize("role", ROLES, ids=NAMES)
def test_defaults_in_the_specs_are_the_defaults(role: Path) -> None:
    defaults = load(role / "defaults" / "main.yml")
    for entry in specs(role).values():
        for name, option in (entry.get("options") or {}).items():
            if "default" in option:
                assert option["default"] == defaults[name], name


@pytest.mark.parametrize("role", ROLES, ids=NAMES)
def test_variables_carry_the_roles_name_and_say_what_they_mean(role: Path) -> None:
    entries = specs(role)
    assert "main" in entries
    for entry in entries.values():
        for name, option in (entry.get("options") or {}).items():
            assert name.startswith(f"{role.name}_"), name
            assert option.get("description"), name


def test_generated_documents_are_fresh() -> None:
    done = role_docs(ROOT, "--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    role = tmp_path / "roles" / "sample"
    for name, text in {
        "meta/main.yml": "galaxy_info: {description: Does one thing}",
        "defaults/main.yml": "sample_mode: a\nsample_size: {width: 1}\n",
        "meta/argument_specs.yml": """
argument_specs:
  main:
    short_description: Does one thing
    description: [It does it with C(care).]
    options:
      sample_mode: {description: 'This | that.', choices: [a, b]}
      sample_size:
        description: How large.
        type: dict
        options: {width: {description: How wide., type: int, required: true}}
      sample_name: {description: Its name., required: true}
  other: {short_description: Does another}
""",
    }.items():
        (role / name).parent.mkdir(parents=True, exist_ok=True)
        (role / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_readme_is_made_from_the_spec(project: Path) -> None:
    assert role_docs(project).returncode == 0
    text = (project / "roles" / "sample" / "README.md").read_text(encoding="utf-8")
    for line in (
        "# Role sample",
        "- It does it with `care`.",
        '| `sample_mode` | str | `"a"` | This \\| that. One of `a`, `b`. |',
        '| `sample_size` | dict | `{"width": 1}` | How large. |',
        "| `sample_size.width` | int | required | How wide. |",
        "| `sample_name` | str | required | Its name. |",
        "## tasks_from: other",
    ):
        assert f"{line}\n" in text, text
    assert "sample_mode" in (project / "docs" / "variables.md").read_text(encoding="utf-8")


def test_a_stale_document_is_named(project: Path) -> None:
    role_docs(project)
    assert role_docs(project, "--check").returncode == 0
    defaults = project / "roles" / "sample" / "defaults" / "main.yml"
    defaults.write_text("sample_mode: b\nsample_size: {width: 1}\n", encoding="utf-8")
    done = role_docs(project, "--check")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "roles/sample/README.md is stale: run tools/role_docs.py",
        "docs/variables.md is stale: run tools/role_docs.py",
    ]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_private_fact_is_of_one_role(role: Path) -> None:
    """Of others a role reads documented facts and options alone, and so do playbooks, filters and the callback."""
    paths = [path for other in ROLES if other != role for path in other.rglob("*.yml")]
    paths += [
        *(ROOT / "playbooks").glob("*.yml"),
        *(ROOT / "plugins").glob("*/*.py"),
        *(ROOT / "glm_fleet").glob("*.py"),
    ]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in re.findall(rf"(?<!\w)__{role.name}_?\w*", path.read_text(encoding="utf-8"))
    }
    assert found == set()


def made_by(node: Any) -> set[str]:
    """The facts that tasks leave behind: set or registered, however deep."""
    if isinstance(node, list):
        return {name for value in node for name in made_by(value)}
    if not isinstance(node, dict):
        return set()
    names = set(node.get("ansible.builtin.set_fact", {})) | {node.get("register", "")}
    return {str(name) for name in names if name}.union(*(made_by(value) for value in node.values()))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_the_facts_that_others_may_read_are_documented(role: Path) -> None:
    made = {name for path in (role / "tasks").glob("*.yml") for name in made_by(load(path))}
    documented = set(load(role / "meta" / "facts.yml"))
    options = {name for spec in specs(role).values() for name in spec.get("options", {})}
    assert {name for name in made if not name.startswith("__")} - options == documented
