"""No setting of the user is lost: each, set in an inventory, changes what a role is given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"
SPEC = yaml.safe_load((ROLES / "glm/meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
DEFAULTS = yaml.safe_load((ROLES / "glm/defaults/main.yml").read_text())
MAPPED = [name for name in yaml.safe_load((ROLES / "glm/vars/main.yml").read_text()) if not name.startswith("__")]
# Values of which the type alone says too little.
VALUES: dict[str, Any] = {
    "glm_engine": "sglang",
    "glm_profile": "agentic",
    "glm_driver_branch": 580,
    "glm_rollout_waves": [2],
    "glm_rollout_min_available": "50%",
    "glm_engine_extra_args": {"--max-num-seqs": 8},
    "glm_engine_extra_env": {"NAME": "value"},
    "glm_container_ulimits": {"nofile": 1},
    "glm_metrics": True,
    "glm_metrics_sources": ["198.51.100.9"],
    "glm_verify_expectations": {"sum": {"expect": "ok"}},
    "glm_benchmark_quick": {"input_len": 1, "output_len": 1, "num_prompts": 1, "max_concurrency": 1},
}
# What the roles find out, of a node that has everything.
FACTS = {
    "engine_image_resolved": {"ref": "x:1", "pull_ref": "x@sha256:1", "digest": "sha256:1", "cuda": "13.0",
                              "registry": "docker.io", "path": "x", "manifests": []},
    "model_weights_manifest": {"sha256": "1", "context_length": 4096},
    "__glm_share_addresses": {"a": "192.0.2.1", "b": "192.0.2.2"},
    "preflight_node": {"memory_bytes": 1 << 40},
    "preflight_gpu": {"driver": {"version": "570.211.01"}},
    "nvidia_driver_plan": {"findings": [], "action": "nothing"},
    "inference_service_release": {"id": "1", "model_path_in_container": "/models/x"},
}  # fmt: skip
PLAY = """
- hosts: nodes
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact: {__glm_engines: [], __glm_engines_directory: x, __glm_started: x}
    - ansible.builtin.set_fact: FACTS
    - ansible.builtin.import_role: {name: glm.fleet.glm, tasks_from: engine, rolespec_validate: false}
    - ansible.builtin.template: {src: DIRECTORY/all.j2, dest: "DIRECTORY/{{ inventory_hostname }}.json"}
"""


def other(name: str) -> Any:
    """A value that is not the default."""
    default, kind = DEFAULTS[name], SPEC[name].get("type", "str")
    if name in VALUES:
        return VALUES[name]
    if choices := [choice for choice in SPEC[name].get("choices", []) if choice != default]:
        return choices[0]
    return {"bool": not default, "int": int(default or 0) + 1 if kind == "int" else 0, "float": 0.5}.get(kind, "/other")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the roles are given, by the setting that a host has changed; of `nothing` by the defaults."""
    directory = tmp_path_factory.mktemp("settings")
    hosts: dict[str, Any] = {"nothing": {}} | {name: {name: other(name)} for name in DEFAULTS}
    for host in hosts.values():
        host["ansible_host"] = "192.0.2.1"
    (directory / "hosts.yml").write_text(yaml.safe_dump({"nodes": {"hosts": hosts}}))
    (directory / "all.j2").write_text(
        "{" + ",".join(f'"{name}": {{{{ {name} | to_json }}}}' for name in MAPPED) + "}\n"
    )
    play = PLAY.replace("DIRECTORY", str(directory)).replace("FACTS", json.dumps(FACTS))
    (directory / "play.yml").write_text(play)
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "ansible-playbook"), directory / "play.yml"),
            *("-i", directory / "hosts.yml", "-c", "local"),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    texts = {name: (directory / f"{name}.json").read_text() for name in hosts}
    # The host's own name is no difference.
    return {name: json.loads(text.replace(f'"{name}"', '"HOST"')) for name, text in texts.items()}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_setting_reaches_a_role(given: dict[str, dict[str, Any]], name: str) -> None:
    before, now = given["nothing"], given[name]
    if name == "glm_node_address":  # of all nodes, to whoever configures a gateway
        assert "/other" in [server["address"] for server in now["rollout_backends_wanted"]]
    else:
        assert [option for option in MAPPED if now[option] != before[option]], "no role is told of it"


def test_the_image_is_counted_where_the_docker_that_is_installed_keeps_it(given: dict[str, dict[str, Any]]) -> None:
    assert given["nothing"]["preflight_docker_directory"] == "/var/lib/containerd"
    assert given["glm_docker_source"]["preflight_docker_directory"] == "/var/lib/docker"


@pytest.mark.parametrize("role", sorted(path.name for path in ROLES.iterdir() if path.name != "glm"))
def test_what_a_role_is_given_it_uses(role: str) -> None:
    files = [path for path in (ROLES / role).rglob("*.yml") if path.parts[-2] in ("tasks", "vars")]
    files += [*(ROOT / "templates").rglob("*.j2"), *(ROOT / "engines").rglob("*.yml")]
    texts = "\n".join(path.read_text() for path in files)
    options = yaml.safe_load((ROLES / role / "defaults/main.yml").read_text()) or {}
    assert [name for name in options if not re.search(rf"\b{name}\b", texts)] == []
