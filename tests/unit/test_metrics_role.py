"""Role metrics: nothing listens outside for a moment, a converged host costs nothing, and all of it goes again."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter.names import metrics_problems
from exposure import MOST, exposure
from test_haproxy_template import template

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/metrics"
TEXTFILES = "/var/lib/prometheus/node-exporter"
DIGEST = "@sha256:" + "d" * 64
ABSENT = {"load": "not-found", "active": "inactive", "enabled": None}
TASKS = yaml.safe_load((ROLE / "tasks/main.yml").read_text())


def test_the_address_is_set_before_the_package_comes_and_the_package_starts_nothing() -> None:
    kinds = [next((key for key in task if "." in key), "") for task in TASKS]
    assert kinds.index("glm.fleet.file_set") < kinds.index("ansible.builtin.apt")
    package = TASKS[kinds.index("ansible.builtin.apt")]["ansible.builtin.apt"]
    assert package["policy_rc_d"] == 101 and package["install_recommends"] is False


def test_the_exporter_listens_on_loopback_alone(tmp_path: Path) -> None:
    """With the distribution's own unit, whose address is every one."""
    own = Path("/usr/lib/systemd/system/prometheus-node-exporter.service")
    drop_in = template(
        "prometheus-node-exporter.conf.j2", metrics_node_exporter_port=9100, __metrics_textfiles=TEXTFILES
    )
    assert re.findall(r"listen-address=(\S+)", drop_in) == ["127.0.0.1:9100"]
    assert "ExecStart=\n" in drop_in, "the distribution's command is not the first of two"
    file = tmp_path / "prometheus-node-exporter.service"
    file.write_text(own.read_text() + drop_in)
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, check=False)
    assert "prometheus-node-exporter" not in done.stderr, done.stderr
    assert exposure(file) <= MOST


# --- dcgm-exporter


@pytest.fixture
def gpu_unit(tmp_path: Path) -> Path:
    file = tmp_path / "glm-dcgm-exporter.service"
    file.write_text(
        template(
            "glm-dcgm-exporter.service.j2",
            metrics_dcgm_exporter_image=f"nvcr.example/dcgm-exporter{DIGEST}",
            metrics_dcgm_exporter_port=9400,
            metrics_dcgm_gpu_device="nvidia.com/gpu=all",
            __metrics_counters="/etc/glm/dcgm-counters.csv",
        )
    )
    return file


def test_dcgm_exporter_is_confined(gpu_unit: Path) -> None:
    command = gpu_unit.read_text().partition("ExecStart=")[2].partition("\nExecStop")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[words.index("--address") + 1] == "127.0.0.1:9400"
    assert words[words.index("--cap-drop") + 1] == "ALL" and words.count("--cap-add") == 1
    assert words[words.index("--device") + 1] == "nvidia.com/gpu=all"
    image = words.index(f"nvcr.example/dcgm-exporter{DIGEST}")
    assert words[image + 1] == "--collectors", "what follows the image is its own"
    counters = dict(pair.split("=") for pair in words[words.index("--mount") + 1].split(",") if "=" in pair)
    assert counters["source"] == "/etc/glm/dcgm-counters.csv" and words[image + 2] == counters["target"]
    assert exposure(gpu_unit) <= MOST


def test_its_counters_are_a_list_that_it_takes() -> None:
    """As its parser reads it: three fields, a kind that it knows, no field twice."""
    lines = (ROLE / "files/dcgm-counters.csv").read_text().splitlines()
    rows = [row for row in csv.reader(lines) if row and not row[0].startswith("#")]
    assert {len(row) for row in rows} == {3}
    assert {row[1].strip() for row in rows} <= {"gauge", "counter", "label"}
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"DCGM_(FI|EXP)_[A-Z0-9_]+", name) for name in names)
    for wanted in (
        "XID_ERRORS",
        "ECC_DBE_VOL",
        "ROW_REMAP_FAILURE",
        "NVLINK",
        "CLOCKS_EVENT",
        "POWER_USAGE",
        "GPU_TEMP",
    ):
        assert any(wanted in name for name in names), wanted
    # The only ones that need the capability.
    assert any(name.startswith("DCGM_FI_PROF_") for name in names)


# --- a host, as node_info has read it

PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: glm.fleet.metrics, tasks_from: TASKS}
"""
RENDER = """
- hosts: localhost
  gather_facts: false
  vars: {ansible_managed: Ansible managed, role_path: ROLE}
  vars_files: [ROLE/defaults/main.yml, ROLE/vars/main.yml]
  tasks:
    - ansible.builtin.copy:
        dest: FILE
        content: >-
          {{ (__metrics_files + ('/opt/glm/lib/metrics' | glm.fleet.node_package)
              + (__metrics_gpu_files if __metrics_with_gpus else [])) | to_json }}
