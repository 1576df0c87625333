"""The rules of preflight: a ready node has no findings; each fault has its one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import names, preflight
from ansible_collections.glm.fleet.plugins.modules import gpu_info

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "nvidia-smi"
KERNEL_LOGS = ROOT / "tests" / "fixtures" / "kernel-log"
GIB = 1024**3
Dict = dict[str, Any]


def seen_by_gpu_info(machine: str) -> Dict:
    folder = FIXTURES / machine
    smi = gpu_info.Output(0, (folder / "smi-q.xml").read_text())
    query = gpu_info.parse_query(smi.text)
    version = (folder / "proc-driver-nvidia-version.txt").read_text()
    manager = folder / "nv-fabricmanager-version.txt"
    return asdict(
        gpu_info.Report(
            driver=gpu_info.build_driver(version, smi, query, None),
            gpus=query.gpus,
            processes=query.processes,
            links=gpu_info.parse_topology((folder / "topo.txt").read_text()),
            fabric_manager_version=gpu_info.parse_fabric_manager_version(manager.read_text())
            if manager.exists()
            else None,
            kernel_log=gpu_info.parse_kernel_log("NVRM: loading\n"),
            pci=[gpu.pci_address for gpu in query.gpus],
        )
    )


def kernel_log(name: str) -> str:
    return (KERNEL_LOGS / name).read_text(encoding="utf-8")


def free_port() -> Dict:
    return {"listening": False, "address": None, "process": None, "pid": None, "unit": None, "container": None}


@pytest.fixture
def node() -> Dict:
    disk: Dict = {"free_bytes": 20000 * GIB, "total_bytes": 22000 * GIB, "free_inodes": 10**9, "total_inodes": 10**9}
    disk |= {"mount": "/", "type": "ext4", "shared": False, "local_locks": "", "writable": True}
    return {
        "arch": "x86_64",
        "memory_bytes": 2900 * GIB,
        "shm_bytes": 1450 * GIB,
        "nofile_limit": 1073741816,
        "clock": {"synchronized": True, "begun": 0.0, "ended": 1.0, "offset_seconds": 0.4},
        "disks": {path: {**disk} for path in ("/var/lib/glm", "/var/lib/docker")},
        "storage": {},
        "ports": {"8000": free_port(), "8001": free_port()},
        "urls": {name: {"ok": True, "status": 200, "error": None, "seconds": 0.1} for name in ("registry", "hub")},
        "cloud_init": {"finished": True, "waited_seconds": 0},
        "network": {
            "controller": "198.18.0.1",
            "name_servers": ["127.0.0.53", "fe80::1%eth0"],
            "gateways": ["10.0.0.1"],
            "peers": {"gateway-1": ["10.0.2.5"]},
        },
        "apt": {"sources": [], "key_conflicts": []},
        "docker": {"root_dir": None, "image_root": None, "running": False, "snap": False, "daemon_json": None},
        "packages": {"haproxy": None},
        "container_toolkit": None,
        "images": {},
        "models": {},
    }


@pytest.fixture
def gpu() -> Dict:
    return seen_by_gpu_info("hgx-b200-570")


@pytest.fixture
def facts() -> Dict:
    return {"distribution": "Ubuntu", "distribution_version": "24.04"}


@pytest.fixture
def wanted() -> Dict:
    """What the role wants by default, of a node that is to get a real image and real weights."""
    defaults: Dict = yaml.safe_load((ROOT / "roles/preflight/defaults/main.yml").read_text())
    names_in_role: Dict = yaml.safe_load((ROOT / "roles/preflight/vars/main.yml").read_text())["__preflight_wanted"]
    values = {key: defaults[f"preflight_{key}"] for key in names_in_role}
    image = {"pull_ref": "vllm/vllm-openai@sha256:0", "cuda": "12.9", "size_bytes": 12 * GIB}
    return {
        **values,
        "image": image,
        "weights": {"total_bytes": 755_600_000_000},
        "model_directory": "/var/lib/glm/models/zai-org--GLM-5.2-FP8/31cba24f",
    }


class World:
    """One node, to be broken by a test."""

    def __init__(self, node: Dict, gpu: Dict, facts: Dict, wanted: Dict) -> None:
        self.node, self.gpu, self.facts, self.wanted = node, gpu, facts, wanted

    def findings(self) -> list[dict[str, str]]:
        return preflight.preflight_findings(self.node, self.gpu, self.facts, self.wanted)["findings"]

    def warnings(self) -> list[dict[str, str]]:
        return preflight.preflight_findings(self.node, self.gpu, self.facts, self.wanted)["warnings"]


@pytest.fixture
def world(node: Dict, gpu: Dict, facts: Dict, wanted: Dict) -> World:
    return World(node, gpu, facts, wanted)


def test_a_ready_node_has_no_findings(world: World) -> None:
    assert world.findings() == []
    assert [warning["id"] for warning in world.warnings()] == ["driver_branch"]  # 570 is at its end of life


@pytest.mark.parametrize(
    ("distribution", "version", "supported"),
    [("Debian", "13", True), ("Debian", "12.5", True), ("Ubuntu", "22.04", True), ("Ubuntu", "20.04", False)],
)
def test_systems(world: World, distribution: str, version: str, supported: bool) -> None:
    world.facts.update(distribution=distribution, distribution_version=version)
    assert bool(world.findings()) is not supported


def lose_a_gpu(world: World) -> None:
    del world.gpu["gpus"][5], world.gpu["pci"][5]


def be_another_model(world: World) -> None:
    for gpu in world.gpu["gpus"]:
        gpu["name"] = "NVIDIA H200"


def fabric_in_progress(world: World) -> None:
    world.gpu["gpus"][3].update(fabric_state="In Progress", fabric_status=None)


def weak_link(world: World) -> None:
    world.gpu["links"][0]["link"] = "SYS"


def remap_pending(world: World) -> None:
    world.gpu["gpus"][2]["remap_pending"] = True


def remap_failed(world: World) -> None:
    world.gpu["gpus"][2]["remap_failure"] = True


def uncorrected(world: World) -> None:
    world.gpu["gpus"][7]["ecc_uncorrected_volatile"] = 2


def recovery(world: World) -> None:
    world.gpu["gpus"][7]["recovery_action"] = "Reboot"


def mig_on(world: World) -> None:
    world.gpu["gpus"][0]["mig"] = True


def mismatch(world: World) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.195\n"
    version = (FIXTURES / "hgx-b200-570/proc-driver-nvidia-version.txt").read_text()
    driver = gpu_info.build_driver(version, gpu_info.Output(18, said), gpu_info.Query(), None)
    assert driver is not None
    world.gpu.update(driver=asdict(driver), gpus=[], links=[])


def no_driver(world: World) -> None:
    world.gpu.update(driver=None, gpus=[], links=[], fabric_manager_version=None)


def not_loaded(world: World) -> None:
    world.gpu["driver"].update(error="NVIDIA-SMI has failed", module_version=None)
    world.gpu.update(gpus=[], links=[])


def old_driver(world: World) -> None:
    world.gpu["driver"].update(version="570.86.15", module_version="570.86.15")
    world.gpu["fabric_manager_version"] = "570.86.15"


def older_branch(world: World) -> None:
    world.wanted["driver_branch"] = 580


def closed_module(world: World) -> None:
    world.gpu["driver"]["open_module"] = False


def manager_differs(world: World) -> None:
    world.gpu["fabric_manager_version"] = "570.195.03"


def newer_cuda(world: World) -> None:
    world.wanted["image"]["cuda"] = "13.0.1"


def foreign_process(world: World) -> None:
    process = gpu_info.Process(1, 4711, "python3", "C", 900, "c" * 64, "notebook")
    world.gpu["processes"] = [asdict(process)]


def said_by_the_kernel(world: World, text: str) -> None:
    world.gpu["kernel_log"] = asdict(gpu_info.parse_kernel_log(text))


def xid_79(world: World) -> None:
    line = "NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    said_by_the_kernel(world, line)


def link_down(world: World) -> None:
    said_by_the_kernel(world, kernel_log("nvlink.log"))


def gsp_silent(world: World) -> None:
    said_by_the_kernel(world, kernel_log("gsp.log"))


def asks_to_drain(world: World) -> None:
    said_by_the_kernel(world, "\n".join(kernel_log("recovered.log").splitlines()[:2]))


def fatal_sxid(world: World) -> None:
    said_by_the_kernel(world, "\n".join(line for line in kernel_log("switch.log").splitlines() if "SXid" in line))


def bus_drop(world: World) -> None:
    said_by_the_kernel(world, "kernel: NVRM: GPU 0000:52:00.0: GPU has fallen off the bus.")


def gpu_gone_from_the_driver(world: World) -> None:
    world.gpu["pci"].append("0000:f1:00.0")


def full_disk(world: World) -> None:
    for disk in world.node["disks"].values():
        disk["free_bytes"] = 500 * GIB


def no_inodes(world: World) -> None:
    for disk in world.node["disks"].values():
        disk["free_inodes"] = 10


def little_memory(world: World) -> None:
    world.node["memory_bytes"] = 64 * GIB


def little_shm(world: World) -> None:
    world.node["shm_bytes"] = GIB // 16


def few_files(world: World) -> None:
    world.node["nofile_limit"] = 1024


def unsynchronized(world: World) -> None:
    world.node["clock"]["synchronized"] = False


def wrong_clock(world: World) -> None:
    world.node["clock"].update(synchronized=None, offset_seconds=-300.2)


def edge_taken(world: World) -> None:
    world.node["ports"]["8000"].update(listening=True, process="nginx", pid=7, unit="nginx.service")


def metrics_taken(world: World) -> None:
    world.wanted["metrics_port"] = 8005
    world.node["ports"]["8005"] = {
        "listening": True,
        "process": "grafana",
        "pid": 7,
        "unit": "g.service",
        "container": None,
    }


def engine_taken(world: World) -> None:
    world.node["ports"]["8001"].update(listening=True, process="python3", pid=9, unit="session-1.scope")


def agent_taken(world: World) -> None:
    world.node["ports"]["8002"] = {"listening": True, "process": "tritonserver", "pid": 9, "unit": "docker.service"}


def no_registry(world: World) -> None:
    world.node["urls"]["registry"].update(ok=False, status=None, error="Connection refused")


def hub_ill(world: World) -> None:
    world.node["urls"]["hub"].update(ok=False, status=503, error="HTTP 503")


def no_such_image(world: World) -> None:
    world.wanted["image_error"] = "vllm/vllm-openai:glm52-cu130 is not in the registry: set glm_image to one that is"


def no_such_revision(world: World) -> None:
    world.wanted["weights_error"] = "zai-org/GLM-5.2-FP8 has no revision ffff: set glm_model_revision to a commit"


def no_way_to_registry_and_hub(world: World) -> None:
    """The first node asks both for all; one that does not get there either says it once."""
    no_registry(world)
    hub_ill(world)
    world.wanted["image_error"] = "https://registry-1.docker.io cannot be reached (refused): open the way"
    world.wanted["weights_error"] = "the hub at https://huggingface.co cannot be reached (refused): open the way"


def other_arch(world: World) -> None:
    world.node["arch"] = "aarch64"


def cloud_init_works(world: World) -> None:
    world.node["cloud_init"] = {"finished": False, "waited_seconds": 600.4}


def docker_of_a_snap(world: World) -> None:
    world.node["docker"].update(snap=True, running=True)


def two_keys(world: World) -> None:
    paths = [f"/etc/apt/sources.list.d/docker.{kind}" for kind in ("list", "sources")]
    world.node["apt"]["key_conflicts"] = [{"source": "https://download.docker.com/linux/ubuntu noble", "paths": paths}]


def controller_behind_docker(world: World) -> None:
    world.node["network"]["controller"] = "172.17.8.9"


def names_and_gateway_behind_docker(world: World) -> None:
    world.node["network"].update(name_servers=["172.17.0.2"], gateways=["172.17.0.2"])


def a_bridge_over_the_site(world: World) -> None:
    world.node["docker"]["daemon_json"] = {"bip": "172.17.0.1/16"}
    world.wanted["docker_config"] = {"bip": "10.0.0.9/24"}


def a_bridge_nowhere(world: World) -> None:
    world.wanted["docker_config"] = {"bip": "10.0.0"}


def a_bridge_over_a_gateway(world: World) -> None:
    world.wanted["docker_config"] = {"bip": "10.0.2.1/24"}


WEIGHTS_DIR = "/var/lib/glm/models/zai-org--GLM-5.2-FP8/31cba24f"  # as in `wanted`


def weights_on(world: World, **disk: Any) -> None:
    world.node["disks"][WEIGHTS_DIR] = {**world.node["disks"]["/var/lib/glm"], "mount": "/mnt", **disk}


def locks_of_one_node(world: World) -> None:
    weights_on(world, type="nfs", shared=True, local_locks="nolock")


def storage_without_an_answer(world: World) -> None:
    world.node["storage"] = {WEIGHTS_DIR: "Stale file handle"}


def a_source_without_an_answer(world: World) -> None:
    world.wanted["weights_sources"] = ["/mnt/models"]
    world.node["storage"] = {"/mnt/models": "no answer within 20 s"}


def data_without_an_answer(world: World) -> None:
    """And the weights below it: one line."""
    for path in ("/var/lib/glm", WEIGHTS_DIR):
        world.node["storage"][path] = "Transport endpoint is not connected"
        world.node["disks"].pop(path, None)


def storage_of_another_root(world: World) -> None:
    weights_on(world, type="nfs4", shared=True, writable=False)


FAULTS: list[tuple[Callable[[World], None], str, list[str]]] = [
    (lose_a_gpu, "gpu_count", ["found 7", "wanted 8", "glm_gpu_count"]),
    (be_another_model, "gpu_model", ["NVIDIA H200", "wanted B200", "glm_gpu_model"]),
    (
        fabric_in_progress,
        "fabric",
        ["In Progress", "GPU 3 (0000:61:00.0)", "Completed/Success", "nvidia-fabricmanager"],
    ),
    (weak_link, "nvlink", ["SYS between GPU 0 and GPU 1", "wanted NV18", "nvidia-smi nvlink"]),
    (remap_pending, "row_remap", ["pending", "GPU 2", "--gpu-reset"]),
    (remap_failed, "row_remap", ["failed", "GPU 2", "replaced"]),
    (uncorrected, "ecc", ["found 2 on GPU 7", "wanted 0", "--gpu-reset"]),
    (recovery, "gpu_recovery", ["Reboot", "GPU 7", "reboot the node"]),
    (mig_on, "mig", ["GPU 0", "wanted off", "nvidia-smi -mig 0"]),
    (mismatch, "driver_library", ["library 570.195", "wanted 570.211.01", "reboot"]),
    (no_driver, "driver", ["found none", "570.133.20", "install"]),
    (not_loaded, "driver", ["NVIDIA-SMI has failed", "modprobe nvidia"]),
    (old_driver, "driver_version", ["found 570.86.15", "wanted 570.133.20", "install a driver"]),
    (older_branch, "driver_branch", ["found 570", "wanted 580", "glm_driver_branch: 570"]),
    (closed_module, "open_module", ["proprietary", "wanted open", "nvidia-open-570"]),
    (manager_differs, "fabric_manager", ["found 570.195.03", "wanted 570.211.01", "restart nvidia-fabricmanager"]),
    (
        newer_cuda,
        "image_cuda",
        ["CUDA 13.0.1", "at most 12.8", "glm_image", "driver 580", "glm_allow_cuda_compat"],
    ),
    (foreign_process, "gpu_process", ["python3 (pid 4711, container notebook) on GPU 1", "stop it"]),
    (
        xid_79,
        "xid",
        [
            "fatal GPU errors in the kernel log since boot (found Xid 79 (GPU has fallen off the bus) on 0000:1b:00, "
            "wanted none): reboot the node",
            "preflight_fatal_xids",
        ],
    ),
    (
        link_down,
        "xid",
        [
            "found Xid 149 (NVLink NETIR error, fatal) on 0000:52:00, "
            "Xid 154 (the driver asks for: GPU Reset Required) on 0000:52:00, wanted none",
            "Xid 149: reset the GPUs",
            "nvidia-smi nvlink",
            "Xid 154: reset the GPU with `nvidia-smi --gpu-reset`",
        ],
    ),
    (
        gsp_silent,
        "xid",
        [
            "Xid 119 (GSP RPC timeout) on 0000:9d:00",
            "Xid 154 (the driver asks for: GPU Reset Required) on 0000:9d:00",
            "Xid 120 (GSP error) on 0000:c3:00",
            "Xid 154 (the driver asks for: OS Reboot) on 0000:c3:00",
            "Xid 119, Xid 154, Xid 120: reset the GPU",
            "Xid 154: reboot the node",
        ],
    ),
    (asks_to_drain, "xid", ["the driver asks for: Drain P2P) on 0000:61:00", "stop every program that uses NVLink"]),
    (
        fatal_sxid,
        "sxid",
        [
            "found SXid 20034 (LTSSM Fault Up) on nvidia-nvswitch1 (0000:08:00.0) link 48, "
            "nvidia-nvswitch0 (0000:07:00.0) link 63, wanted none",
            "reboot the node",
        ],
    ),
    (bus_drop, "bus_drop", ["0000:52:00.0", "wanted none", "power-cycle"]),
    (gpu_gone_from_the_driver, "gpu_lost", ["0000:f1:00.0", "reboot"]),
    (full_disk, "disk_space", ["500.0 GiB free", "703.7 GiB for the rest of the weights", "glm_data_dir"]),
    (no_inodes, "inodes", ["found 10 free", "wanted 500000", "glm_data_dir"]),
    (little_memory, "memory", ["found 64.0 GiB", "wanted 256 GiB", "glm_min_memory_gib"]),
    (little_shm, "shared_memory", ["/dev/shm", "found 0.1 GiB", "wanted 32 GiB", "mount -o remount"]),
    (few_files, "open_files", ["limit of 1024", "wanted 1048576", "glm_min_open_files"]),
    (unsynchronized, "clock", ["NTPSynchronized=no", "timedatectl set-ntp true"]),
    (wrong_clock, "clock", ["found -300 s", "at most 10 s", "timedatectl"]),
    (edge_taken, "edge_port", ["port 8000", "nginx (pid 7, nginx.service)", "glm_port"]),
    (metrics_taken, "metrics_port", ["port 8005", "grafana (pid 7, g.service)", "glm_metrics_port"]),
    (engine_taken, "engine_port", ["port 8001", "python3 (pid 9", "glm_engine_port"]),
    (agent_taken, "agent_port", ["port 8002", "tritonserver (pid 9", "glm_engine_port, which is one less"]),
    (no_registry, "registry", ["registry-1.docker.io", "Connection refused", "glm_registry_mirror"]),
    (hub_ill, "hub", ["huggingface.co", "HTTP 503", "glm_hf_endpoint"]),
    (no_such_image, "image", ["glm52-cu130 is not in the registry", "glm_image"]),
    (no_such_revision, "weights", ["no revision ffff", "glm_model_revision"]),
    (other_arch, "architecture", ["found aarch64", "wanted x86_64"]),
    (cloud_init_works, "cloud_init", ["cloud-init still works on the first boot", "600 s", "cloud-init status --long"]),
    (docker_of_a_snap, "docker_snap", ["`snap remove docker` (its containers", "snap disable docker"]),
    (
        two_keys,
        "apt_keys",
        ["download.docker.com/linux/ubuntu noble in", "docker.list and", "docker.sources", "remove"],
    ),
    (
        controller_behind_docker,
        "docker_network",
        ["cut the way to 172.17.8.9 (found the controller in 172.17.0.0/16", "{bip: 10.255.0.1/24}"],
    ),
    (
        names_and_gateway_behind_docker,
        "docker_network",
        ["cut the way to 172.17.0.2 (found a name server, the default gateway in 172.17.0.0/16"],
    ),
    (a_bridge_over_the_site, "docker_network", ["cut the way to 10.0.0.1 (found the default gateway in 10.0.0.0/24"]),
    (
        a_bridge_over_a_gateway,
        "docker_network",
        ["cut the way to 10.0.2.5 (found a gateway of the fleet in 10.0.2.0/24"],
    ),
    (locks_of_one_node, "weights_locks", ["locks at /mnt", "found nolock", "glm_weights_sources"]),
    (storage_without_an_answer, "storage", [WEIGHTS_DIR, "found Stale file handle", "set glm_weights_dir to another"]),
    (a_source_without_an_answer, "storage", ["/mnt/models", "no answer within 20 s", "set glm_weights_sources to"]),
    (data_without_an_answer, "storage", ["of /var/lib/glm cannot", "is not connected", "set glm_data_dir to another"]),
    (storage_of_another_root, "storage", ["may not write", "found nfs4 at /mnt", "no_root_squash", "glm_weights_dir"]),
    (a_bridge_nowhere, "docker_network", ["10.0.0", "container_runtime_daemon_config"]),
]


@pytest.mark.parametrize(("fault", "check", "words"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_each_fault_has_its_one_line(
    world: World, fault: Callable[[World], None], check: str, words: list[str]
) -> None:
    fault(world)
    findings = world.findings()
    assert [finding["id"] for finding in findings] == [check]
    line = findings[0]["line"]
    assert line.startswith(f"{check}: ")
    assert "\n" not in line
    for word in words:
        assert word in line
    assert findings[0]["text"] and findings[0]["fix"]


def test_an_unreachable_registry_or_hub_is_said_once(world: World) -> None:
    no_way_to_registry_and_hub(world)
    assert [finding["id"] for finding in world.findings()] == ["registry", "hub"]
    world.node["urls"]["registry"]["ok"] = world.node["urls"]["hub"]["ok"] = True
    assert [finding["id"] for finding in world.findings()] == ["image", "weights"]


def test_all_findings_come_in_one_go(world: World) -> None:
    for fault in (lose_a_gpu, fabric_in_progress, edge_taken, little_shm):
        fault(world)
    assert {finding["id"] for finding in world.findings()} == {"gpu_count", "fabric", "edge_port", "shared_memory"}


@pytest.mark.parametrize(
    "config",
    [
        {"bip": "10.255.0.1/24"},
        {"bridge": "site0"},
        {"default-address-pools": [{"base": "fd00::/48", "size": 64}, {"base": "10.128.0.0/16", "size": 24}]},
    ],
)
@pytest.mark.parametrize("of_the_node", [True, False])
def test_docker_with_a_network_elsewhere(world: World, config: Dict, of_the_node: bool) -> None:
    controller_behind_docker(world)
    if of_the_node:
        world.node["docker"]["daemon_json"] = config
    else:
        world.wanted["docker_config"] = config
    assert world.findings() == []


def test_a_docker_that_runs_has_not_cut_the_way(world: World) -> None:
    controller_behind_docker(world)
    world.node["docker"]["running"] = True
    assert world.findings() == []


def test_the_first_of_the_pools_is_dockers(world: World) -> None:
    pools = [{"base": "10.0.0.0/8", "size": 24}, {"base": "198.18.0.0/16", "size": 24}]
    world.wanted["docker_config"] = {"default-address-pools": pools}
    assert [finding["id"] for finding in world.findings()] == ["docker_network"]  # 10.0.0.1
    world.node["network"]["gateways"] = ["10.0.1.1"]
    assert world.findings() == []


def test_weights_that_are_there_need_no_locks_and_no_right_to_write(world: World) -> None:
    weights_on(world, type="nfs", shared=True, local_locks="nolock", writable=False)
    assert [finding["id"] for finding in world.findings()] == ["storage", "weights_locks"]
    world.node["models"] = {WEIGHTS_DIR: {"complete": True}}
    assert world.findings() == []


def test_two_keys_are_no_matter_where_nothing_is_to_be_installed(world: World) -> None:
    two_keys(world)
    world.node["docker"]["running"], world.node["container_toolkit"] = True, "1.20.0-1"
    world.node["packages"]["haproxy"] = "3.0.11-1"
    assert world.findings() == []
    assert "apt_keys" in [warning["id"] for warning in world.warnings()]


def test_a_wait_for_cloud_init_is_said(world: World) -> None:
    world.node["cloud_init"]["waited_seconds"] = 87.2
    assert world.findings() == []
    (line,) = [warning["line"] for warning in world.warnings() if warning["id"] == "cloud_init"]
    assert "found it done after 87 s" in line


def test_a_serving_node_is_no_fault(world: World) -> None:
    """The second run: our engine computes, our edge listens, image and weights are there, the way out is shut."""
    worker = gpu_info.Process(0, 1, "VLLM::Worker_TP0", "C", 170000, "d" * 64, "glm-engine", own=True)
    world.gpu["processes"] = [asdict(worker)]
    world.node["ports"]["8000"].update(listening=True, process="haproxy", pid=3, unit="haproxy.service")
    world.node["ports"]["8001"].update(listening=True, process="vllm", pid=1, container="glm-engine")
    world.node["images"] = {world.wanted["image"]["pull_ref"]: {"present": True}}
    world.node["models"] = {world.wanted["model_directory"]: {"complete": True, "partial_bytes": 0}}
    no_registry(world)
    hub_ill(world)
    for disk in world.node["disks"].values():
        disk["free_bytes"] = 300 * GIB
    assert world.findings() == []
    assert {"registry", "hub"} <= {warning["id"] for warning in world.warnings()}


def test_what_is_downloaded_already_needs_no_space(world: World) -> None:
    for disk in world.node["disks"].values():
        disk["free_bytes"] = 500 * GIB
    world.node["models"] = {world.wanted["model_directory"]: {"complete": False, "partial_bytes": 600 * GIB}}
    assert world.findings() == []


@pytest.mark.parametrize(("there", "room", "found"), [(0, 11, 1), (5, 7, 0), (0, 12, 0)])
def test_what_nodes_give_each_other_of_the_image_is_counted(world: World, there: int, room: int, found: int) -> None:
    """Beside the weights, the image itself and the reserve: 755.6 GB, 36 GiB and 200 GiB."""
    world.wanted["image"]["blobs"] = [{"digest": "sha256:1", "size": 9 * GIB}, {"digest": "sha256:2", "size": 3 * GIB}]
    world.wanted["image_blobs"] = "/var/lib/glm/image-blobs/1"
    world.node["models"] = {"/var/lib/glm/image-blobs/1": {"complete": False, "partial_bytes": there * GIB}}
    for disk in world.node["disks"].values():
        disk["free_bytes"] = 755_600_000_000 + (36 + 200 + room) * GIB
    assert len(world.findings()) == found
    assert all(f"{12 - there}.0 GiB for what the nodes give" in each["line"] for each in world.findings())
    world.node["images"] = {world.wanted["image"]["pull_ref"]: {"present": True}}
    assert not world.findings()


def test_data_and_docker_on_disks_of_their_own(world: World) -> None:
    world.node["disks"]["/var/lib/docker"].update(mount="/var/lib/docker", free_bytes=GIB)
    (finding,) = world.findings()
    assert "at /var/lib/docker is too full (found 1.0 GiB free, wanted 36.0 GiB" in finding["line"]
    assert finding["fix"] == (
        "free space there, or move Docker's /var/lib/docker to a larger disk (data-root in /etc/docker/daemon.json)"
    )


@pytest.mark.parametrize(
    ("root", "images", "fix"),
    [
        (None, "/var/lib/containerd", "containerd's /var/lib/containerd to a larger disk (root in /etc/containerd/"),
        (
            "/var/lib/docker",
            "/srv/containerd",
            "containerd's /srv/containerd to a larger disk (root in /etc/containerd/",
        ),
        ("/srv/docker", "/srv/docker", "Docker's /srv/docker to a larger disk (data-root in /etc/docker/daemon.json)"),
        ("/srv/docker", "/srv/docker/containerd", "Docker's /srv/docker to a larger disk (data-root in /etc/docker/"),
    ],
)
def test_an_image_is_counted_where_it_will_lie(world: World, root: str | None, images: str, fix: str) -> None:
    world.wanted["docker_directory"] = "/var/lib/containerd"
    world.node["docker"].update(root_dir=root, image_root=images if root else None)
    world.node["disks"][images] = {**world.node["disks"]["/var/lib/docker"], "mount": "/images", "free_bytes": GIB}
    (finding,) = world.findings()
    assert "at /images is too full (found 1.0 GiB free, wanted 36.0 GiB: 36.0 GiB for the image)" in finding["line"]
    assert f"or move {fix}" in finding["fix"]


def test_file_system_without_inodes(world: World) -> None:
    for disk in world.node["disks"].values():
        disk.update(free_inodes=0, total_inodes=0)
    assert world.findings() == []


def test_clock_that_nobody_vouches_for(world: World) -> None:
    world.node["clock"].update(synchronized=None, offset_seconds=1.0)
    assert world.findings() == []
    world.node["clock"].update(offset_seconds=11.0)
    assert [finding["id"] for finding in world.findings()] == ["clock"]


def test_cuda_13_on_branch_580(world: World) -> None:
    world.gpu = seen_by_gpu_info("h100-580")
    world.wanted.update(gpu_count=1, gpu_model="H100", fabric_required=False, driver_branch=580)
    newer_cuda(world)
    assert world.findings() == []
    assert world.warnings() == []


def test_cuda_13_on_570_when_allowed(world: World) -> None:
    newer_cuda(world)
    world.wanted["allow_cuda_compat"] = True
    assert world.findings() == []


def test_a_newer_branch_is_another_one(world: World) -> None:
    world.gpu["driver"].update(branch=580, version="580.159.04", module_version="580.159.04", cuda_version="13.0")
    world.gpu["fabric_manager_version"] = "580.159.04"
    assert [finding["id"] for finding in world.findings()] == ["driver_branch"]


def test_what_was_said_of_a_real_gpu_host(world: World) -> None:
    """The lines about its GPU, as they were printed there; that of the driver is the other filter's."""
    world.gpu = seen_by_gpu_info("h200-580")
    said = (FIXTURES / "h200-580/findings.txt").read_text().splitlines()
    lines = {finding["id"]: finding["line"] for finding in world.findings()}
    assert set(lines) == {"gpu_count", "gpu_model", "fabric", "driver_branch"}
    assert lines["gpu_count"] in said
    assert lines["gpu_model"] in said
    assert "found no fabric on GPU 0" in lines["fabric"]


