"""The plan for a node's driver: what is done in each state, and each obstacle's one line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import driver

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3
KERNEL = "6.8.0-60-generic"
CUDA = "developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/"
Dict = dict[str, Any]


def bill(branch: int, distribution: str = "Ubuntu") -> Dict:
    """As the role hands it over: `pinned` for the distribution."""
    package_set: Dict = yaml.safe_load((ROOT / "drivers" / f"{branch}.yml").read_text())
    return {**package_set, "pinned": package_set["driver"][distribution] + package_set["fabric"]}


def packages_of(version: str) -> dict[str, str]:
    """All that a package set names, as dpkg lists it after a transaction."""
    package_set = bill(int(version[:3]))
    installed = {name: f"{version}-{'1' if 'fabric' in name else '1ubuntu1'}" for name in package_set["pinned"]}
    installed.update(dict.fromkeys(package_set["unpinned"], "2025.03.11-1"))
    installed[package_set["cuda_toolkit"]["package"]] = "12.8.1-1"
    installed[package_set["dcgm"]["package"]] = "1:4.2.3-1"
    installed[package_set["pinning"].format(version=version)] = f"{version}-1"
    return installed


class World:
    """A bare Ubuntu node whose apt has NVIDIA's source, to be changed by a test."""

    def __init__(self) -> None:
        self.branch(570)
        self.info: Dict = {
            "kernel": KERNEL,
            "kernel_packages": {f"linux-image-{KERNEL}": "6.8.0-60.63"},
            "headers": True,
            "headers_package": f"linux-headers-{KERNEL}",
            "headers_candidate": "6.8.0-60.63",
            "modules_extra": True,
            "modules_extra_package": f"linux-modules-extra-{KERNEL}",
            "modules_extra_candidate": "6.8.0-60.63",
            "modules": [],
            "loaded": None,
            "installed": {},
            "half": [],
            "held": [],
            "candidates": {},
            "sources": [],
            "preferences": [],
            "secure_boot": False,
            "lock": None,
            "dkms_log": None,
            "services": {},
            "fabric_manager_version": None,
            "toolkit": None,
            "serving": {"unit": "glm-engine.service", "active": False, "containers": []},
            "nvcc_profile": None,
            "unattended": False,
            "disk_free": {"/": 500 * GIB, "/usr": 500 * GIB, "/var": 500 * GIB, "/boot": GIB},
        }
        self.gpu: Dict = {"driver": None, "gpus": [], "processes": []}
        self.wanted: Dict = {
            "mode": "install",
            "branch": 570,
            "version": "",
            "min_version": "570.133.20",
            "allow_reboot": False,
            "remove_conflicting": False,
            "cuda_toolkit": True,
            "dcgm": True,
            "modules": ["ib_umad", "mlx5_core", "mlx5_ib"],
            "drained": False,
            "repository": {"uri": f"https://{CUDA}", "suite": "/"},
        }

    def branch(self, branch: int) -> None:
        self.package_set = bill(branch)

    def load(self, version: str, open_module: bool = True) -> None:
        self.info["loaded"] = {"version": version, "branch": int(version[:3]), "open": open_module}
        self.info["modules"] = ["nvidia", "ib_umad", "mlx5_core", "mlx5_ib"]
        self.info["fabric_manager_version"] = version
        self.gpu["driver"] = {"mismatch": False, "library_version": version, "error": None}

    def have(self, version: str, hold: bool = True) -> None:
        """Installed as this role does it, and loaded."""
        self.info["installed"] = packages_of(version)
        package_set = bill(int(version[:3]))
        names = [*package_set["pinned"], *package_set["unpinned"], package_set["pinning"].format(version=version)]
        self.info["held"] = names if hold else []
        self.load(version)

    def apt_has(self, *versions: str) -> None:
        self.wanted["candidates_known"] = True
        for name in self.package_set["pinned"]:
            self.info["candidates"][name] = [f"{version}-1ubuntu1" for version in versions]
        for version in versions:
            self.info["candidates"][self.package_set["pinning"].format(version=version)] = [f"{version}-1"]
        self.info["candidates"].update({name: ["1-1"] for name in self.package_set["unpinned"]})

    def plan(self) -> Dict:
        return driver.driver_plan(self.info, self.gpu, self.package_set, self.wanted)

    def found(self) -> list[str]:
        return [finding["line"] for finding in self.plan()["findings"]]

    def wrong(self) -> list[str]:
        return driver.driver_wrong(self.info, self.gpu, self.package_set, self.wanted)


@pytest.fixture
def world() -> World:
    return World()


# ---- what is done in each state


def test_bare_node(world: World) -> None:
    world.info["headers"] = False
    world.info["modules_extra"] = False
    world.apt_has("570.211.01", "570.195.03")
    plan = world.plan()
    assert plan["findings"] == []
    assert (plan["action"], plan["version"], plan["reboot"]) == ("install", "570.211.01", False)
    assert plan["pinning"] == "nvidia-driver-pinning-570.211.01"
    assert plan["packages"] == [f"{name}=570.211.01*" for name in world.package_set["pinned"]]
    assert {"nvidia-open-570=570.211.01*", "nvidia-persistenced=570.211.01*"} <= set(plan["packages"])
    assert plan["unpinned"] == [
        "nvlsm",
        "infiniband-diags",
        "libibumad3",
        "cuda-toolkit-12-8",
        "datacenter-gpu-manager-4-cuda12",
        f"linux-headers-{KERNEL}",
        f"linux-modules-extra-{KERNEL}",
    ]
    assert plan["modules"] == ["ib_umad", "mlx5_core", "mlx5_ib"]
    assert set(plan["hold"]) == {*world.package_set["pinned"], *world.package_set["unpinned"], plan["pinning"]}
    assert (plan["remove"], plan["downgrade"], plan["unhold"], plan["sources_to_disable"]) == ([], [], [], [])


