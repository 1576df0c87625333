"""The host: what a node shows as it is judged, before anything is changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import NODES, Case, cases
from machines import Machine

XID = "NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus."
NVLINK = "NVRM: Xid (PCI:0000:52:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 0x00000000 0x00000000)"
SXID = "nvidia-nvswitch0: SXid (PCI:0000:07:00.0): 20034, Fatal, Link 30 LTSSM Fault Up"
DROP = "NVRM: GPU 0000:43:00.0: GPU has fallen off the bus."


def kernel_says(line: str) -> Callable[[Machine], AbstractContextManager[None]]:
    """A line in the kernel log of the node, until the journal forgets it as after a reboot."""

    @contextmanager
    def said(node: Machine) -> Iterator[None]:
        # The journal takes no record with a number below those that it has seen.
        node.run(f"printf '4,{time.time_ns()},0,-;{line}\\n' > /dev/kmsg")
        node.run(f"for _ in $(seq 50); do journalctl -kq | grep -qF '{line}' && exit; sleep 0.1; done; exit 1")
        try:
            yield
        finally:
            node.run("journalctl --quiet --rotate && journalctl --quiet --vacuum-time=1s")

    return said


@contextmanager
def small_shm(node: Machine) -> Iterator[None]:
    size = node.run("findmnt -no SIZE -b /dev/shm").strip()
    node.run("mount -o remount,size=64m /dev/shm")
    try:
        yield
    finally:
        node.run(f"mount -o remount,size={size} /dev/shm")


LATE = "/usr/local/bin/python3-late"
LATE_FILES = {
    "/usr/local/lib/late/sitecustomize.py": "import time\nnow = time.time\ntime.time = lambda: now() - 3600\n",
    LATE: '#!/bin/sh\nPYTHONPATH=/usr/local/lib/late exec /usr/bin/python3 "$@"\n',
}


@contextmanager
def late_clock(node: Machine) -> Iterator[None]:
    """Containers share the kernel's clock, so it is the Python of the node that is an hour late."""
    node.run("mkdir -p /usr/local/lib/late")
    for path, content in LATE_FILES.items():
        node.run(f"cat > {path} && chmod 755 {path}", stdin=content)
    try:
        yield
    finally:
        node.run(f"rm -rf {' '.join(LATE_FILES)} /usr/local/lib/late")


# How the canary is broken, the settings of the run, and the one line.
FAULTS: dict[str, tuple[Callable[[Machine], AbstractContextManager[None]], dict[str, Any], str]] = {
    "7 of 8 GPUs": (
        lambda node: node.machine(count=7),
        {},
        r"^gpu_count: the number of GPUs is wrong \(found 7, wanted 8\)",
    ),
    "the fabric is in progress": (
        lambda node: node.machine(gpus={"3": {"fabric_state": "In Progress", "fabric_status": "N/A"}}),
        {},
        r"^fabric: the NVLink fabric is not ready \(found In Progress/N/A on GPU 3",
    ),
    "the driver is too old": (
        lambda node: node.machine(),
        {"preflight_min_driver_version": "570.900.00"},
        r"^driver_version: the driver is too old for the GPU",
    ),
    "library and module differ": (
        lambda node: node.other_library("570.195.03"),
        {},
        r"^(reboot|driver_library): ",
    ),
    "a fatal Xid": (kernel_says(XID), {}, r"^xid: .*Xid 79 \(GPU has fallen off the bus\) on 0000:1b:00"),
    "a fatal NVLink error": (kernel_says(NVLINK), {}, r"^xid: .*Xid 149 \(NVLink NETIR error, fatal\) on 0000:52:00"),
    "a fatal NVSwitch error": (kernel_says(SXID), {}, r"^sxid: .*SXid 20034 \(LTSSM Fault Up\)"),
    "a GPU off the bus without an Xid": (kernel_says(DROP), {}, r"^bus_drop: "),
    "a GPU that wants a reset": (
        lambda node: node.machine(gpus={"2": {"recovery_action": "Reset"}}),
        {},
        r"^gpu_recovery: ",
    ),
    "ECC errors that count": (lambda node: node.machine(gpus={"5": {"ecc_volatile_dram": 3}}), {}, r"^ecc: "),
    "a row remap that failed": (
        lambda node: node.machine(gpus={"5": {"remapped_failure": "Yes"}}),
        {},
        r"remap",
    ),
    "a small /dev/shm": (small_shm, {}, r"^shared_memory: "),
    "no inodes left": (
        lambda node: node.small_disk("/srv/few", "8g", "nr_inodes=40"),
        {"glm_data_dir": "/srv/few"},
        r"^inodes: ",
    ),
    "a foreign process on a GPU": (
        lambda node: node.machine(processes=[{"gpu": 0, "pid": 1, "name": "/usr/bin/python3", "memory": 1024}]),
        {},
        r"^gpu_process: ",
    ),
}
VITAL = ("7 of 8 GPUs", "library and module differ")