def test_h100_without_a_fabric_is_refused_where_one_is_wanted(world: World) -> None:
    world.gpu = seen_by_gpu_info("h100-580")
    found = {finding["id"] for finding in world.findings()}
    assert found == {"gpu_count", "gpu_model", "fabric", "driver_branch"}


def test_warnings_do_not_refuse(world: World) -> None:
    world.gpu["gpus"][1].update(persistence=False, ecc=False, ecc_uncorrected_aggregate=1)
    world.gpu["kernel_log"] = asdict(
        gpu_info.parse_kernel_log("NVRM: Xid (PCI:0000:43:00): 31, pid=1, name=python3, Ch 00000010")
    )
    assert world.findings() == []
    assert {"persistence", "ecc", "xid"} <= {warning["id"] for warning in world.warnings()}


def lines_of(warnings: list[dict[str, str]], check: str) -> list[str]:
    return [warning["line"] for warning in warnings if warning["id"] == check]


def test_errors_of_programs_do_not_refuse(world: World) -> None:
    said_by_the_kernel(world, kernel_log("program.log"))
    assert world.findings() == []
    (line,) = lines_of(world.warnings(), "xid")
    for word in (
        "found Xid 13 (graphics engine exception) on 0000:43:00, ",
        "Xid 13, Xid 43, Xid 31: a program's fault",
        "Xid 63: nothing to do",
        "Xid 94: restart the program",
    ):
        assert word in line