def test_lines_of_a_bare_node(world: World) -> None:
    world.info["half"] = ["man-db"]
    world.info["lock"] = {"pid": 4711, "process": "unattended-upgr"}
    lines = world.plan()["lines"]
    assert lines[:4] == [
        "driver: loaded none, installed none, wanted 570.211.01; mode install: install",
        "finish first what dpkg has not: man-db",
        "wait for dpkg's lock, held by unattended-upgr (pid 4711)",
        "pin: nvidia-driver-pinning-570.211.01",
    ]
    assert lines[4].startswith("install at 570.211.01: nvidia-open-570, ")
    assert lines[6] == "load the modules: ib_umad, mlx5_core, mlx5_ib"
    assert lines[-1] == "reboot: not needed"


def test_toolkit_and_dcgm_are_optional(world: World) -> None:
    world.wanted.update(cuda_toolkit=False, dcgm=False)
    assert world.plan()["unpinned"] == world.package_set["unpinned"]


@pytest.mark.parametrize("mode", ["adopt", "install", "upgrade"])
def test_nothing_is_left_after_an_installation(world: World, mode: str) -> None:
    world.have("570.211.01")
    world.info["held"] += ["cuda-toolkit-12-8"]
    world.wanted["mode"] = mode
    plan = world.plan()
    assert (plan["action"], plan["findings"], plan["reboot"]) == ("nothing", [], False)
    assert (plan["packages"], plan["unpinned"], plan["hold"], plan["modules"]) == ([], [], [], [])


def test_adopt_holds_what_is_there(world: World) -> None:
    world.have("570.195.03", hold=False)
    world.info["installed"].update({"libnvidia-gl-570": "570.195.03-1ubuntu1", "nvidia-container-toolkit": "1.18.1-1"})
    world.wanted["mode"] = "adopt"
    plan = world.plan()
    assert (plan["action"], plan["version"], plan["findings"]) == ("adopt", "570.195.03", [])
    assert {"nvidia-open-570", "libnvidia-gl-570", "nvlsm"} <= set(plan["hold"])
    assert not {"nvidia-container-toolkit", "cuda-toolkit-12-8"} & set(plan["hold"])
    assert (plan["packages"], plan["unpinned"], plan["modules"]) == ([], [], [])


def test_adopt_leaves_ubuntus_packages_and_other_sources_alone(world: World) -> None:
    world.load("570.195.03")
    world.info["installed"] = {"nvidia-utils-570": "570.195.03-0ubuntu0.24.04.1"}
    world.info["sources"] = [
        {"path": "/etc/apt/sources.list.d/cuda.list", "uri": "https://x/cuda /", "repository": "x/cuda/", "alone": True}
    ]
    world.wanted.update(mode="adopt", remove_conflicting=True)
    plan = world.plan()
    assert (plan["findings"], plan["sources_to_disable"], plan["remove"]) == ([], [], [])


def test_install_keeps_the_loaded_version_and_adds_the_fabric(world: World) -> None:
    world.have("570.195.03")
    for name in ("nvidia-fabricmanager-570", "nvlsm"):
        del world.info["installed"][name]
    world.wanted["drained"] = True
    plan = world.plan()
    assert (plan["action"], plan["version"], plan["reboot"], plan["findings"]) == ("install", "570.195.03", False, [])
    assert "nvidia-fabricmanager-570=570.195.03*" in plan["packages"]
    assert plan["unpinned"] == ["nvlsm"]


def test_install_does_not_keep_what_is_too_old(world: World) -> None:
    world.have("570.86.15")
    assert (world.plan()["action"], world.plan()["version"]) == ("upgrade", "570.211.01")


def test_upgrade_within_the_branch(world: World) -> None:
    world.have("570.195.03")
    world.wanted.update(mode="upgrade", allow_reboot=True)
    plan = world.plan()
    assert (plan["action"], plan["version"], plan["reboot"], plan["findings"]) == ("upgrade", "570.211.01", True, [])
    assert plan["remove"] == ["nvidia-driver-pinning-570.195.03"]
    assert set(plan["unhold"]) == {*world.package_set["pinned"], "nvidia-driver-pinning-570.195.03"}
    assert plan["lines"][-1] == "reboot: 570.195.03 is loaded, 570.211.01 comes with the reboot"


@pytest.mark.parametrize("mode", ["install", "upgrade"])
def test_move_to_another_branch(world: World, mode: str) -> None:
    world.have("570.211.01")
    world.branch(580)
    world.wanted.update(mode=mode, allow_reboot=True)
    plan = world.plan()
    assert (plan["action"], plan["reboot"], plan["findings"]) == ("upgrade", True, [])
    assert f"nvidia-fabricmanager={world.package_set['version']}*" in plan["packages"]
    assert {"nvidia-open-570", "nvidia-fabricmanager-570", "nvidia-driver-pinning-570.211.01"} <= set(plan["remove"])
    assert not {"nvidia-persistenced", "nvlsm", "cuda-toolkit-12-8"} & set(plan["remove"])
    assert plan["downgrade"] == []


