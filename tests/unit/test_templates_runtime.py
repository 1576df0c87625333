"""Templates of the container runtime, the image and the weights, rendered by Ansible, read by their programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from exposure import MOST, exposure

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {"pull_ref": f"vllm/vllm-openai@sha256:{'ab' * 32}", "size_bytes": 15_000_000_000}
SHARED = {
    **IMAGE,
    "api": "https://registry-1.docker.io",
    "path": "vllm/vllm-openai",
    "manifests": [{"digest": f"sha256:{'ab' * 32}", "media_type": "application/json", "content": '{"a":  "it\'s"}\n'}],
    "blobs": [{"digest": f"sha256:{'cd' * 32}", "size": 5}],
}
SHARE = {"name": "a", "addresses": {"a": "192.0.2.1", "b": "192.0.2.2"}, "port": 8004, "transfers": 4}
OWN_MIRROR = "http://127.0.0.1:8004"
NEW: dict[str, Any] = {"running": False, "version": None, "daemon_json": None, "containers_running": []}
MANIFEST = {"revision": "1" * 40, "files": [{"path": "it's.json", "size": 2, "git_sha1": "0" * 40, "sha256": None}]}
OLD: dict[str, Any] = {
    "running": True,
    "version": "27.5.1",
    "containers_running": [],
    "daemon_json": {"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}, "log-driver": "json-file"},
}
EXPRESSIONS = {
    "config": "lookup('ansible.builtin.template', 'daemon.json.j2')",
    "preferences": "lookup('ansible.builtin.template', 'nvidia-container-toolkit.pref.j2')",
    "unit": "lookup('ansible.builtin.template', 'glm-image-pull.service.j2')",
    "image": "lookup('ansible.builtin.template', 'image.json.j2') if engine_image_share else ''",
    "forgotten": "__container_runtime_other_mirrors",
    "weights": "lookup('ansible.builtin.template', 'weights.json.j2')",
    "weights_unit": "lookup('ansible.builtin.template', 'glm-weights.service.j2')",
    "packages": "__container_runtime_packages",
    "changes": "__container_runtime_config_changes",
    "restart": "__container_runtime_restart",
    "adds": "[__container_runtime_adds_docker, __container_runtime_adds_toolkit]",
    "in_vain": "__container_runtime_in_vain",
    "present": "__engine_image_present",
}


def render(
    directory: Path, docker: dict[str, Any], sources: list[dict[str, str]] | None = None, **variables: Any
) -> dict[str, Any]:
    roles = [
        ROOT / "roles" / name / kind / "main.yml"
        for name in ("container_runtime", "engine_image", "model_weights")
        for kind in ("defaults", "vars")
    ]
    node: dict[str, Any] = {"docker": docker, "container_toolkit": None, "units": {}, "cdi": {"devices": []},
                            "arch": "x86_64", "apt": {"sources": sources or []}}  # fmt: skip
    play = {
        "hosts": "localhost", "connection": "local", "gather_facts": False, "vars_files": [str(path) for path in roles],
        "tasks": [{"ansible.builtin.copy": {
            "content": "{{ {" + ", ".join(f"'{key}': {text}" for key, text in EXPRESSIONS.items()) + "} | to_json }}",
            "dest": str(directory / "out.json"), "mode": "0600"}}],
    }  # fmt: skip
    (directory / "play.yml").write_text(yaml.safe_dump([play]))
    (directory / "vars.yml").write_text(yaml.safe_dump({
        "container_runtime_node": node, "engine_image_resolved": IMAGE, "model_weights_manifest": MANIFEST,
        "model_weights_image": IMAGE["pull_ref"],
        "ansible_facts": {"distribution": "Debian", "distribution_release": "trixie"},
        "__container_runtime_left": {"node": {"docker": docker, "container_toolkit": None}},
        "ansible_python_interpreter": sys.executable, **variables,
    }))  # fmt: skip
    if not (directory / "templates").exists():
        (directory / "templates").symlink_to(ROOT / "templates")
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", "-e", "@vars.yml", "play.yml"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((directory / "out.json").read_text()))


def test_a_new_docker(tmp_path: Path) -> None:
    out = render(tmp_path, NEW, container_runtime_registry_mirrors=["http://mirror:5000"])
    assert json.loads(out["config"]) == {
        "features": {"cdi": True}, "live-restore": True, "log-driver": "local",
        "log-opts": {"max-file": "3", "max-size": "50m"}, "registry-mirrors": ["http://mirror:5000"]}  # fmt: skip
    assert out["packages"][:3] == ["docker-ce", "docker-ce-cli", "containerd.io"]
    assert "nvidia-container-toolkit=1.20.0-*" in out["packages"] and not out["restart"]
    assert "Pin: version 1.20.0-*" in out["preferences"]


def test_a_network_of_the_site_for_docker(tmp_path: Path) -> None:
    out = render(tmp_path, NEW, container_runtime_daemon_config={"bip": "10.255.0.1/24"})
    assert json.loads(out["config"])["bip"] == "10.255.0.1/24"


DOCKER = {"path": "/x/docker.list", "repository": "download.docker.com/linux/debian/dists/trixie"}
TOOLKIT = {"path": "/x/nvidia.list", "repository": "nvidia.github.io/libnvidia-container/stable/deb/amd64/"}


@pytest.mark.parametrize(
    ("sources", "adds"), [([], [True, True]), ([DOCKER], [False, True]), ([TOOLKIT, DOCKER], [False, False])]
)
def test_no_second_source_for_a_repository(tmp_path: Path, sources: list[dict[str, str]], adds: list[bool]) -> None:
    """apt would refuse all work: one repository with two keys."""
    out = render(tmp_path, NEW, sources)
    assert out["adds"] == adds
    names = [name for name, added in zip(("glm-docker", "glm-nvidia-container-toolkit"), adds) if added]
    assert out["in_vain"] == [
        path
        for name in names
        for path in (
            f"/etc/apt/sources.list.d/{name}.sources",
            *(f"/etc/apt/keyrings/{name}.{kind}" for kind in ("asc", "gpg")),
        )
    ]


def test_the_source_of_packages_that_came_stays(tmp_path: Path) -> None:
    left = {"node": {"docker": {"version": "28.1.0"}, "container_toolkit": None}}
    assert not [path for path in render(tmp_path, NEW, __container_runtime_left=left)["in_vain"] if "docker" in path]


def test_an_adopted_docker_keeps_what_it_has(tmp_path: Path) -> None:
    out = render(tmp_path, OLD)
    assert json.loads(out["config"]) == {
        **OLD["daemon_json"], "features": {"cdi": True}, "live-restore": True}  # fmt: skip
    assert sorted(out["changes"]) == ["features", "live-restore"]
    assert out["restart"], "Docker 27 takes the feature CDI at its start alone"
    assert not any("docker" in name for name in out["packages"])


def test_a_converged_docker_is_left_alone(tmp_path: Path) -> None:
    config = {"features": {"cdi": True, "other": False}, "live-restore": True}
    out = render(tmp_path, {**OLD, "version": "28.1.0", "daemon_json": config})
    assert out["changes"] == [] and not out["restart"]


@pytest.mark.parametrize(
    ("used", "wanted", "there", "mirrors"),
    [
        (True, [], None, [OWN_MIRROR]),
        (True, ["http://mirror"], ["http://old"], [OWN_MIRROR, "http://mirror"]),
        (True, [], ["http://site"], [OWN_MIRROR, "http://site"]),
        (False, [], [OWN_MIRROR, "http://site"], ["http://site"]),
        (False, ["http://mirror"], [OWN_MIRROR], ["http://mirror"]),
        (False, [], [OWN_MIRROR], []),
    ],
)
def test_the_node_s_own_mirror_comes_first_and_goes_alone(
    tmp_path: Path, used: bool, wanted: list[str], there: list[str] | None, mirrors: list[str]
) -> None:
    config = {"features": {"cdi": True}, "live-restore": True}
    config |= {"registry-mirrors": there} if there is not None else {}
    own: dict[str, Any] = {"container_runtime_node_mirror": OWN_MIRROR, "container_runtime_node_mirror_used": used}
    docker = {**OLD, "version": "28.1.0", "daemon_json": config}
    out = render(tmp_path, docker, container_runtime_registry_mirrors=wanted, **own)
    assert json.loads(out["config"])["registry-mirrors"] == mirrors
    assert out["changes"] == ["registry-mirrors"] and not out["restart"], "Docker takes it by a reload"
    assert out["forgotten"] == [mirror for mirror in there or [] if mirror != OWN_MIRROR]


def test_the_mirrors_of_a_site_stay_where_nobody_shares(tmp_path: Path) -> None:
    config = {"features": {"cdi": True}, "live-restore": True, "registry-mirrors": ["http://site"]}
    docker = {**OLD, "version": "28.1.0", "daemon_json": config}
    assert render(tmp_path, docker, container_runtime_node_mirror=OWN_MIRROR)["changes"] == []


@pytest.mark.parametrize(("unit", "program"), [("unit", "image-pull"), ("weights_unit", "weights-fetch")])
@pytest.mark.parametrize("share", [{}, SHARE])
def test_the_units_are_ones_that_systemd_takes(tmp_path: Path, unit: str, program: str, share: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "engine_image_resolved": SHARED,
        "engine_image_share": share,
        "model_weights_share": share,
    }
    text = render(tmp_path, NEW, engine_image_mirror="http://mirror:5000", **settings)[unit]
    path = tmp_path / f"glm-{program}.service"
    path.write_text(text.replace(f"/opt/glm/bin/{program}", "/bin/true").replace("Requires=docker.service\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.name not in done.stderr
    assert exposure(path) <= MOST


def test_the_result_is_read_where_the_program_leaves_it(tmp_path: Path) -> None:
    unit = render(tmp_path, NEW)["weights_unit"]
    assert "RuntimeDirectory=glm-weights\nRuntimeDirectoryPreserve=yes\n" in unit
    role = ROOT / "roles/model_weights"
    fetch, *_ = yaml.safe_load((role / "tasks/fetch.yml").read_text())
    assert fetch["glm.fleet.systemd_job"]["result_file"] == "{{ __model_weights_runtime }}/result.json"
    assert yaml.safe_load((role / "vars/main.yml").read_text())["__model_weights_runtime"] == "/run/glm-weights"
    assert 'RESULT = "result.json"' in (role / "files/weights-fetch").read_text()


def test_the_image_comes_through_the_mirror(tmp_path: Path) -> None:
    out = render(tmp_path, NEW, engine_image_mirror="http://mirror:5000")
    assert f"--mirror http://mirror:5000 \\\n  {IMAGE['pull_ref']}\n" in out["unit"] and not out["present"]
    assert "--mirror" not in render(tmp_path, NEW)["unit"]


def test_what_the_pull_is_told_where_the_nodes_share(tmp_path: Path) -> None:
    out = render(tmp_path, NEW, engine_image_resolved=SHARED, engine_image_share=SHARE)
    told = json.loads(out["image"])
    assert (told["registry"], told["repository"]) == (SHARED["api"], SHARED["path"])
    assert (told["manifests"], told["blobs"], told["share"]) == (SHARED["manifests"], SHARED["blobs"], SHARE)
    assert "--share /etc/glm/image.json" in out["unit"]
    assert f"ReadWritePaths={told['directory']}\n" in out["unit"]
    assert "--share" not in render(tmp_path, NEW)["unit"]


def test_what_the_download_is_told(tmp_path: Path) -> None:
    told = json.loads(render(tmp_path, NEW, model_weights_token_file="/k")["weights"])
    assert told["manifest"] == MANIFEST
    assert told["directory"] == "/var/lib/glm/models/zai-org--GLM-5.2-FP8"
    assert (told["image"], told["token_file"]) == (IMAGE["pull_ref"], "/etc/glm/hf-token")