def test_what_the_driver_no_longer_asks_for_is_not_said(world: World) -> None:
    said_by_the_kernel(world, kernel_log("recovered.log"))
    assert world.findings() == []
    (line,) = lines_of(world.warnings(), "xid")
    assert "found Xid 145 (NVLink RLW error, not fatal) on 0000:61:00, wanted none" in line
    assert "154 (" not in line


def test_the_last_action_counts_for_each_gpu(world: World) -> None:
    said_by_the_kernel(world, kernel_log("nvlink.log") + kernel_log("recovered.log"))
    (finding,) = world.findings()
    assert "0000:52:00" in finding["line"]
    assert "0000:61:00" not in finding["line"]


@pytest.mark.parametrize("code", [46, 48, 62, 64, 74, 79, 95, 119, 120, 150])
def test_codes_that_refuse(world: World, code: int) -> None:
    said_by_the_kernel(world, f"NVRM: Xid (PCI:0000:1b:00): {code}, pid=1, name=python3, what was said of it")
    assert [finding["id"] for finding in world.findings()] == ["xid"]


@pytest.mark.parametrize("code", [8, 13, 31, 43, 45, 63, 94, 154])
def test_codes_that_only_warn(world: World, code: int) -> None:
    said_by_the_kernel(world, f"NVRM: Xid (PCI:0000:1b:00): {code}, pid=1, name=python3, what was said of it")
    assert world.findings() == []
    assert len(lines_of(world.warnings(), "xid")) == 1