def test_move_back_lowers_what_has_no_branch_in_its_name(world: World) -> None:
    world.have("580.159.04")
    world.wanted.update(mode="upgrade", allow_reboot=True)
    plan = world.plan()
    assert plan["findings"] == []
    assert plan["downgrade"] == ["nvidia-persistenced", "nvidia-modprobe"]
    assert {"nvidia-open-580", "nvidia-fabricmanager"} <= set(plan["remove"])


def test_a_package_that_is_not_configured_is_not_there(world: World) -> None:
    world.have("570.211.01")
    world.load("570.195.03")
    world.wanted["allow_reboot"] = True
    world.info["half"] = ["nvidia-dkms-570-open"]
    plan = world.plan()
    assert (plan["action"], plan["reboot"]) == ("upgrade", True)
    assert "nvidia-dkms-570-open=570.211.01*" in plan["packages"]


def test_daemons_are_started_where_they_do_not_run(world: World) -> None:
    world.have("570.211.01")
    running = {"load": "loaded", "active": "active", "enabled": "enabled"}
    units = ("nvidia-persistenced.service", "nvidia-fabricmanager.service", "nvidia-dcgm.service")
    world.info["services"] = {unit: dict(running) for unit in units}
    world.info["services"][units[0]]["enabled"] = "static"
    assert world.plan()["services"] == []
    world.info["services"][units[1]]["enabled"] = "disabled"
    world.info["services"][units[2]]["active"] = "failed"
    assert world.plan()["services"] == [*units[1:]]
    assert world.plan()["action"] == "nothing"
    world.wanted["mode"] = "adopt"
    assert world.plan()["services"] == []


def test_the_plan_for_a_real_gpu_host(world: World) -> None:
    """Branch 580 was installed there without packages; with that branch wanted there is nothing to do."""
    folder = ROOT / "tests/fixtures/nvidia-smi/h200-580"
    world.info = yaml.safe_load((folder / "driver_info.yml").read_text())
    world.wanted["mode"] = "adopt"
    assert len(world.found()) == 1
    assert world.found()[0] in (folder / "findings.txt").read_text().splitlines()
    world.branch(580)
    plan = world.plan()
    assert (plan["action"], plan["findings"]) == ("nothing", [])
    assert plan["lines"][0] == (
        "driver: loaded 580.159.04 (open), installed none, wanted 580.159.04; mode adopt: nothing"
    )


def test_on_debian_all_of_the_driver_moves_along(world: World) -> None:
    """Its names have no branch: what is not in the package set moves where apt has it, and goes where not."""
    world.package_set = bill(570, "Debian")
    names = [*bill(580, "Debian")["pinned"], "libnvidia-ml1", "nvidia-smi"]
    world.info["installed"] = dict.fromkeys(names, "580.159.04-1")
    world.load("580.159.04")
    world.apt_has("570.211.01")
    world.info["candidates"]["libnvidia-ml1"] = ["580.159.04-1", "570.211.01-1"]
    world.wanted.update(mode="upgrade", allow_reboot=True, distribution="debian13")
    plan = world.plan()
    assert plan["findings"] == []
    assert {"libnvidia-ml1=570.211.01*", "libcuda1=570.211.01*"} <= set(plan["packages"])
    assert set(plan["remove"]) == {"nvidia-smi", "nvidia-fabricmanager", "libnvidia-nscq", "libnvsdm", "nvidia-imex"}


def test_an_installed_driver_that_waits_for_its_reboot(world: World) -> None:
    world.have("570.211.01")
    world.load("570.195.03")
    world.wanted["allow_reboot"] = True
    plan = world.plan()
    assert (plan["action"], plan["reboot"], plan["findings"]) == ("nothing", True, [])


def test_the_closed_module_is_replaced(world: World) -> None:
    world.load("570.211.01", open_module=False)
    world.info["installed"] = {"nvidia-dkms-570": "570.211.01-1ubuntu1"}
    assert world.found() == [
        "reboot: a reboot is needed and not allowed (found 570.211.01 loaded (the closed module), while 570.211.01 "
        "would be installed): set glm_allow_reboot: true"
    ]


def test_half_installed_packages_are_no_finding(world: World) -> None:
    world.info["half"] = ["nvidia-dkms-570-open"]
    assert world.found() == []


def test_what_is_missing_beside_the_driver_disturbs_nobody(world: World) -> None:
    world.have("570.211.01")
    del world.info["installed"]["cuda-toolkit-12-8"]
    world.info["serving"]["active"] = True
    plan = world.plan()
    assert (plan["action"], plan["packages"], plan["unpinned"]) == ("install", [], ["cuda-toolkit-12-8"])
    assert plan["findings"] == []


def test_conflicts_and_sources_go_where_that_is_allowed(world: World) -> None:
    world.wanted["remove_conflicting"] = True
    world.info["installed"] = {"libnvidia-compute-580": "580.95.05-1ubuntu1"}
    path = "/etc/apt/sources.list.d/cuda.list"
    world.info["sources"] = [{"path": path, "uri": "https://x/cuda /", "repository": "x/cuda/", "alone": True}] * 2
    plan = world.plan()
    assert plan["findings"] == []
    assert (plan["remove"], plan["sources_to_disable"]) == (["libnvidia-compute-580"], [path])
    assert f"disable the sources: {path}" in plan["lines"]


