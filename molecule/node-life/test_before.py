"""What was on a bare node before: refused in one line each, nothing changed, or waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from conftest import BOOT, IMAGES
from fleet import Fleet, provided
from machines import Machine
from testbed import ROOT, Play, docker

INVENTORY = ROOT / "molecule/node-life/before"
NODE, GATEWAY, EDGE = "before-1", "198.18.76.200", "http://198.18.76.200:8000"
# What snapd leaves where Docker is a snap, as far as it can be seen without snapd, which does not run in a container.
SNAP_UNIT = "/etc/systemd/system/snap.docker.dockerd.service"
SNAP = """[Unit]
Description=Service for snap application docker.dockerd
[Service]
ExecStart=/usr/bin/snap run docker.dockerd
[Install]
WantedBy=multi-user.target
"""
# A first boot whose last step takes as long as the test says. The rest would give the container other host keys, users
# and sources of packages.
SEED = "/var/lib/cloud/seed/nocloud"
FIRST_BOOT = f"""set -e
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends cloud-init
mkdir -p {SEED}
echo 'instance-id: one' > {SEED}/meta-data
cat > /etc/cloud/cloud.cfg.d/99-test.cfg <<'END'
datasource_list: [NoCloud]
network: {{config: disabled}}
cloud_init_modules: [seed_random]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts_user]
END
cat > {SEED}/user-data <<'END'
#cloud-config
runcmd:
- [sh, -c, 'until [ -e /root/go ]; do sleep 1; done']
END
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    play = Play(tmp_path_factory.mktemp("before"), INVENTORY)
    with provided(Fleet(play, (NODE,), {"before-gateway": EDGE}), "LIFE_KEEP", IMAGES) as fleet:
        yield fleet


@pytest.fixture
def node(fleet: Fleet) -> Machine:
    return fleet.machine(NODE)


def test_a_docker_of_a_snap_is_refused(fleet: Fleet, node: Machine) -> None:
    node.run(f"cat > {SNAP_UNIT} && systemctl daemon-reload", stdin=SNAP)
    try:
        before = node.snapshot()
        run = fleet.play()
        assert (run.code, run.findings()) == (2, ["docker_snap"])
        assert "`snap remove docker`" in run.line("docker_snap")
        assert node.snapshot() == before
    finally:
        node.run(f"rm {SNAP_UNIT} && systemctl daemon-reload")


@pytest.mark.parametrize(
    ("network", "cut"),
    [
        ("198.18.76.129/25", "198.18.76.200 (found a gateway of the fleet in 198.18.76.128/25"),
        ("198.18.76.2/26", "198.18.76.1 (found the controller, the default gateway in 198.18.76.0/26"),
    ],
    ids=["the gateways'", "the controller's"],
)
def test_a_network_of_dockers_that_overlaps_the_sites_is_refused(
    fleet: Fleet, node: Machine, network: str, cut: str
) -> None:
    """The one file that was there before is Docker's own, without Docker."""
    daemon = f'{{"bip": "{network}"}}'
    node.run("mkdir -p /etc/docker && cat > /etc/docker/daemon.json", stdin=daemon)
    try:
        before = node.snapshot()
        run = fleet.play()
        assert (run.code, run.findings()) == (2, ["docker_network"])
        assert f"Docker's own network would cut the way to {cut}" in run.line("docker_network")
        assert node.snapshot() == before
    finally:
        node.run("rm -r /etc/docker")


def test_a_first_boot_is_waited_for_with_a_bound(fleet: Fleet, node: Machine) -> None:
    node.run(FIRST_BOOT)
    docker("restart", "--time", "30", node.container)
    began = time.monotonic()
    while "status: running" not in node.run("cloud-init status", check=False):
        assert time.monotonic() - began < BOOT, node.run("cloud-init status --long; systemctl --failed", check=False)
        time.sleep(1)
    node.run("while systemctl list-jobs | grep -w running | grep -v cloud-final; do sleep 1; done")
    before = node.snapshot()
    run = fleet.play(preflight_cloud_init_timeout=5)
    assert (run.code, run.findings()) == (2, ["cloud_init"])
    assert "found it at work after" in run.line("cloud_init")
    assert node.snapshot() == before
    # Without a bound of seconds the same run goes on, once the boot has ended.
    process = fleet.begin()
    assert process.stdout
    said, task = "", "Read the node, once its first boot is done"
    try:
        for line in process.stdout:
            if task in line and task not in said:
                time.sleep(10)
                assert node.run("ls /root/go /usr/bin/docker", check=False) == ""
                node.run("touch /root/go")
            said += line
        assert process.wait() == 0, said[-3000:]
    finally:
        process.kill()
    assert "cloud-init still worked on the first boot (found it done after" in said
    assert node.run("cloud-init status").strip() == "status: done"
    assert fleet.ask(EDGE, "hello", 60, max_tokens=4) == 200