def test_an_unknown_code_is_said_to_be_one(world: World) -> None:
    said_by_the_kernel(world, "NVRM: Xid (PCI:0000:1b:00): 999, something new")
    assert world.findings() == []
    (line,) = lines_of(world.warnings(), "xid")
    assert "found Xid 999 (unknown code) on 0000:1b:00" in line
    assert "see NVIDIA's Xid catalogue" in line


def test_the_users_own_codes_win(world: World) -> None:
    world.wanted["fatal_xids"] = [63]
    said_by_the_kernel(world, kernel_log("program.log") + kernel_log("nvlink.log"))
    (finding,) = world.findings()
    assert "found Xid 63 (memory row remap recorded) on 0000:c3:00, wanted none" in finding["line"]
    assert "Xid 149 (NVLink NETIR error, fatal) on 0000:52:00" in lines_of(world.warnings(), "xid")[0]
    world.wanted["fatal_xids"] = [0]
    assert world.findings() == []


def test_sxids_that_are_not_fatal_warn(world: World) -> None:
    said_by_the_kernel(world, "\n".join(kernel_log("switch.log").splitlines()[:6]))
    assert world.findings() == []
    (line,) = lines_of(world.warnings(), "sxid")
    place = "nvidia-nvswitch3 (0000:0a:00.0) link 32"
    assert f"found SXid 12028 (egress non-posted PRIV error) on {place}, wanted none" in line
    assert "Fabric Manager user guide" in line