def cuda_keyring() -> Dict:
    """NVIDIA's own package of its key names the same repository."""
    path = "/etc/apt/sources.list.d/cuda-ubuntu2404-x86_64.list"
    return {"path": path, "uri": f"https://{CUDA} /", "repository": CUDA, "alone": True}


@pytest.mark.parametrize("remove", [False, True])
def test_the_nodes_own_source_of_the_same_repository_is_used(world: World, remove: bool) -> None:
    world.wanted["remove_conflicting"] = remove
    assert world.plan()["source"] == ""
    world.info["sources"] = [cuda_keyring()]
    plan = world.plan()
    assert (plan["findings"], plan["sources_to_disable"]) == ([], [])
    assert plan["source"] == cuda_keyring()["path"]


def test_a_file_that_is_disabled_is_not_used(world: World) -> None:
    """It holds another source of drivers beside."""
    other = {**cuda_keyring(), "uri": "https://x/cuda /", "repository": "x/cuda/"}
    world.info["sources"] = [cuda_keyring(), other]
    assert [line.split(":")[0] for line in world.found()] == ["apt_sources"]
    world.wanted["remove_conflicting"] = True
    plan = world.plan()
    assert (plan["source"], plan["sources_to_disable"]) == ("", [other["path"]])


def test_the_key_of_the_nodes_own_source_is_the_nodes(world: World) -> None:
    said = f"E:The repository 'https://{CUDA}  InRelease' is not signed."
    assert driver.driver_failure(said, world.info, "/etc/apt/sources.list.d/cuda.list").endswith(
        ": /etc/apt/sources.list.d/cuda.list of the node was used as it is: mend its key, or remove it, then run again"
    )


def test_planning_leaves_what_was_seen_alone(world: World) -> None:
    world.have("580.159.04")
    before = copy.deepcopy((world.info, world.gpu, world.package_set, world.wanted))
    world.plan()
    world.wrong()
    assert before == (world.info, world.gpu, world.package_set, world.wanted)


def test_without_gpu_info(world: World) -> None:
    assert driver.driver_plan(world.info, None, world.package_set, world.wanted)["findings"] == []


# ---- each obstacle and its line


def adopt_nothing(w: World) -> None:
    w.wanted["mode"] = "adopt"


def unknown_distribution(w: World) -> None:
    w.wanted["distribution"] = "rocky9"


def adopt_nouveau(w: World) -> None:
    adopt_nothing(w)
    w.info["modules"] = ["nouveau"]


def adopt_what_is_not_loaded(w: World) -> None:
    adopt_nothing(w)
    w.info["installed"] = packages_of("570.211.01")


def adopt_another_branch(w: World) -> None:
    adopt_nothing(w)
    w.have("580.159.04")


def adopt_another_version(w: World) -> None:
    adopt_nothing(w)
    w.have("570.195.03")
    w.wanted["version"] = "570.211.01"


def adopt_an_old_one(w: World) -> None:
    adopt_nothing(w)
    w.have("570.86.15")


def adopt_the_closed_one(w: World) -> None:
    adopt_nothing(w)
    w.have("570.211.01")
    w.load("570.211.01", open_module=False)


def adopt_with_another_fabric_manager(w: World) -> None:
    adopt_nothing(w)
    w.have("570.211.01")
    w.info["fabric_manager_version"] = "570.195.03"


def adopt_a_mix(w: World) -> None:
    adopt_nothing(w)
    w.have("570.211.01")
    w.info["installed"]["libnvidia-compute-580"] = "580.95.05-1ubuntu1"
    w.wanted["remove_conflicting"] = True  # adopt removes nothing


def adopt_changed_libraries(w: World) -> None:
    adopt_nothing(w)
    w.have("570.211.01")
    w.load("570.195.03")
    w.gpu["driver"].update(mismatch=True, library_version="570.211.01")


def version_of_another_branch(w: World) -> None:
    w.wanted["version"] = "580.95.05"


def install_too_old(w: World) -> None:
    w.wanted["version"] = "570.86.15"


def unknown_version(w: World) -> None:
    w.wanted["version"] = "570.999.99"
    w.apt_has("570.211.01", "570.195.03")
    w.info["candidates"]["nvidia-persistenced"].insert(0, "580.95.05-1ubuntu1")


def incomplete_version(w: World) -> None:
    w.apt_has("570.211.01", "570.195.03")
    w.info["candidates"]["libnvsdm-570"] = ["570.195.03-1"]


def empty_repository(w: World) -> None:
    w.apt_has()


def no_toolkit(w: World) -> None:
    w.apt_has("570.211.01")
    w.info["candidates"]["cuda-toolkit-12-8"] = []


def old_kernel(w: World) -> None:
    w.info["kernel"] = "5.4.0-200-generic"


def no_headers(w: World) -> None:
    w.apt_has("570.211.01")
    w.info.update(headers=False, headers_candidate=None)


def signed_modules_only(w: World) -> None:
    w.info["secure_boot"] = True


def nouveau(w: World) -> None:
    w.info["modules"] = ["nouveau"]


def another_source(w: World) -> None:
    path = "/etc/apt/sources.list.d/graphics-drivers.list"
    uri, repository = "https://ppa/graphics-drivers noble main", "ppa/graphics-drivers/dists/noble"
    w.info["sources"] = [{"path": path, "uri": uri, "repository": repository, "alone": True}]


