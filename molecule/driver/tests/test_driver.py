"""What nodes of five kinds are like once playbooks/driver.yml has run over them, read on the nodes themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

PACKAGE_SET: dict[str, Any] = yaml.safe_load((Path(__file__).resolve().parents[3] / "drivers/570.yml").read_text())
PINNED = {distribution: names + PACKAGE_SET["fabric"] for distribution, names in PACKAGE_SET["driver"].items()}
VERSION: str = PACKAGE_SET["version"]
ADOPTED, REPLACED, MIXED = "driver-570", "driver-580", "driver-mixed"
FLOATING = ("nvidia-persistenced", "nvidia-modprobe")


@pytest.fixture(name="name")
def fixture_name(host: Host) -> str:
    return str(host.check_output("hostname"))


@pytest.fixture(name="installed")
def fixture_installed(host: Host, name: str) -> str:
    """The node's name, where this run has installed the driver."""
    if name == ADOPTED:
        pytest.skip("adopted: nothing was installed")
    return name


@pytest.fixture(name="pinned")
def fixture_pinned(host: Host) -> list[str]:
    """What has the driver's version on this distribution."""
    return PINNED[host.system_info.distribution.capitalize()]


def packages(host: Host) -> dict[str, str]:
    listing = host.check_output("dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'")
    rows = [line.split() for line in listing.splitlines()]
    return {row[0]: row[1] for row in rows if row[-1] == "installed"}


def answers(host: Host, field: str) -> list[str]:
    return str(host.check_output(f"nvidia-smi --query-gpu={field} --format=csv,noheader")).splitlines()


def simulated(host: Host, pinned: list[str], *options: str) -> Any:
    """apt's plan on a node without packages; the versioned names have their version, the floating ones have none."""
    names = [f"{name}={VERSION}*" for name in pinned if name not in FLOATING]
    command = ["apt-get", "install", "--simulate", "-o", "Dir::State::status=/tmp/no-packages", *options, *names]
    with host.sudo():
        return host.run("touch /tmp/no-packages && LC_ALL=C " + " ".join([*command, *FLOATING]))


def test_all_packages_have_one_version(host: Host, pinned: list[str]) -> None:
    found = packages(host)
    wrong = {name: found.get(name) for name in pinned if not str(found.get(name)).startswith(f"{VERSION}-")}
    assert wrong == {}
    assert not [name for name, version in found.items() if "nvidia" in name and "580" in name + version]


def test_all_versions_that_count_are_equal(host: Host) -> None:
    module = host.check_output("cat /proc/driver/nvidia/version")
    assert f"Open Kernel Module for x86_64  {VERSION} " in module
    assert set(answers(host, "driver_version")) == {VERSION}
    assert host.check_output("nv-fabricmanager --version").endswith(f": {VERSION}")


def test_packages_are_held(host: Host, pinned: list[str]) -> None:
    held = set(host.check_output("apt-mark showhold").split())
    assert set(pinned) - held == set()
    assert "nvlsm" in held


def test_all_gpus_are_in_the_fabric_and_stay_initialised(host: Host) -> None:
    assert answers(host, "fabric.state") == ["Completed"] * 8
    assert answers(host, "persistence_mode") == ["Enabled"] * 8


@pytest.mark.parametrize("unit", ["nvidia-fabricmanager.service", "nvidia-persistenced.service"])
def test_daemons_run_and_start_at_boot(host: Host, unit: str) -> None:
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled


def test_the_infiniband_modules_came_before_the_fabric_manager(host: Host) -> None:
    """It refuses to start without ib_umad, and says so."""
    with host.sudo():
        journal = host.check_output("journalctl --no-pager --unit nvidia-fabricmanager.service")
    assert "Successfully configured all the available NVSwitches" in journal
    assert "has not been loaded" not in journal
    assert "Failed to start" not in journal


def test_the_infiniband_modules_are_there_and_come_again(host: Host) -> None:
    listed = host.check_output("cat /etc/modules-load.d/*.conf").split()
    for module in ("ib_umad", "mlx5_core", "mlx5_ib"):
        assert host.file(f"/sys/module/{module}").is_directory
        assert module in listed


def test_the_kernel_is_the_one_that_was_there(host: Host) -> None:
    assert (
        host.check_output("dpkg-query -W 'linux-image-*'")
        == host.file("/var/lib/before/kernels").content_string.strip()
    )


def test_only_the_node_with_another_module_was_rebooted(host: Host, name: str) -> None:
    boot, before = (
        host.check_output(f"cat {path}") for path in ("/proc/sys/kernel/random/boot_id", "/var/lib/before/boot_id")
    )
    assert (boot != before) == (name == REPLACED)


def test_apt_solves_it_with_the_pins(host: Host, pinned: list[str], installed: str) -> None:
    plan = simulated(host, pinned)
    assert plan.rc == 0, plan.stderr
    for name in FLOATING:
        assert re.search(rf"^Inst {name} \({re.escape(VERSION)}-", plan.stdout, re.M)


def test_a_floating_persistenced_breaks_it_without_the_pins(host: Host, pinned: list[str], installed: str) -> None:
    plan = simulated(
        host, pinned, "-o", "Dir::Etc::PreferencesParts=/var/empty", "-o", "Dir::Etc::Preferences=/dev/null"
    )
    assert plan.rc != 0
    assert "nvidia-persistenced : Depends: libnvidia-cfg1 (>= 580" in plan.stdout + plan.stderr


def test_the_source_is_signed_with_one_key(host: Host, installed: str) -> None:
    source = host.file("/etc/apt/sources.list.d/glm-nvidia-cuda.sources").content_string
    assert re.search(r"^Signed-By: \S+( [0-9A-F]{40}!?)?$", source, re.M)


def test_unattended_upgrades_leave_it_alone(host: Host) -> None:
    listed = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert "nvidia-" in listed
    assert "linux-" in listed


def test_nvcc_is_on_the_path(host: Host, installed: str) -> None:
    assert "release 12.8" in host.check_output("bash --login -c 'nvcc --version'")


def test_dcgm_runs(host: Host, installed: str) -> None:
    assert host.service("nvidia-dcgm.service").is_running
    assert host.service("nvidia-dcgm.service").is_enabled


def test_dpkg_has_nothing_left_to_do(host: Host) -> None:
    with host.sudo():
        assert host.check_output("dpkg --audit") == ""


def test_what_another_try_left_behind_is_gone(host: Host, name: str) -> None:
    if name != MIXED:
        pytest.skip("nobody tried here")
    assert not host.file("/etc/apt/sources.list.d/graphics-drivers-ppa.list").exists
    assert not [version for version in packages(host).values() if "580.159.04-0ubuntu" in version]