@pytest.mark.parametrize("name", cases(FAULTS, VITAL))
def test_it_is_refused(name: str, case: Case) -> None:
    fault, settings, line = FAULTS[name]
    with fault(case.node()):
        run = case.play(**case.next(**settings))
    case.refused(run, line)
    assert [case.fleet.engine(node) for node in NODES] == case.engines


@pytest.mark.fault("a clock an hour late")
def test_a_late_clock_is_refused(case: Case, tmp_path: Path) -> None:
    line = "faults-1: {ansible_host: 198.18.72.10"
    inventory = case.fleet.other_inventory(tmp_path, line, f"{line}, ansible_python_interpreter: {LATE}")
    with late_clock(case.node()):
        run = case.play(inventory=inventory, **case.next())
    case.refused(run, r"^clock: the clock differs")


@pytest.mark.fault("the CDI file is gone")
def test_the_cdi_file_is_made_again(case: Case, release: str) -> None:
    case.node().run("rm -f /etc/cdi/nvidia.yaml /var/run/cdi/nvidia.yaml")
    case.converged(case.play(**case.next()), "made again as the node was prepared, before its turn")
    assert case.node().run("ls /etc/cdi/nvidia.yaml /var/run/cdi/nvidia.yaml 2>/dev/null; true").strip()


@pytest.mark.fault("the container toolkit is gone")
def test_the_toolkit_is_installed_again(case: Case, release: str) -> None:
    packages = case.node().run("dpkg-query -W -f '${Package}\\n' 'nvidia-container-toolkit*'").split()
    case.node().run(f"dpkg --purge --force-depends {' '.join(packages)}")
    case.node().run("! command -v nvidia-ctk")  # fails where it is there still
    case.converged(case.play(**case.next()), "installed again as the node was prepared, before its turn")
    assert case.node().run("command -v nvidia-ctk").strip()


@pytest.mark.fault("a foreign process takes a GPU between stop and start")
def test_a_gpu_that_is_held_after_the_stop(case: Case, release: str) -> None:
    node = case.node()
    node.run("systemd-run --quiet --unit=thief sleep 600")
    pid = int(node.run("systemctl show thief --property MainPID --value"))
    thief = {"gpu": 0, "pid": pid, "name": "/usr/bin/sleep", "memory": 1024}
    try:
        with ExitStack() as faults:
            acting = case.during("stopping", lambda: faults.enter_context(node.machine(processes=[thief])))
            run = case.play(seconds=300, **case.next(inference_service_gpu_free_timeout=15))
            acting.join()
    finally:
        node.run("systemctl stop thief")
    case.rolled_back(run, rf"A GPU was still held 15 s after the engine's stop, by process {pid}", release)


@pytest.mark.fault("a reboot while the engine starts")
def test_a_reboot_in_the_middle(case: Case, release: str) -> None:
    """The run loses the node, and leaves it out of rotation; the next one finishes what was begun."""
    acting = case.during("starting", lambda: case.node().run("systemctl reboot", check=False))
    run = case.play(seconds=500, **case.next(light_load_seconds="20"), inference_service_reconnect_timeout=5)
    acting.join()
    first = (
        "finished all the same"
        if run.code == 0
        else f"the run ended ({run.messages[-1].splitlines()[0] if run.messages else 'node lost'})"
    )
    deadline = time.monotonic() + 120
    while case.node().run("systemctl is-active ssh docker", check=False).split() != ["active", "active"]:
        assert time.monotonic() < deadline
        time.sleep(1)
    settings = {"light_release": "after the reboot"}
    case.converged(case.play(seconds=400, **settings), f"{first}; the next run converged")


@pytest.mark.fault("dockerd restarts while the engine starts")
def test_dockerd_restarts_in_the_middle(case: Case, release: str) -> None:
    acting = case.during("starting", lambda: case.node().run("systemctl restart docker"))
    run = case.play(seconds=400, **case.next(light_load_seconds="20"))
    acting.join()
    if run.code == 0:
        case.converged(run, "the engine was started once more, and the rollout went on")
    else:
        case.rolled_back(run, r"faults-1: release .* failed: .*serves again", release)