def a_source_among_others(w: World) -> None:
    w.info["sources"] = [
        {"path": "/etc/apt/sources.list", "uri": "https://x/cuda /", "repository": "x/cuda/", "alone": False}
    ]
    w.wanted["remove_conflicting"] = True


def packages_of_another_branch(w: World) -> None:
    w.info["installed"] = {"libnvidia-compute-580": "580.95.05-1ubuntu1", "cuda-compat-12-9": "575.57.08-0ubuntu1"}


def packages_of_ubuntu(w: World) -> None:
    w.info["installed"] = {
        "nvidia-utils-570": "570.211.01-0ubuntu0.24.04.1",
        "linux-modules-nvidia-570-open-6.8.0-60-generic": "6.8.0-60.63",
    }


def reboot_needed(w: World) -> None:
    w.have("570.195.03")
    w.wanted["mode"] = "upgrade"


def reboot_left_over(w: World) -> None:
    w.have("570.211.01")
    w.load("570.195.03")


def engine_serves(w: World) -> None:
    w.have("570.195.03")
    w.wanted.update(mode="upgrade", allow_reboot=True)
    w.info["serving"].update(active=True, containers=["glm-engine"])


def another_container(w: World) -> None:
    engine_serves(w)
    w.info["serving"].update(active=False, containers=["notebook"])
    w.gpu["processes"] = [{"name": "python3", "pid": 4711, "container_id": "c" * 64}]


def another_process(w: World) -> None:
    engine_serves(w)
    w.info["serving"].update(active=False, containers=[])
    w.gpu["processes"] = [{"name": "python3", "pid": 4711, "container_id": None}]


OBSTACLES: list[tuple[Callable[[World], None], str]] = [
    (
        unknown_distribution,
        "distribution: NVIDIA's packages are not known for this distribution (found rocky9, wanted ubuntu2204, "
        "ubuntu2404, debian12, debian13): install the driver by hand, and set glm_driver_mode: adopt",
    ),
    (
        adopt_nothing,
        "driver: no NVIDIA driver is loaded (found none, wanted branch 570): set glm_driver_mode: install",
    ),
    (
        adopt_nouveau,
        "driver: no NVIDIA driver is loaded (found nouveau, wanted branch 570): set glm_driver_mode: install",
    ),
    (
        adopt_what_is_not_loaded,
        "driver: no NVIDIA driver is loaded (found 570.211.01 installed and not loaded, wanted branch 570): "
        "set glm_driver_mode: install",
    ),
    (
        adopt_another_branch,
        "driver_branch: the loaded driver is of another branch (found 580.159.04, wanted 570.211.01 or another of "
        "branch 570): set glm_driver_branch: 580 to keep it, or glm_driver_mode: upgrade to replace it",
    ),
    (
        adopt_another_version,
        "driver_version: the loaded driver is of another version (found 570.195.03, wanted 570.211.01): "
        'set glm_driver_version: "" to keep it, or glm_driver_mode: upgrade to replace it',
    ),
    (
        adopt_an_old_one,
        "driver_version: the driver is too old for the GPU (found 570.86.15, wanted 570.133.20 or later): "
        "set glm_driver_mode: upgrade",
    ),
    (
        adopt_the_closed_one,
        "open_module: the loaded kernel module is the closed one (found proprietary, wanted open): "
        "set glm_driver_mode: upgrade",
    ),
    (
        adopt_with_another_fabric_manager,
        "fabric_manager: the fabric manager does not fit the driver (found 570.195.03, wanted 570.211.01): "
        "set glm_driver_mode: install to have the one of the driver's version",
    ),
    (
        adopt_a_mix,
        "packages: packages of another branch or origin are installed (found libnvidia-compute-580 "
        "580.95.05-1ubuntu1, wanted branch 570 of NVIDIA's alone): "
        "remove them, or set glm_driver_remove_conflicting: true and glm_driver_mode: install",
    ),
    (
        adopt_changed_libraries,
        "reboot: a reboot is needed and not allowed (found 570.195.03 loaded, while 570.211.01 is installed): "
        "set glm_allow_reboot: true, or install the packages of 570.195.03 again",
    ),
    (
        version_of_another_branch,
        "driver_version: the version is not of the branch (found glm_driver_version: 580.95.05, wanted one of branch "
        "570): set glm_driver_branch: 580, or glm_driver_version: 570.211.01",
    ),
    (
        install_too_old,
        "driver_version: the driver is too old for the GPU (found 570.86.15, wanted 570.133.20 or later): "
        "set glm_driver_version: 570.211.01",
    ),
    (
        unknown_version,
        "driver_version: apt has no 570.999.99 of nvidia-open-570, nvidia-driver-570-open, nvidia-dkms-570-open, "
        "libnvidia-compute-570 and 8 more (found 570.211.01, 570.195.03, wanted 570.999.99): "
        "set glm_driver_version to one of those, or glm_nvidia_apt_url to a repository that has it",
    ),
    (
        incomplete_version,
        "driver_version: apt has no 570.211.01 of libnvsdm-570 (found 570.195.03, wanted 570.211.01): "
        "set glm_driver_version to one of those, or glm_nvidia_apt_url to a repository that has it",
    ),
    (
        empty_repository,
        "driver_version: apt has no 570.211.01 of nvidia-open-570, nvidia-driver-570-open, nvidia-dkms-570-open, "
        "libnvidia-compute-570 and 8 more (found no version of all packages, wanted 570.211.01): "
        "set glm_nvidia_apt_url to a repository that has it",
    ),
    (
        no_toolkit,
        "packages: apt does not know all packages (found no cuda-toolkit-12-8, wanted any version): "
        "set glm_nvidia_apt_url to a repository that has them, or glm_cuda_toolkit: false to do without",
    ),
    (
        old_kernel,
        "kernel: the kernel is too old for branch 570 (found 5.4.0-200-generic, wanted 5.15 or later): "
        "install a newer kernel of the distribution and reboot the node",
    ),
    (
        no_headers,
        "kernel_headers: the driver cannot be built for the running kernel (found no linux-headers-6.8.0-60-generic, "
        "wanted it installed or in apt's lists): boot a kernel whose headers apt has (a newer one may be installed "
        "already: reboot), or add the source that this kernel came from",
    ),
    (
        signed_modules_only,
        "secure_boot: the kernel loads signed modules alone, and DKMS builds unsigned ones (found Secure Boot on, "
        "wanted off): turn Secure Boot off in the firmware, or enroll DKMS's key (`mokutil --import "
        "/var/lib/dkms/mok.pub`), install and load the driver by hand, and run again",
    ),
    (
        nouveau,
        "nouveau: nouveau holds the GPUs, and goes with a reboot only (found nouveau loaded, wanted no other driver): "
        "set glm_allow_reboot: true",
    ),
    (
        another_source,
        "apt_sources: other sources of drivers would mix in their packages (found https://ppa/graphics-drivers noble "
        "main in /etc/apt/sources.list.d/graphics-drivers.list, wanted none): "
        "remove them, or set glm_driver_remove_conflicting: true",
    ),
    (
        a_source_among_others,
        "apt_sources: other sources of drivers would mix in their packages (found https://x/cuda / in "
        "/etc/apt/sources.list, wanted none): take them out of /etc/apt/sources.list, which holds other sources, too",
    ),
    (
        packages_of_another_branch,
        "packages: packages of another branch or origin are installed (found libnvidia-compute-580 "
        "580.95.05-1ubuntu1, wanted branch 570 of NVIDIA's alone): "
        "remove them, or set glm_driver_remove_conflicting: true",
    ),
    (
        packages_of_ubuntu,
        "packages: packages of another branch or origin are installed (found nvidia-utils-570 "
        "570.211.01-0ubuntu0.24.04.1, linux-modules-nvidia-570-open-6.8.0-60-generic 6.8.0-60.63, wanted branch 570 "
        "of NVIDIA's alone): remove them, or set glm_driver_remove_conflicting: true",
    ),
    (
        reboot_needed,
        "reboot: a reboot is needed and not allowed (found 570.195.03 loaded, while 570.211.01 would be installed): "
        "set glm_allow_reboot: true",
    ),
    (
        reboot_left_over,
        "reboot: a reboot is needed and not allowed (found 570.195.03 loaded, while 570.211.01 is installed): "
        "set glm_allow_reboot: true",
    ),
    (
        engine_serves,
        "serving: the GPUs are at work (found glm-engine.service, wanted a drained node): "
        "run playbooks/driver.yml, which drains the node first",
    ),
    (
        another_container,
        "serving: the GPUs are at work (found container notebook, wanted a drained node): "
        "stop it, or wait until it has ended",
    ),
    (
        another_process,
        "serving: the GPUs are at work (found python3 (pid 4711), wanted a drained node): "
        "stop it, or wait until it has ended",
    ),
]


