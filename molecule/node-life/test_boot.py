"""Boots without Ansible: each ends in serving, as soon as the node has what the engine needs."""

from __future__ import annotations

import re
import time

import pytest
from conftest import NODE, Life

TOOLKITS = ("1.18.1", "1.19.0", "1.20.0")
MODELS = "/var/lib/glm/models"
MACHINE = "/etc/nvidia-stand-in/machine.json"


@pytest.mark.parametrize("version", TOOLKITS)
def test_a_boot_ends_in_serving_with_each_container_toolkit(version: str, node: Life) -> None:
    names = ("nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools")
    packages = " ".join(f"{name}={version}-1" for name in (*names, "libnvidia-container1"))
    node.run(f"apt-get install -y -q --allow-downgrades --allow-change-held-packages {packages}")
    said = node.run("systemd-analyze verify --man=no --recursive-errors=yes multi-user.target 2>&1", check=False)
    assert "cycle" not in said, said
    node.reboot()
    node.wait(node.serves)
    assert node.run("nvidia-ctk --version").strip().endswith(version)
    assert "ordering cycle" not in node.run("journalctl --boot --no-pager --grep='ordering cycle'", check=False)


def test_docker_that_is_slow_is_waited_for(node: Life) -> None:
    node.drop_in("docker.service", "[Service]\nExecStartPre=/bin/sleep 25\n")
    try:
        node.reboot()
        node.wait(lambda: node.waits_for("Docker, which does not answer") or node.serves())
        node.wait(node.serves)
    finally:
        node.remove_drop_in("docker.service")


def test_a_cdi_file_that_the_boot_could_not_write_is_written_later(node: Life) -> None:
    """The unit ran before the driver was there, and does not run again by itself."""
    node.drop_in("nvidia-cdi-refresh.service", "[Unit]\nConditionPathExists=/root/the-driver-is-there\n")
    try:
        node.reboot()
        node.wait(lambda: node.waits_for("the CDI device nvidia.com/gpu=all"))
        node.run("touch /root/the-driver-is-there")
        node.wait(node.serves)
    finally:
        node.run("rm -f /root/the-driver-is-there")
        node.remove_drop_in("nvidia-cdi-refresh.service")


def test_a_fabric_that_takes_minutes_is_waited_for(node: Life) -> None:
    """CUDA would end in error 802 until all GPUs have joined it."""
    state = '{"all": {"fabric_state": "In Progress", "fabric_status": "N/A"}}'
    node.run(f"mkdir -p $(dirname {MACHINE}) && cat > {MACHINE}", stdin=state)
    try:
        node.reboot()
        node.wait(lambda: node.waits_for("the NVLink fabric, which is In Progress"))
        assert not node.engine()
    finally:
        node.run(f"rm -f {MACHINE}")
    node.wait(node.serves)


class LateDisk:
    """The weights on a disk of their own, which a unit mounts when the test says so: nofail, as a provider has it."""

    def __init__(self, node: Life) -> None:
        self.node = node

    def __enter__(self) -> LateDisk:
        self.node.run(f"systemctl stop glm-engine && mkdir -p /srv/disk /srv/empty && mv {MODELS} /srv/disk/models")
        self.node.run(f"mkdir {MODELS}")
        return self

    def mount(self, what: str = "/srv/disk/models") -> None:
        self.node.run(f"mount --bind {what} {MODELS}")

    def __exit__(self, *_: object) -> None:
        self.node.run(f"umount {MODELS}; rmdir {MODELS} && mv /srv/disk/models {MODELS}", check=False)


def test_a_disk_that_is_mounted_late_is_waited_for_and_the_root_disk_is_left_alone(node: Life) -> None:
    with LateDisk(node) as disk:
        node.reboot()
        node.wait(lambda: node.waits_for(f"the weights: {MODELS}"))
        assert "is its disk mounted" in node.status()
        assert not node.engine()
        assert node.run(f"ls {MODELS}") == "", "something was made where the disk is not"
        disk.mount()
        node.wait(node.serves)
        node.run("systemctl stop glm-engine")
    node.run("systemctl start glm-engine")
    node.wait(node.serves)


@pytest.mark.parametrize("kind", ["never", "empty"])
def test_a_disk_that_does_not_come_is_named_and_the_start_tried_again_for_ever(kind: str, node: Life) -> None:
    """With a bound of seconds, where a real one is 15 minutes."""
    release = node.run("readlink -f /opt/glm/current/release.json").strip()
    node.run(f'cp {release} /root/release.json && sed -i \'s/"timeout": 900/"timeout": 3/\' {release}')
    node.drop_in("glm-engine.service", "[Service]\nRestartSec=1\n")
    try:
        with LateDisk(node) as disk:
            if kind == "empty":
                disk.mount("/srv/empty")
            node.run("systemctl start --no-block glm-engine")
            node.wait(lambda: "after 2 failures in a row" in node.said() or "after 2 failures" in node.status())
            said = node.said()
            assert re.search(rf"glm: error: not ready after \d+ s: waits for the weights: {MODELS}/\S+", said)
            assert int(node.run("systemctl show glm-engine --property=NRestarts --value")) >= 2
            if kind == "empty":
                node.run(f"umount {MODELS}")
            disk.mount()
            # Nobody starts it: the pause of 30 s ends, and it serves.
            node.wait(node.serves)
            node.run("systemctl stop glm-engine")
        node.run("systemctl start glm-engine")
        node.wait(node.serves)
    finally:
        node.run(f"cp /root/release.json {release}")
        node.remove_drop_in("glm-engine.service")


def test_a_node_that_was_drained_by_a_person_stays_out_over_a_boot(node: Life) -> None:
    run = node.fleet.play(playbook="playbooks/drain.yml")
    assert run.code == 0, run.messages
    node.reboot()
    node.wait(lambda: node.run("systemctl is-active glm-engine", check=False).strip() == "active")
    assert node.fleet.rotation(NODE)[NODE].startswith("out")
    assert not node.serves()
    run = node.fleet.play(playbook="playbooks/undrain.yml")
    assert run.code == 0, run.messages
    node.wait(node.serves)


def test_an_engine_that_keeps_failing_is_started_again_at_growing_intervals(node: Life) -> None:
    """After as many failures as one likes; a run does not wait for the next try."""
    run = node.run("readlink -f /opt/glm/current/run").strip()
    node.drop_in("glm-engine.service", "[Service]\nRestartSec=1\n")
    node.run("systemctl stop glm-engine")
    node.run(f"cp {run} /root/run && printf '#!/bin/sh\\necho RuntimeError: broken; exit 3\\n' > {run}")
    try:
        node.run("systemctl start --no-block glm-engine")
        node.wait(lambda: "start 3 in" in node.status())
        assert "after 2 failures in a row" in node.status()
        node.run(f"cp /root/run {run}")
        began = time.monotonic()
        assert node.fleet.play(seconds=200).code == 0
        assert node.serves()
        print(f"served {time.monotonic() - began:.0f} s after the run began")
    finally:
        node.run(f"cp /root/run {run}")
        node.remove_drop_in("glm-engine.service")
