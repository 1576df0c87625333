"""NVIDIA's real packages, branch 550 of Debian's non-free, in a container: what is read of them, and what is planned.

The modules cannot be loaded there: what the kernel would show of one is added to what was read.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ansible
import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import driver
from ansible_collections.glm.fleet.plugins.modules import driver_info

ROOT = Path(__file__).resolve().parents[2]
NAME = "glm-debian-packages"
IMAGE = "glm-fleet/node-debian13"
INSTALL = """
sed -i 's/ main$/ main contrib non-free non-free-firmware/' /etc/apt/sources.list && apt-get update -q &&
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
  nvidia-open-kernel-dkms nvidia-smi libcuda1 nvidia-persistenced
"""
ASK = """import json, sys
from ansible_collections.glm.fleet.plugins.modules import driver_info
print(json.dumps(driver_info.collect(json.load(sys.stdin))))
"""
WANTED: dict[str, Any] = {
    "mode": "adopt",
    "branch": 570,
    "version": "",
    "distribution": "debian13",
    "repository": {"uri": "https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64", "suite": "/"},
    "min_version": "570.133.20",
    "allow_reboot": True,
    "remove_conflicting": True,
    "cuda_toolkit": False,
    "dcgm": False,
    "drained": True,
}
GPU: dict[str, Any] = {"driver": {"mismatch": False, "library_version": None, "error": None}, "gpus": []}


def docker(*arguments: str, stdin: str | None = None, seconds: int = 900) -> str:
    socket = os.environ.get("DOCKER_HOST", "") or os.access("/var/run/docker.sock", os.W_OK)
    command = ["docker", *arguments] if socket else ["sudo", "-n", "docker", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)[:200]}: {done.stderr[-2000:]}"
    return done.stdout


def package_set_of(branch: int) -> dict[str, Any]:
    package_set: dict[str, Any] = yaml.safe_load((ROOT / "drivers/570.yml").read_text())
    return {**package_set, "branch": branch, "pinned": package_set["driver"]["Debian"] + package_set["fabric"]}


@pytest.fixture(scope="module")
def info() -> Iterator[dict[str, Any]]:
    """What driver_info reads of them, with the open module of that version loaded."""
    subprocess.run([str(ROOT / "molecule/shared/build-images"), "node-debian13"], check=True)
    subprocess.run(["docker", "rm", "-f", NAME], capture_output=True, check=False)
    docker("run", "--detach", "--network", "host", "--name", NAME, IMAGE, "sleep", "1200")
    try:
        docker("exec", NAME, "sh", "-c", INSTALL)
        docker("exec", NAME, "mkdir", "/tmp/lib")
        docker("cp", str(Path(ansible.__file__).parent), f"{NAME}:/tmp/lib/ansible")
        docker("exec", NAME, "mkdir", "-p", "/tmp/lib/ansible_collections/glm/fleet")
        docker("cp", str(ROOT / "plugins"), f"{NAME}:/tmp/lib/ansible_collections/glm/fleet/plugins")
        options = yaml.safe_load(driver_info.DOCUMENTATION)["options"]
        arguments = {name: option["default"] for name, option in options.items()} | {"packages": ["nvlsm"]}
        python = ("env", "PYTHONPATH=/tmp/lib", "/usr/bin/python3", "-c", ASK)
        seen: dict[str, Any] = json.loads(docker("exec", "-i", NAME, *python, stdin=json.dumps(arguments)))
        version = driver.upstream(seen["installed"]["nvidia-open-kernel-dkms"])
        seen["loaded"] = {"version": version, "branch": 550, "open": True}
        yield seen
    finally:
        docker("rm", "-f", NAME)


def test_the_packages_are_read(info: dict[str, Any]) -> None:
    assert info["installed"]["libcuda1"].startswith("550.")
    assert info["half"] == []
    assert info["held"] == []
    assert info["candidates"]["nvidia-smi"]
    assert info["candidates"]["nvlsm"] == []
    assert info["secure_boot"] in (None, False, True)


def test_another_branch_is_refused_with_both_versions(info: dict[str, Any]) -> None:
    plan = driver.driver_plan(info, GPU, package_set_of(570), WANTED)
    lines = [finding["line"] for finding in plan["findings"] if finding["id"] == "driver_branch"]
    assert len(lines) == 1
    assert info["loaded"]["version"] in lines[0]
    assert "570.211.01" in lines[0]


def test_adopted_it_is_held_whole(info: dict[str, Any]) -> None:
    plan = driver.driver_plan(info, GPU, package_set_of(550), {**WANTED, "branch": 550, "min_version": "550.0"})
    assert plan["findings"] == []
    assert plan["action"] == "adopt"
    of_driver = {name for name, version in info["installed"].items() if version.startswith("550.")}
    assert {"nvidia-open-kernel-dkms", "libnvidia-ml1", "firmware-nvidia-gsp"} <= of_driver
    assert of_driver <= set(plan["hold"])


def test_replaced_none_of_it_stays(info: dict[str, Any]) -> None:
    """By NVIDIA's own packages of 570, whose names are partly the same."""
    info = {**info, "candidates": {**info["candidates"], "libnvidia-ml1": ["570.211.01-1", "550.163.01-2"]}}
    plan = driver.driver_plan(info, GPU, package_set_of(570), {**WANTED, "mode": "upgrade"})
    assert [finding["id"] for finding in plan["findings"] if finding["id"] != "kernel"] == []
    moved = {package.split("=")[0] for package in plan["packages"]}
    assert {"libcuda1", "libnvidia-ml1", "nvidia-persistenced", "nvidia-driver-cuda"} <= moved
    of_driver = {name for name, version in info["installed"].items() if version.startswith("550.")}
    assert of_driver <= moved | set(plan["remove"])
    assert "nvidia-smi" in plan["remove"]