@pytest.mark.parametrize(("broken", "line"), OBSTACLES, ids=[broken.__name__ for broken, _ in OBSTACLES])
def test_each_obstacle_has_its_one_line(world: World, broken: Callable[[World], None], line: str) -> None:
    broken(world)
    assert world.found() == [line]


def test_every_rule_has_an_obstacle() -> None:
    """A rule that no obstacle breaks would be a rule that no test has seen speak."""
    spoke = set()
    for broken, _ in OBSTACLES:
        world = World()
        broken(world)
        context = driver.Context(world.info, world.gpu, world.package_set, world.wanted)
        spoke |= {rule.__name__ for rule in driver.RULES if list(rule(context))}
    assert spoke == {rule.__name__ for rule in driver.RULES}


def test_obstacles_are_listed_together(world: World) -> None:
    for broken in (reboot_needed, another_source, signed_modules_only):
        broken(world)
    world.info["installed"].pop("nvidia-dkms-570-open")
    assert [line.split(":")[0] for line in world.found()] == ["secure_boot", "apt_sources", "reboot"]


# ---- what lifts an obstacle


def test_a_drained_node_does_not_serve(world: World) -> None:
    engine_serves(world)
    world.wanted["drained"] = True
    assert world.found() == []


@pytest.mark.parametrize("broken", [nouveau, reboot_needed, reboot_left_over, adopt_changed_libraries])
def test_an_allowed_reboot(world: World, broken: Callable[[World], None]) -> None:
    broken(world)
    world.wanted["allow_reboot"] = True
    assert (world.found(), world.plan()["reboot"]) == ([], True)


def test_a_driver_of_dkms_that_is_loaded_proves_its_key(world: World) -> None:
    world.have("570.195.03")
    world.wanted.update(mode="upgrade", allow_reboot=True)
    signed_modules_only(world)
    assert world.found() == []


