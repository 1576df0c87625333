"""Templates of the release and the unit, rendered by Ansible as the role does, read by the programs they are for."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import starts
from exposure import MOST, exposure

ROOT = Path(__file__).resolve().parents[2]
DIGEST = "sha256:" + "ab" * 32

PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  vars_files:
    - "{root}/roles/inference_service/defaults/main.yml"
    - "{root}/roles/inference_service/vars/main.yml"
    - vars.yml
  vars: {{role_path: "{root}/roles/inference_service"}}
  tasks:
    - ansible.builtin.include_tasks: "{root}/roles/inference_service/tasks/settings.yml"
    - ansible.builtin.set_fact:
        rendered:
          id: "{{{{ inference_service_release.id }}}}"
          run: "{{{{ inference_service_release.run }}}}"
          env: "{{{{ __inference_service_env_file }}}}"
          release: "{{{{ lookup('ansible.builtin.template', '{root}/templates/release.json.j2') }}}}"
          unit: "{{{{ lookup('ansible.builtin.template', '{root}/templates/glm-engine.service.j2') }}}}"
          watchdog: "{{{{ lookup('ansible.builtin.template', '{root}/templates/glm-watchdog.service.j2') }}}}"
          timer: "{{{{ lookup('ansible.builtin.template', '{root}/templates/glm-watchdog.timer.j2') }}}}"
    - ansible.builtin.copy: {{content: "{{{{ rendered | to_json }}}}", dest: "{out}", mode: "0600"}}
"""


def render(directory: Path, engine: str, **changes: Any) -> dict[str, str]:
    variables: dict[str, Any] = {
        "inference_service_engine": yaml.safe_load((ROOT / f"engines/{engine}.yml").read_text()),
        "inference_service_profile": yaml.safe_load((ROOT / f"engines/{engine}/profiles/reference.yml").read_text()),
        "inference_service_profile_name": "reference",
        "inference_service_image": {
            "ref": "vllm/vllm-openai:glm52-cu129",
            "digest": DIGEST,
            "pull_ref": f"vllm/vllm-openai@{DIGEST}",
        },
        "inference_service_model": "zai-org/GLM-5.2-FP8",
        "inference_service_model_revision": "1" * 40,
        "inference_service_model_dir": f"/var/lib/glm/models/zai-org--GLM-5.2-FP8/{'1' * 40}",
        "inference_service_weights_sha256": "cd" * 32,
        "inference_service_served_model_names": ["glm-5.2-fp8"],
        "inference_service_base_dir": str(directory / "opt"),
        **changes,
    }
    (directory / "vars.yml").write_text(yaml.safe_dump(variables, sort_keys=False))
    (directory / "play.yml").write_text(PLAY.format(root=ROOT, out=directory / "out.json"))
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", directory / "play.yml"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_BECOME": "false"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rendered: dict[str, str] = json.loads((directory / "out.json").read_text())
    return rendered


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("vllm")
    return {
        **render(directory, "vllm", inference_service_extra_env={"TOKEN": "it's; $HOME"}),
        "directory": str(directory),
    }


def words(run: str) -> list[str]:
    """What the shell would start, by a `docker` that only prints its arguments."""
    shell = 'docker() { for word; do printf "%s\\n" "$word"; done; }\n' + run.replace("exec docker", "docker")
    return subprocess.run(
        ["sh", "-c", shell, "/opt/glm/releases/x/run"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_run_is_the_docker_command(vllm: dict[str, str]) -> None:
    arguments = words(vllm["run"])
    image = arguments.index(f"vllm/vllm-openai@{DIGEST}")
    assert shlex.join(arguments[image + 1 :]).startswith(
        "/models/zai-org/GLM-5.2-FP8 --served-model-name glm-5.2-fp8 --host 127.0.0.1 --port 8001 "
    )
    docker = shlex.join(arguments[:image])
    assert docker.startswith(
        "run --rm --init --pull never --name glm-engine --network host --ipc=host --device nvidia.com/gpu=all "
    )
    assert "--ulimit memlock=-1 --ulimit nofile=1048576 --ulimit stack=67108864" in docker
    weights = f"/var/lib/glm/models/zai-org--GLM-5.2-FP8/{'1' * 40}"
    # --volume would make an empty directory where the disk is not mounted.
    assert f"--mount type=bind,readonly,source={weights},target=/models/zai-org/GLM-5.2-FP8" in docker
    assert "--volume" not in docker
    assert "--mount type=bind,source=/var/lib/glm/cache/abababababab/root-cache,target=/root/.cache" in docker
    assert "--restart" not in docker
    assert "TOKEN" not in vllm["run"]


def test_run_reads_as_one_flag_a_line(vllm: dict[str, str]) -> None:
    lines = vllm["run"].splitlines()
    assert lines[0] == "#!/bin/sh"
    assert "  --tensor-parallel-size 8 \\" in lines
    assert lines[-1] == "  --disable-access-log-for-endpoints /health,/metrics"
    assert all(len(line) < 200 for line in lines)


def test_environment_is_taken_as_it_is(vllm: dict[str, str]) -> None:
    lines = [line for line in vllm["env"].splitlines() if not line.startswith("#")]
    assert "TOKEN=it's; $HOME" in lines
    assert "VLLM_ENGINE_READY_TIMEOUT_S=3600" in lines


def test_release_says_what_it_is(vllm: dict[str, str]) -> None:
    data = json.loads(vllm["release"])
    assert data["id"] == vllm["id"]
    assert (data["image_digest"], data["engine"], data["profile"]) == (DIGEST, "vllm", "reference")
    assert data["url"] == "http://127.0.0.1:8001"
    assert "TOKEN" not in vllm["release"]


def test_stop_times_nest(vllm: dict[str, str]) -> None:
    unit = dict(line.split("=", 1) for line in vllm["unit"].splitlines() if "=" in line and not line.startswith("#"))
    release = json.loads(vllm["release"])
    engine = int(words(vllm["run"])[words(vllm["run"]).index("--shutdown-timeout") + 1])
    assert engine < release["stop_timeout"] < int(unit["TimeoutStopSec"])
    # engine-launch gives up by itself, and then still has to stop the container
    waits = starts.LONGEST + release["needs"]["timeout"]
    assert waits + release["start_timeout"] + release["stop_timeout"] < int(unit["TimeoutStartSec"])
    assert int(unit["RestartSec"]) == starts.RESTART_SEC
    assert unit["StartLimitIntervalSec"] == "0"


def test_systemd_takes_the_units(vllm: dict[str, str]) -> None:
    directory = Path(vllm["directory"])
    programs = directory / "opt/bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name in ("engine-launch", "engine-wait", "engine-watchdog"):
        shutil.copy(ROOT / "roles/inference_service/files" / name, programs)
    units = {"glm-engine.service": "unit", "glm-watchdog.service": "watchdog", "glm-watchdog.timer": "timer"}
    for name, key in units.items():
        (directory / name).write_text(vllm[key])
    command = ["systemd-analyze", "verify", "--man=no", *(str(directory / name) for name in units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert max(exposure(directory / name) for name in units if name.endswith(".service")) <= MOST


def test_sglang_has_a_command_and_a_drain_bounded_from_outside(tmp_path: Path) -> None:
    run = render(
        tmp_path, "sglang", inference_service_ulimits={}, inference_service_extra_args={"--json": {"a": "b c"}}
    )["run"]
    assert "  python3 -m sglang.launch_server \\" in run
    assert "--ulimit" not in run
    assert "--shutdown-timeout" not in run
    assert words(run)[-2:] == ["--json", '{"a": "b c"}']
