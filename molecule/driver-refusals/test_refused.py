"""What cannot be done: one line that names the fix, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from driver_testbed import ADDRESS, ROLE, Node, said_once
from testbed import differences

Fault = Callable[[Node], AbstractContextManager[None]]
Case = tuple[Fault, dict[str, Any], tuple[str, ...]]
INSTALL = {"glm_driver_mode": "install"}
UPGRADE = {"glm_driver_mode": "upgrade"}


def nothing(_: Node) -> AbstractContextManager[None]:
    return nullcontext()


# what is broken, settings, words of the one line
BARE: dict[str, Case] = {
    "nothing to adopt": (nothing, {}, ("driver: no NVIDIA driver is loaded", "set glm_driver_mode: install")),
    "a branch that there is not": (nothing, {"glm_driver_branch": 560}, ("glm_driver_branch", "560", "570, 580")),
    "a version of another branch": (
        nothing,
        {**INSTALL, "glm_driver_version": "580.159.04"},
        ("driver_version: ", "580.159.04", "set glm_driver_branch: 580"),
    ),
    "a version that the repository lacks": (
        nothing,
        {**INSTALL, "glm_driver_version": "570.999.99"},
        ("driver_version: ", "570.211.01", "570.195.03", "570.133.20", "wanted 570.999.99", "glm_driver_version"),
    ),
    "a version too old for the GPU": (
        nothing,
        {**INSTALL, "glm_driver_version": "570.86.15"},
        ("driver_version: ", "570.86.15", "570.133.20", "set glm_driver_version: "),
    ),
    "a version that brings a kernel": (
        nothing,
        {**INSTALL, "glm_driver_version": "570.172.08"},
        ("another kernel", "linux-image-6.8.0-1099-nvidia", "set glm_driver_version"),
    ),
    "a repository that is not there": (
        nothing,
        {**INSTALL, "glm_nvidia_apt_url": f"http://{ADDRESS}:8080/nowhere"},
        ("404", "glm_nvidia_apt_url"),
    ),
    "a repository signed by another": (
        nothing,
        {**INSTALL, "glm_nvidia_apt_key_fingerprint": "0123456789ABCDEF0123456789ABCDEF01234567"},
        ("glm_nvidia_apt_key_fingerprint",),
    ),
    "no headers of the running kernel": (Node.no_headers, INSTALL, ("kernel_headers: ", "linux-headers-", "reboot")),
    "Secure Boot": (Node.secure_boot, INSTALL, ("secure_boot: ", "found Secure Boot on", "mokutil")),
    "nouveau": (Node.nouveau, INSTALL, ("nouveau: ", "set glm_allow_reboot: true")),
}
LOADED: dict[str, Case] = {
    "another branch": (
        nothing,
        {"glm_driver_branch": 580},
        ("driver_branch: ", "found 570.211.01", "580.159.04", "set glm_driver_branch: 570", "glm_driver_mode: upgrade"),
    ),
    "another version": (
        nothing,
        {"glm_driver_version": "570.195.03"},
        ("driver_version: ", "found 570.211.01, wanted 570.195.03", "glm_driver_mode: upgrade"),
    ),
    "a fabric manager of another version": (
        lambda node: node.fabric_manager("570.195.03", "570.211.01"),
        {},
        ("fabric_manager: ", "found 570.195.03, wanted 570.211.01", "set glm_driver_mode: install"),
    ),
    "a reboot that is not allowed": (
        nothing,
        {**UPGRADE, "glm_driver_version": "570.195.03"},
        ("reboot: ", "570.211.01", "570.195.03", "set glm_allow_reboot: true"),
    ),
    "another branch, and a reboot that is not allowed": (
        nothing,
        {**UPGRADE, "glm_driver_branch": 580},
        ("reboot: ", "570.211.01", "580.159.04", "set glm_allow_reboot: true"),
    ),
}


def refused(node: Node, case: Case, playbook: str = "playbooks/driver.yml") -> None:
    fault, settings, words = case
    with fault(node):
        before = node.snapshot()
        boot = node.boot()
        run = node.driver(playbook=playbook, seconds=180, **settings)
        after = node.snapshot()
    assert run.code != 0
    said_once(run, *words)
    assert differences(before, after) == []
    assert node.boot() == boot


@pytest.mark.parametrize("name", BARE)
def test_bare(name: str, bare: Node) -> None:
    refused(bare, BARE[name])


@pytest.mark.parametrize("name", LOADED)
def test_loaded(name: str, loaded: Node) -> None:
    refused(loaded, LOADED[name])


def test_serving(loaded: Node) -> None:
    """The role by itself drains nothing."""
    settings = {**UPGRADE, "glm_driver_version": "570.195.03", "glm_allow_reboot": True}
    refused(loaded, (Node.serving, settings, ("serving: ", "glm-engine.service", "run playbooks/driver.yml")), ROLE)


def test_all_that_is_wrong_is_said_at_once(bare: Node) -> None:
    with bare.nouveau(), bare.secure_boot():
        run = bare.driver(seconds=180, **INSTALL)
    assert run.code != 0
    said_once(run, "nouveau: ")
    said_once(run, "secure_boot: ")