def test_headers_that_apt_has_not_read_yet(world: World) -> None:
    world.info.update(headers=False, headers_candidate=None)
    assert world.found() == []


def test_packages_that_go_with_no_driver(world: World) -> None:
    world.info["installed"] = {
        "nvidia-container-toolkit": "1.18.1-1",
        "libnvidia-container1": "1.18.1-1",
        "nvidia-cuda-toolkit": "12.0.140~12.0.1-4build4",
        "nvidia-settings": "580.95.05-1ubuntu1",
        "cuda-keyring": "1.1-1",
        "cuda-compat-13-0": "580.95.05-0ubuntu1",
        "libnvsdm-570": "570.211.01-1",
        "nvidia-firmware-570-570.211.01": "570.211.01-1ubuntu1",
    }
    assert world.found() == []


@pytest.mark.parametrize(
    ("name", "version", "branch"),
    [
        ("nvidia-open-570", "570.211.01-1ubuntu1", 570),
        ("nvidia-modprobe", "580.95.05-1ubuntu1", 580),
        ("cuda-drivers", "575.57.08-1", 575),
        ("linux-modules-nvidia-570-open-6.8.0-60-generic", "6.8.0-60.63", 570),
        ("nvidia-driver-570", "580.95.05-0ubuntu0.24.04.1", 580),  # a shell that pulls another branch
        ("libcuda1", "550.163.01-2", 550),
        ("nvlsm", "2025.03.11-1", None),
        ("cuda-compat-12-8", "570.172.08-0ubuntu1", None),
        ("datacenter-gpu-manager-4-cuda12", "1:4.2.3-1", None),
    ],
)
def test_branch_of_a_package(name: str, version: str, branch: int | None) -> None:
    assert driver.branch_of(name, version) == branch


# ---- afterwards


@pytest.mark.parametrize("mode", ["adopt", "install", "upgrade"])
def test_nothing_is_wrong_where_all_went_well(world: World, mode: str) -> None:
    world.have("570.211.01")
    world.wanted["mode"] = mode
    world.gpu["gpus"] = [{"index": i, "fabric_state": "Completed"} for i in range(8)]
    world.info["services"] = {"nvidia-persistenced.service": {"load": "loaded", "active": "active", "enabled": None}}
    assert world.wrong() == []


def test_what_went_wrong(world: World) -> None:
    world.have("570.211.01")
    world.wanted["mode"] = "upgrade"
    world.load("570.195.03")
    world.info["installed"]["nvidia-persistenced"] = "580.95.05-1ubuntu1"
    world.info["held"].remove("nvlsm")
    world.info["modules"] = ["nvidia", "mlx5_core", "mlx5_ib"]
    world.info["fabric_manager_version"] = "570.211.01"
    world.info["services"] = {
        "nvidia-persistenced.service": {"load": "loaded", "active": "failed", "enabled": "enabled"},
        "nvidia-dcgm.service": {"load": "not-found", "active": "inactive", "enabled": None},
    }
    world.gpu["gpus"] = [{"index": 0, "fabric_state": "Completed"}, {"index": 1, "fabric_state": "In Progress"}]
    assert world.wrong() == [
        "driver: the loaded driver is not the wanted one (found 570.195.03, wanted 570.211.01): reboot",
        "packages: versions differ (found nvidia-persistenced 580.95.05-1ubuntu1, wanted 570.211.01): "
        "see /var/log/apt/term.log",
        "packages: packages are not on hold (found nvlsm, wanted hold): see `apt-mark hold`",
        "fabric_manager: the fabric manager does not fit the driver (found 570.211.01, wanted 570.195.03): "
        "see `apt policy` of its package",
        "modules: the fabric's modules are not loaded (found no ib_umad, wanted them before its manager): "
        "run modprobe with them, and see the kernel log",
        "fabric: the NVLink fabric is not ready (found In Progress on GPU 1, wanted Completed): "
        "see `systemctl status nvidia-fabricmanager`",
        "services: services do not run (found nvidia-persistenced.service failed, wanted active): "
        "see journalctl -u of them",
    ]


def test_no_driver_afterwards(world: World) -> None:
    world.have("570.211.01")
    world.info.update(loaded=None, fabric_manager_version=None)
    assert world.wrong() == [
        "driver: the driver is not loaded (found none, wanted 570.211.01): "
        "run `modprobe nvidia`, see `journalctl -k -g NVRM`"
    ]


def test_a_driver_that_does_not_work_afterwards(world: World) -> None:
    world.have("570.211.01")
    world.gpu["driver"]["error"] = "no GPU answers"
    assert world.wrong() == [
        'driver: the driver does not work (found "no GPU answers", wanted an answer from nvidia-smi): '
        "see `journalctl -k -g NVRM`"
    ]


# ---- a transaction that failed

COMMAND = (
    "'/usr/bin/apt-get -y -o \"Dpkg::Options::=--force-confold\" install 'nvidia-dkms-570-open=570.211.01*'' failed: "
)
DPKG = COMMAND + "E: Sub-process /usr/bin/dpkg returned an error code (1)\n"


def failure(world: World, message: str) -> str:
    line = driver.driver_failure(message, world.info)
    assert "\n" not in line
    return line