@pytest.mark.parametrize(
    ("action", "cure"),
    [
        ("Reset", "--gpu-reset"),
        ("Reboot", "reboot the node"),
        ("Drain P2P", "stop every program that uses NVLink"),
        ("Drain and Reset", "let the GPU's work end"),
        ("Recover IMEX Domain", "do as the driver asks"),
    ],
)
def test_what_nvidia_smi_asks_for_has_its_cure(world: World, action: str, cure: str) -> None:
    world.gpu["gpus"][2]["recovery_action"] = action
    (finding,) = world.findings()
    assert action in finding["line"]
    assert cure in finding["fix"]


def test_judging_leaves_what_was_seen_alone(world: World) -> None:
    before = copy.deepcopy(world.gpu)
    world.findings()
    assert world.gpu == before


def test_misspelled_variable_gets_the_nearest_right_one() -> None:
    known = ["glm_port", "glm_profile", "glm_engine", "glm_engine_port"]
    assert names.unknown_variables(["glm_prot", "glm_enginne", "glm_port", "ansible_host", "glm_zzz"], known) == [
        "glm_enginne: there is no such setting: did you mean glm_engine?",
        "glm_prot: there is no such setting: did you mean glm_port?",
        "glm_zzz: there is no such setting: remove it, or see the list of settings",
    ]


