"""The system's own updates, by the real needrestart and unattended-upgrades, on a node in use."""

from __future__ import annotations

import pytest
from conftest import NODE, Life

# What the engine's launcher, HAProxy and sshd have open.
LIBRARIES = "libssl3t64 libc6"
OVERRIDES = "/etc/needrestart/conf.d/glm.conf"


def processes(node: Life) -> dict[str, str]:
    units = ("glm-engine", "haproxy", "docker", "containerd")
    show = "systemctl show --property=MainPID --value"
    return {unit: node.run(f"{show} {unit}.service").strip() for unit in units}


@pytest.fixture
def needrestart(node: Life) -> Life:
    node.run("apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q needrestart")
    return node


def test_a_library_update_restarts_nothing_that_serves(needrestart: Life) -> None:
    node, before = needrestart, processes(needrestart)
    engine, ssh = node.engine(), node.run("systemctl show --property=MainPID --value ssh.service")
    update = f"DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get install -y -q --reinstall {LIBRARIES}"
    with node.fleet.load("an update of libssl and libc"):
        node.run(f"{update} && needrestart -r a -l", check=True)
    assert processes(node) == before
    assert node.engine() == engine
    # It did its work: what nothing of ours protects was restarted.
    assert node.run("systemctl show --property=MainPID --value ssh.service") != ssh
    # And it would have done it here, too.
    listed = node.run("needrestart -r l -l 2>&1", check=False)
    node.run(f"mv {OVERRIDES} /root/")
    try:
        unprotected = node.run("needrestart -r l -l 2>&1", check=False)
    finally:
        node.run(f"mv /root/glm.conf {OVERRIDES}")
    for unit in ("glm-engine.service", "haproxy.service"):
        assert unit in unprotected, unprotected
    print(listed)


def test_unattended_upgrades_pass_over_what_serves(node: Life) -> None:
    node.run("apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q unattended-upgrades")
    said = node.run("unattended-upgrade --dry-run --debug 2>&1", check=False)
    line = next(line for line in said.splitlines() if "blacklist" in line.lower())
    for package in ("haproxy$", "docker-ce", "containerd", "nvidia-"):
        assert package in line, said


def test_a_node_that_would_reboot_by_itself_is_refused_or_kept_from_it(node: Life) -> None:
    node.run("apt-get install -y -q unattended-upgrades")
    reboot = "apt-config dump Unattended-Upgrade::Automatic-Reboot"
    node.run("echo 'Unattended-Upgrade::Automatic-Reboot \"true\";' > /etc/apt/apt.conf.d/51reboot")
    try:
        engine, before = node.engine(), node.snapshot()
        run = node.fleet.play()
        assert (run.code, run.findings()) == (2, ["automatic_reboot"])
        assert "set glm_automatic_reboot: disable" in run.line("automatic_reboot")
        assert node.snapshot() == before
        run = node.fleet.play(glm_automatic_reboot="disable")
        assert run.code == 0, run.messages
        assert '"false"' in node.run(reboot)
        assert node.engine() == engine
    finally:
        node.run("rm -f /etc/apt/apt.conf.d/51reboot")
    run = node.fleet.play()
    assert run.code == 0, run.messages
    assert node.fleet.rotation(NODE)[NODE] == "in up"
