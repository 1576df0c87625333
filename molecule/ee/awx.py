"""Jobs as AWX runs them: a fresh checkout, credentials by its injectors, ansible-playbook in the execution environment.

AWX itself is not here. Stood in for is what it does before a job: it renders a credential type's injectors with Jinja
into files of mode 0600 and extra variables, hands the SSH key to an agent, and says the job's number.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from machines import Machine
from testbed import ROOT, Run

IMAGE = "glm-fleet-ee:test"  # by `make ee-test`
NAVIGATOR = ROOT / ".cache/ee/bin/ansible-navigator"
TYPES = {kind["name"]: kind for kind in yaml.safe_load((ROOT / "ee/awx-credential-types.yml").read_text())}
# ansible-runner's callback puts an event before and after each line, and takes it off a terminal again.
EVENT = re.compile(r"\x1b\[K[A-Za-z0-9+/=]*\x1b\[\d+D\x1b\[K")


def checkout(place: Path, *paths: str) -> Path:
    """The files that git has of this project, or would take; with `paths` those under them alone."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths]
    for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file() | (ROOT / name).is_symlink() and name != ".venv":
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    return place


@dataclass
class Job:
    """One job: its private directory is its own, as its checkout is."""

    project: Path
    private: Path
    image: str
    agent: str = ""  # the socket of an SSH agent that has the key
    variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.private.mkdir(mode=0o700)

    def file(self, name: str, text: str) -> Path:
        path = self.private / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    def credential(self, kind: str, **values: str) -> None:
        """A credential of a custom type, injected."""
        wanted = TYPES[kind]
        assert values.keys() == {entry["id"] for entry in wanted["inputs"]["fields"]}
        jinja = ImmutableSandboxedEnvironment()
        injectors = wanted["injectors"]
        content = jinja.from_string(injectors["file"]["template"]).render(**values)
        tower = SimpleNamespace(filename=self.file(kind.replace(" ", "-"), content))
        for name, template in injectors["extra_vars"].items():
            self.variables[name] = jinja.from_string(template).render(**values, tower=tower)

    def run(self, playbook: str, *arguments: str, seconds: int = 900) -> Run:
        extra = self.file("extra-vars.yml", yaml.safe_dump(self.variables))
        command = [
            *(str(NAVIGATOR), "run", playbook, "-i", "inventory/demo", "-e", f"@{extra}", *arguments),
            *("--mode", "stdout", "--execution-environment", "true", "--container-engine", "docker"),
            *("--execution-environment-image", self.image, "--pull-policy", "never"),
            *("--container-options=--network=host", "--playbook-artifact-enable", "false"),
            *("--log-file", str(self.private / "navigator.log")),
            f"--execution-environment-volume-mounts={self.private}:{self.private}",
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "SSH_"))}
        environment |= {"SSH_AUTH_SOCK": self.agent} if self.agent else {}
        done = subprocess.run(
            command,
            cwd=self.project,
            env=environment | {"NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Run(done.returncode, EVENT.sub("", done.stdout), EVENT.sub("", done.stderr))


NewJob = Callable[..., Job]


@dataclass
class Demo:
    """The node, and what an operator of AWX enters as credentials."""

    node: Machine
    known_hosts: str
    agent: str
    key: str
