"""What breaks in the middle: why, what is loaded now, and the next run goes on from there. In this order."""

from __future__ import annotations

import re

from driver_testbed import Node, said_once

BRANCH_580 = {"glm_driver_mode": "install", "glm_driver_branch": 580}
OLDER = {"glm_driver_mode": "upgrade", "glm_driver_version": "570.195.03", "glm_allow_reboot": True}
NEW, OLD = "580.159.04", "570.211.01"


def half_done(node: Node) -> str:
    return node.run("dpkg --audit").strip()


def test_the_disk_fills_up(bare: Node) -> None:
    with bare.full_disk("/usr/local/cuda-12.8"):
        run = bare.driver(**BRANCH_580)
    assert run.code != 0
    said_once(run, "disk_space: ", "run again")
    assert half_done(bare) != ""


def test_the_module_cannot_be_built(bare: Node) -> None:
    with bare.dkms_fails():
        run = bare.driver(**BRANCH_580)
    assert run.code != 0
    said_once(run, "dkms: ", NEW, "make: *** [Makefile:115: modules] Error 2", "no driver is loaded")
    assert bare.loaded() == ""


def test_the_next_run_finishes_it_once_the_lock_is_free(bare: Node) -> None:
    boot = bare.boot()
    with bare.lock(20):
        run = bare.driver(**BRANCH_580)
    assert run.code == 0, run.messages
    assert re.search(r"wait for dpkg's lock, held by .*unattended-upgrade.* \(pid \d+\)", run.output)
    assert half_done(bare) == ""
    assert bare.loaded() == NEW
    assert bare.boot() == boot
    held = bare.run("apt-mark showhold").split()
    assert {"nvidia-kernel-open-dkms", "nvidia-fabricmanager", "nvidia-persistenced", "nvlsm"} <= set(held)
    assert bare.run("nv-fabricmanager --version").strip().endswith(NEW)
    assert set(bare.run("nvidia-smi --query-gpu=fabric.state --format=csv,noheader").split()) == {"Completed"}


def test_nothing_is_left_to_do(bare: Node) -> None:
    run = bare.driver(**BRANCH_580)
    assert (run.code, run.recap("changed")) == (0, 0)


PACKAGES = (
    "dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\n' '*nvidia*' 'libcuda*' 'libnv*' | grep '[ih]i'"
)


def test_an_upgrade_whose_module_cannot_be_built_is_taken_back(loaded: Node) -> None:
    """Libraries of the new version beside the old module would let no container start."""
    boot, packages = loaded.boot(), loaded.run(PACKAGES)
    with loaded.dkms_fails("570.195.03"):
        run = loaded.driver(**OLDER)
    assert run.code != 0
    said_once(run, "dkms: ", "570.195.03", f"the old driver {OLD} is still loaded")
    assert (loaded.loaded(), loaded.boot()) == (OLD, boot)
    assert loaded.run(PACKAGES) == packages
    assert half_done(loaded) == ""
    assert OLD in loaded.run("nvidia-smi")


def test_an_upgrade_that_cannot_be_taken_back_is_said_so(loaded: Node) -> None:
    with loaded.dkms_fails():
        run = loaded.driver(**OLDER)
    assert run.code != 0
    said_once(run, "dkms: ", f"the packages of {OLD} could not be brought back (E: Sub-process /usr/bin/dpkg returned")
    assert loaded.loaded() == OLD


def test_the_next_run_upgrades_and_reboots(loaded: Node) -> None:
    boot = loaded.boot()
    run = loaded.driver(**OLDER)
    assert run.code == 0, run.messages
    assert loaded.boot() != boot
    assert loaded.loaded() == "570.195.03"
    assert half_done(loaded) == ""
    again = loaded.driver(**OLDER)
    assert (again.code, again.recap("changed")) == (0, 0)