def test_dkms_failure(world: World) -> None:
    world.load("570.195.03")
    world.info["half"] = ["nvidia-dkms-570-open", "nvidia-open-570"]
    path = "/var/lib/dkms/nvidia/570.211.01/build/make.log"
    lines = ["nv-mmap.c:481:5: error: implicit declaration of 'vm_flags_set'", "make: *** [Makefile:82] Error 2"]
    world.info["dkms_log"] = {"version": "570.211.01", "path": path, "lines": lines}
    assert failure(world, DPKG) == (
        "dkms: the module 570.211.01 could not be built for the kernel 6.8.0-60-generic (found "
        "\"nv-mmap.c:481:5: error: implicit declaration of 'vm_flags_set' | make: *** [Makefile:82] Error 2\" at the "
        f"end of {path}, wanted a module), the old driver 570.195.03 is still loaded: mend what it names, or set "
        "glm_driver_version to a version that builds, then run again"
    )


def test_dkms_failure_without_headers(world: World) -> None:
    world.info.update(half=["nvidia-dkms-570-open"], headers=False)
    assert failure(world, DPKG) == (
        'dkms: the module could not be built for the kernel 6.8.0-60-generic (found "Sub-process /usr/bin/dpkg '
        'returned an error code (1)", wanted a module), no driver is loaded: install linux-headers-6.8.0-60-generic, '
        "or set glm_driver_version to a version that builds, then run again"
    )


def test_an_old_log_of_dkms_explains_nothing_else(world: World) -> None:
    world.info["dkms_log"] = {"version": "570.195.03", "path": "/x", "lines": ["error: old"]}
    assert failure(world, DPKG) == (
        "apt: Sub-process /usr/bin/dpkg returned an error code (1), no driver is loaded: "
        "see /var/log/apt/term.log on the node, then run again"
    )


LOCKED = (
    "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 4711 (unattended-upgr)\n"
    "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process using it?\n"
)


def test_lock_failure(world: World) -> None:
    line = "apt_lock: dpkg's lock was not free in time (found {}, wanted it free): let it end, then run again"
    assert failure(world, LOCKED) == line.format("unattended-upgr (pid 4711)")
    world.info["lock"] = {"pid": 12, "process": "apt-get upgrade"}
    assert failure(world, LOCKED) == line.format("apt-get upgrade (pid 12)")
    world.info["lock"] = None
    said = "Failed to lock apt for exclusive operation: Failed to lock directory /var/lib/apt/lists/"
    assert failure(world, said) == line.format("a process that has ended meanwhile")


def test_disk_failure(world: World) -> None:
    world.load("570.195.03")
    world.info["half"] = ["nvidia-dkms-570-open"]
    world.info["disk_free"] = {"/": 0, "/usr": 0, "/var": 500 * GIB, "/boot": GIB}
    line = (
        "disk_space: the disk is full (found 0.0 GiB on /, 0.0 GiB on /usr free, wanted room for the packages), the "
        "old driver 570.195.03 is still loaded: free space, then run again: what dpkg left half done is finished first"
    )
    assert failure(world, DPKG) == line
    world.info["disk_free"] = {"/var": 2 * GIB}
    assert "found 2.0 GiB on /var free" in failure(world, COMMAND + "E: You don't have enough free space in /var.\n")


def test_words_of_apt(world: World) -> None:
    assert failure(world, COMMAND + "E: Unable to correct problems, you have held broken packages.\n") == (
        "apt: Unable to correct problems, you have held broken packages.: "
        "set glm_driver_remove_conflicting: true, or another glm_driver_version"
    )
    assert failure(world, "E:The repository 'https://mirror.example  InRelease' is not signed.").endswith(
        ": set glm_nvidia_apt_key_fingerprint to the fingerprint of the repository's key"
    )
    assert failure(world, "Failed to update apt cache: W:Failed to fetch https://mirror.example/InRelease").endswith(
        ": check glm_nvidia_apt_url"
    )


def test_the_line_of_another_task_stays_as_it_is(world: World) -> None:
    line = "the packages would bring another kernel (linux-image-6.8.0-71-generic): set glm_driver_version"
    assert failure(world, line) == line


# ---- as Ansible loads them


def test_ansible_loads_the_filters_that_share_code(tmp_path: Path, world: World) -> None:
    """It puts no folder of the project on the path, as the tests do."""
    expression = "{{ seen.info | glm.fleet.driver_plan({}, seen.package_set, seen.wanted) | to_json }}"
    (tmp_path / "seen.json").write_text(json.dumps({"seen": vars(world)}))
    command = ["ansible", "localhost", "--inventory", "localhost,", "--connection", "local", "--extra-vars"]
    command += [f"@{tmp_path}/seen.json", "--module-name", "ansible.builtin.debug", "--args", f"msg='{expression}'"]
    environment = {**os.environ, "ANSIBLE_BECOME": "false", "PYTHONPATH": "", "ANSIBLE_FORCE_COLOR": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "570.211.01" in done.stdout
    assert "[WARNING]" not in done.stderr


def test_the_way_back() -> None:
    before = {"nvidia-open-570": "570.1-1", "libcuda1": "570.1-1", "kept": "1"}
    now = {"nvidia-open-570": "570.2-1", "kept": "1", "nvidia-driver-pinning-570.2": "1"}
    assert driver.packages_back(now, before) == [
        "libcuda1=570.1-1",
        "nvidia-open-570=570.1-1",
        "nvidia-driver-pinning-570.2-",
    ]
    assert driver.packages_back(before, before) == []