"""


def play(directory: Path, text: str, *options: str, **variables: Any) -> str:
    """What ansible-playbook says of a play over this machine, which is not touched: modules end in a failure."""
    book = directory / "play.yml"
    book.write_text(text)
    command = [str(Path(sys.executable).parent / "ansible-playbook"), str(book), "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [*command, "-e", json.dumps(variables), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def node(directory: Path, image: str = "", **units: Any) -> dict[str, Any]:
    """A host that has everything, as node_info reads it."""
    rendered, files = directory / "files.json", directory / "files"
    if not files.exists():
        files.symlink_to(ROLE / "files")  # where the look-ups of a play look
    text = RENDER.replace("ROLE", str(ROLE)).replace("FILE", str(rendered))
    play(directory, text, metrics_dcgm_exporter_image=image)
    paths = {
        file["path"]: {
            "kind": "file",
            "mode": file.get("mode", "0644"),
            "owner": "root",
            "group": "root",
            "sha256": hashlib.sha256((file["content"].rstrip("\n") + "\n").encode()).hexdigest(),
            "target": None,
        }
        for file in json.loads(rendered.read_text())
    }
    runs = {"load": "loaded", "active": "active", "enabled": "enabled"}
    defaults = yaml.safe_load((ROOT / "roles/preflight/defaults/main.yml").read_text())
    return {
        "packages": {"prometheus-node-exporter": "1.5.0-1"},
        "units": {
            "prometheus-node-exporter.service": runs,
            "glm-metrics.timer": runs,
            "glm-dcgm-exporter.service": runs if image else ABSENT,
            **units,
        },
        "managed": {"patterns": [path for path in defaults["preflight_managed"] if "{" not in path], "paths": paths},
    }


@pytest.mark.parametrize("image", ["", f"nvcr.example/dcgm-exporter{DIGEST}"])
def test_a_converged_host_is_asked_nothing(tmp_path: Path, image: str) -> None:
    """A Python that is not there: any module on the host would fail."""
    given = {"metrics_node": node(tmp_path, image), "metrics_dcgm_exporter_image": image}
    said = play(tmp_path, PLAY.replace("TASKS", "main"), ansible_python_interpreter="/nonexistent", **given)
    assert "changed=0" in said


def test_a_host_that_never_offered_metrics_is_asked_nothing_when_they_go(tmp_path: Path) -> None:
    seen = node(tmp_path)
    seen["managed"]["paths"] = {}
    seen["units"] = dict.fromkeys(seen["units"], ABSENT)
    said = play(tmp_path, PLAY.replace("TASKS", "remove"), ansible_python_interpreter="/nonexistent", metrics_node=seen)
    assert "changed=0" in said


def test_everything_that_it_brings_is_looked_at_and_removed(tmp_path: Path) -> None:
    """Else a run would not see that it is there, or that it has gone."""
    paths = set(node(tmp_path, f"x{DIGEST}")["managed"]["paths"])
    text = (ROLE / "tasks/remove.yml").read_text()
    assert "(__metrics_files + __metrics_gpu_files) | map(attribute='path')" in text
    assert {path for path in paths if not path.startswith("/opt/glm/lib/metrics/")} == {
        "/etc/systemd/system/prometheus-node-exporter.service.d/glm.conf",
        "/opt/glm/bin/metrics-state",
        "/etc/systemd/system/glm-metrics.service",
        "/etc/systemd/system/glm-metrics.timer",
        "/etc/glm/dcgm-counters.csv",
        "/etc/systemd/system/glm-dcgm-exporter.service",
    }
    gateway = yaml.safe_load((ROOT / "roles/rollout/tasks/load_balancer.yml").read_text())[0]["glm.fleet.node_info"]
    for patterns in (node(tmp_path)["managed"]["patterns"], gateway["managed"]):
        for path in [*paths, "/opt/glm/lib/metrics", f"{TEXTFILES}/glm.prom"]:
            assert any(Path(path).match(pattern) for pattern in patterns), path


# --- the inventory

WANTED = {"metrics": True, "metrics_port": 8005, "metrics_sources": ["10.0.0.5"], "dcgm_exporter_image": ""}
PORTS = {"glm_port": 8000, "glm_engine_port": 8001}


@pytest.mark.parametrize(
    ("changes", "monitoring", "said"),
    [
        ({}, [], []),
        ({"metrics_sources": ["10.0.0.0/24", "2001:db8::5", "2001:db8::/64"]}, [], []),
        ({"metrics_sources": []}, ["10.0.0.5"], []),
        ({"metrics_sources": []}, [], ["glm_metrics: nobody may read them"]),
        ({"metrics": False, "metrics_sources": []}, [], []),
        ({"metrics_sources": ["prometheus.example"]}, [], ["glm_metrics_sources: prometheus.example is no IP address"]),
        ({"metrics_sources": ["10.0.0.5/24"]}, [], ["glm_metrics_sources: 10.0.0.5/24 is no IP address"]),
        (
            {},
            ["prometheus.example"],
            ["the hosts let mon read metrics by its address, and prometheus.example is a name"],
        ),
        ({"metrics_port": "8000"}, [], ["glm_metrics_port: 8000 is glm_port too"]),
        ({"dcgm_exporter_image": f"nvcr.io/nvidia/k8s/dcgm-exporter{DIGEST}"}, [], []),
        ({"dcgm_exporter_image": "nvcr.io/nvidia/k8s/dcgm-exporter:4.5"}, [], ["names no digest"]),
        ({"metrics": False, "dcgm_exporter_image": "dcgm-exporter"}, [], ["names no digest"]),
    ],
)
def test_wrong_settings_are_told(changes: dict[str, Any], monitoring: list[str], said: list[str]) -> None:
    hosts = [{"name": "mon", "address": address} for address in monitoring]
    found = metrics_problems({**WANTED, **changes}, hosts, PORTS)
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found, strict=True))