def test_two_nodes_with_one_address() -> None:
    hostvars: dict[str, Dict] = {
        "node1": {"ansible_host": "198.18.0.1"},
        "node2": {"ansible_host": "198.18.0.1"},
        "node3": {"ansible_host": "198.18.0.1", "ansible_port": 2222},
        "198.18.0.9": {},
    }
    (line,) = names.duplicate_addresses(list(hostvars), hostvars)
    assert line.startswith("inventory: node1 and node2 have one address (found 198.18.0.1 port 22")
    assert "ansible_host" in line


def test_several_gateways_know_each_other_by_ip_address() -> None:
    hostvars: dict[str, Dict] = {
        "gw-1": {"ansible_host": "gw-1.example"},
        "gw-2": {"ansible_host": "gw-2.example", "glm_node_address": "10.0.0.2"},
        "2001:db8::3": {"glm_port": 8003},
    }
    assert names.gateway_problems(list(hostvars), hostvars) == [
        "inventory: the other gateways know gw-1 by its address, and gw-1.example is a name: set glm_node_address for "
        "it, to the IP address from which they see it",
        "glm_port: 2001:db8::3 needs port 8003 for the other gateways: set glm_port or glm_peers_port to another port",
    ]
    assert names.gateway_problems(["gw-1"], hostvars) == []


def test_addresses_are_refused_only_where_they_are_needed(world: World) -> None:
    names = ("hub_files", "registry_files", "docker_packages")
    world.wanted["urls"] = {**world.wanted["urls"], **{name: f"https://{name}.example.com/" for name in names}}
    for name in names:
        world.node["urls"][name] = {"ok": False, "status": None, "error": "no answer in time", "seconds": 10}
    assert [finding["id"] for finding in world.findings()] == ["registry_files", "hub_files", "docker_packages"]
    assert "set glm_docker_apt_url to a mirror that it reaches" in world.findings()[-1]["line"]


def test_a_proxy_that_only_the_environment_has_is_warned_of(world: World) -> None:
    world.node["environment_proxy"] = "http://user:secret@proxy:3128"
    (warning,) = [one for one in world.warnings() if one["id"] == "environment_proxy"]
    assert "found proxy:3128" in warning["line"] and "set glm_http_proxy to it" in warning["line"]
    world.wanted["http_proxy"] = "http://proxy:3128"
    assert "environment_proxy" not in [one["id"] for one in world.warnings()]
