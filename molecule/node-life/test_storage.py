"""Weights on a file system that two nodes share: real GlusterFS, whose locks hold between them; sshfs, which has none.

Both come from the mirror, by FUSE: an NFS server would be the host's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from conftest import IMAGES
from fleet import Fleet, provided
from machines import Machine, Mirror
from testbed import ROOT, Play

INVENTORY = ROOT / "molecule/node-life/storage"
NODES, SERVER = ("storage-1", "storage-2"), "198.18.77.2"
EDGES = {"storage-1": "http://198.18.77.11:8000", "storage-2": "http://198.18.77.12:8000"}
INSTALL = "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends"
GLUSTER, SSHFS = "/mnt/gluster", "/mnt/sshfs"
MODEL = "zai-org--GLM-5.2-FP8/" + "1" * 40
SERVE = f"""set -e
{INSTALL} glusterfs-server
systemctl start glusterd
mkdir -p /srv/brick
gluster --mode=script volume create weights {SERVER}:/srv/brick force
gluster --mode=script volume start weights
systemctl start ssh
"""
MOUNT = f"{INSTALL} glusterfs-client && mkdir -p {GLUSTER} && mount -t glusterfs {SERVER}:/weights {GLUSTER}"
KEY = "test -e /root/.ssh/id_ed25519 || ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519"
SSH = "StrictHostKeyChecking=no,allow_other,default_permissions"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    play = Play(tmp_path_factory.mktemp("storage"), INVENTORY)
    with provided(Fleet(play, NODES, EDGES), "LIFE_KEEP", IMAGES) as fleet:
        Machine("glm-node-life-storage-mirror").run(f"test -d /srv/brick || {{ {SERVE} }}")
        for node in NODES:
            fleet.run(node, f"mountpoint -q {GLUSTER} || {{ {MOUNT}; }}")
        yield fleet


def serve(fleet: Fleet) -> bool:
    return all(fleet.ask(edge, "hello", 60, max_tokens=4) == 200 for edge in EDGES.values())


def fetched(fleet: Fleet, node: str) -> str:
    """How the last run of glm-weights.service ended."""
    journal = fleet.run(node, "journalctl --unit=glm-weights --output=cat --no-pager --grep='^complete:' --lines=1")
    return journal.strip()


@pytest.fixture
def sshfs(fleet: Fleet) -> Iterator[Machine]:
    """The first node, with a directory of the mirror; the second has none such."""
    node, server = fleet.machine(NODES[0]), Machine("glm-node-life-storage-mirror")
    node.run(f"{INSTALL} sshfs && mkdir -p -m 700 /root/.ssh && {KEY}")
    server.run("mkdir -p -m 700 /root/.ssh /srv/export && cat > /root/.ssh/authorized_keys",
               stdin=node.run("cat /root/.ssh/id_ed25519.pub"))  # fmt: skip
    node.run(f"mkdir -p {SSHFS} && sshfs -o {SSH} root@{SERVER}:/srv/export {SSHFS}")
    try:
        yield node
    finally:
        node.run(f"pkill -KILL -x sshfs; umount --lazy {SSHFS}; rmdir {SSHFS}", check=False)


def test_weights_where_locks_hold_for_one_node_alone_are_refused(fleet: Fleet, sshfs: Machine) -> None:
    before = sshfs.snapshot()
    run = fleet.play(glm_weights_dir=f"{SSHFS}/models")
    assert (run.code, run.findings()) == (2, ["weights_locks"])
    line = run.line("weights_locks")
    assert f"locks at {SSHFS} hold for one node alone (found fuse.sshfs, wanted" in line
    assert "set glm_weights_dir to a local path and glm_weights_sources to this one" in line
    assert sshfs.snapshot() == before
    assert sshfs.run(f"ls -A {SSHFS}") == ""


@pytest.mark.parametrize(
    ("fault", "found"),
    [("STOP", "no answer within 20 s"), ("KILL", "Transport endpoint is not connected")],
    ids=["hangs", "ended"],
)
def test_a_file_system_that_does_not_answer_is_refused(fleet: Fleet, sshfs: Machine, fault: str, found: str) -> None:
    """A process that has asked it cannot be ended by any signal."""
    before = sshfs.snapshot()
    sshfs.run(f"pkill -{fault} -x sshfs")
    run = fleet.play(glm_weights_sources=[f"{SSHFS}/models"], seconds=150)
    assert (run.code, run.findings()) == (2, ["storage"])
    assert f"the file system of {SSHFS}/models cannot be read (found {found}, wanted an answer)" in run.line(
        "storage: "
    )
    assert "glm_weights_sources" in run.line("storage: ")
    assert sshfs.snapshot() == before


def test_state_on_a_shared_file_system_is_refused(fleet: Fleet) -> None:
    run = fleet.play(glm_data_dir=f"{GLUSTER}/glm", glm_weights_dir=f"{GLUSTER}/models")
    assert (run.code, run.findings()) == (2, ["shared_state"] * 2)
    assert f"found fuse.glusterfs at {GLUSTER}" in run.lines("shared_state")[0]


def test_weights_that_both_share_are_fetched_once(fleet: Fleet) -> None:
    mirror = Mirror("glm-node-life-storage-mirror")
    # So that the second one comes while the first is at it.
    with mirror.hub(bytes_per_second=30000):
        run = fleet.play(seconds=900, glm_weights_dir=f"{GLUSTER}/models")
    assert run.code == 0, run.messages
    assert serve(fleet)
    ends = {node: fetched(fleet, node) for node in NODES}
    waited = [node for node, end in ends.items() if "fetched and checked by storage-" in end]
    assert len(waited) == 1, ends
    for node in NODES:
        mounted = fleet.run(node, "docker inspect glm-engine --format '{{json .Mounts}}'")
        assert f"{GLUSTER}/models/{MODEL}" in mounted
        assert fleet.state(node)["phase"] == "serving"
    # Nothing but the weights is there.
    assert fleet.run(NODES[0], f"ls {GLUSTER}").split() == ["models"]
    again = fleet.play(glm_weights_dir=f"{GLUSTER}/models")
    assert (again.code, again.recap("changed")) == (0, 0), again.messages


def test_weights_are_copied_from_there_to_the_disk(fleet: Fleet) -> None:
    """The hub has no more than the list."""
    with Mirror("glm-node-life-storage-mirror").hub(file=503):
        run = fleet.play(seconds=900, glm_weights_sources=[f"{GLUSTER}/models/{MODEL}"])
    assert run.code == 0, run.messages
    assert serve(fleet)
    for node in NODES:
        end = fetched(fleet, node)
        assert re.search(rf"(\S+ \wB): \1 from {GLUSTER}/models/{MODEL}$", end), end
        mounted = fleet.run(node, "docker inspect glm-engine --format '{{json .Mounts}}'")
        assert f"/var/lib/glm/models/{MODEL}" in mounted
        assert GLUSTER not in mounted
