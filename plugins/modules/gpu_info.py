#!/usr/bin/python
"""GPUs, driver and fabric of a node, in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_info
short_description: Reads the state of a node's NVIDIA GPUs, driver and fabric
description:
  - Collects what decides whether a node can serve, from C(nvidia-smi), C(/proc), C(/sys) and the kernel log.
  - Read-only. Never fails because something is absent, so that every finding can be listed in one go.
options:
  own_containers:
    description: Names of containers whose compute processes are the deployment's own.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait for each command. A GPU that dropped off the bus can make C(nvidia-smi) hang.
    type: int
    default: 60
attributes:
  check_mode:
    description: Reads the same as without it.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read the GPUs
  glm.fleet.gpu_info:
    own_containers: [glm-engine]
  register: result
"""

RETURN = r"""
gpu:
  description:
    - C(driver) is null without a driver, else versions of module and library, branch, CUDA version, and C(error).
    - C(gpus) one entry a GPU that answers; C(pci) the addresses of those that the bus lists.
    - C(links) the NVLink type of each pair; C(processes) compute processes; C(kernel_log) the errors of GPUs (Xids) and
      of NVSwitches (SXids) since boot, and bus-drop lines.
  returned: always
  type: dict
"""

import contextlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_text
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.processes import parse_container_id

NVIDIA_VENDOR = "0x10de"
PCI_CLASSES_OF_GPUS = ("0x0300", "0x0302")  # VGA and 3D controllers; NVSwitches are 0x0680
MOST_OF_AN_ERROR = 200  # characters, from the end
MISMATCH = "Driver/library version mismatch"
LIBRARY_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib/x86_64-linux-gnu")


@dataclass
class Driver:
    """Versions of the two halves of a driver: the loaded kernel module and the library beside it."""

    version: str | None  # the module's; of what is installed where none is loaded
    module_version: str | None
    library_version: str | None
    branch: int | None
    cuda_version: str | None  # the newest CUDA that the driver supports
    open_module: bool | None
    mismatch: bool
    error: str | None


@dataclass
class Gpu:
    index: int
    name: str
    uuid: str
    pci_address: str
    memory_mib: int | None
    persistence: bool | None
    mig: bool | None
    ecc: bool | None
    ecc_uncorrected_volatile: int
    ecc_uncorrected_aggregate: int
    remap_pending: bool
    remap_failure: bool
    repair_pending: bool
    unrepairable_memory: bool
    recovery_action: str | None
    fabric_state: str | None
    fabric_status: str | None


@dataclass
class Process:
    gpu: int
    pid: int
    name: str
    type: str
    memory_mib: int | None
    container_id: str | None = None
    container: str | None = None
    own: bool = False


@dataclass
class Link:
    gpus: tuple[int, int]
    link: str


@dataclass
class Xid:
    """An error of a GPU."""

    code: int
    pci_address: str
    fatal: bool | None  # said of NVLink 5 errors alone
    recovery_action: str | None  # what Xid 154 changes it to; "None" where nothing is asked for any more
    line: str


@dataclass
class SXid:
    """An error of an NVSwitch."""

    code: int
    switch: str
    pci_address: str
    fatal: bool
    link: int | None
    error: str
    line: str


@dataclass
class KernelLog:
    readable: bool = False
    xids: list[Xid] = field(default_factory=list)
    sxids: list[SXid] = field(default_factory=list)
    bus_drops: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What the module returns as `gpu`."""

    driver: Driver | None
    gpus: list[Gpu]
    processes: list[Process]
    links: list[Link]
    fabric_manager_version: str | None
    kernel_log: KernelLog
    pci: list[str]


@dataclass
class Output:
    """What a command said: `code` is None where it is absent or did not answer in time."""

    code: int | None
    text: str = ""
    error: str | None = None


def pci_address(text: str) -> str:
    """The kernel's form of an address: nvidia-smi writes a domain of 8 digits, the kernel one of 4."""
    domain, _colon, rest = text.strip().lower().partition(":")
    return f"{domain[-4:]}:{rest}" if rest.count(":") == 1 else text.strip().lower()


def parse_module_version(text: str) -> tuple[str | None, bool | None]:
    """Version and kind (open: True) from /proc/driver/nvidia/version."""
    line = next((line for line in text.splitlines() if line.startswith("NVRM version:")), "")
    version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", line)
    return (version.group(1), "Open Kernel Module" in line) if version else (None, None)


def parse_mismatch(text: str) -> str | None:
    """The library's version (at times shortened: 580.159) where NVML refuses the loaded module, else None."""
    if MISMATCH not in text:
        return None
    version = re.search(r"NVML library version:\s*([\d.]+)", text)
    return version.group(1) if version else "unknown"


def parse_fabric_manager_version(text: str) -> str | None:
    version = re.search(r"(\d+\.\d+(?:\.\d+)?)", text)
    return version.group(1) if version else None


def _value(element: ElementTree.Element, path: str) -> str | None:
    """The text at `path`, or None where it is absent or N/A."""
    text = (element.findtext(path) or "").strip()
    return None if text in ("", "N/A", "[N/A]", "Not Supported") else text


def _number(element: ElementTree.Element, path: str) -> int | None:
    digits = re.match(r"-?\d+", _value(element, path) or "")
    return int(digits.group()) if digits else None


def _flag(element: ElementTree.Element, path: str) -> bool | None:
    value = _value(element, path)
    return None if value is None else value in ("Yes", "Enabled", "Pending")


def _uncorrected(gpu: ElementTree.Element, period: str) -> int:
    """Sum of the uncorrected errors of a period; drivers differ in how they split SRAM."""
    counters = gpu.find(f"ecc_errors/{period}")
    if counters is None:
        return 0
    return sum(_number(counters, entry.tag) or 0 for entry in counters if "_uncorrectable" in entry.tag)


def parse_gpu(index: int, gpu: ElementTree.Element) -> Gpu:
    repairs = ("ecc_errors/channel_repair_pending", "ecc_errors/tpc_repair_pending")
    return Gpu(
        index=index,
        name=_value(gpu, "product_name") or "unknown",
        uuid=_value(gpu, "uuid") or "",
        pci_address=pci_address(gpu.get("id", "")),
        memory_mib=_number(gpu, "fb_memory_usage/total"),
        persistence=_flag(gpu, "persistence_mode"),
        mig=_flag(gpu, "mig_mode/current_mig"),
        ecc=_flag(gpu, "ecc_mode/current_ecc"),
        ecc_uncorrected_volatile=_uncorrected(gpu, "volatile"),
        ecc_uncorrected_aggregate=_uncorrected(gpu, "aggregate"),
        remap_pending=bool(_flag(gpu, "remapped_rows/remapped_row_pending")),
        remap_failure=bool(_flag(gpu, "remapped_rows/remapped_row_failure")),
        repair_pending=any(_flag(gpu, path) for path in repairs),
        unrepairable_memory=bool(_flag(gpu, "ecc_errors/unrepairable_memory")),
        recovery_action=_value(gpu, "gpu_recovery_action"),
        fabric_state=_value(gpu, "fabric/state"),
        fabric_status=_value(gpu, "fabric/status"),
    )


def parse_processes(index: int, gpu: ElementTree.Element) -> list[Process]:
    """Compute processes. The element is empty, holds N/A, or holds process_info elements."""
    return [
        Process(
            gpu=index,
            pid=_number(entry, "pid") or 0,
            name=_value(entry, "process_name") or "unknown",
            type=_value(entry, "type") or "C",
            memory_mib=_number(entry, "used_memory"),
        )
        for entry in gpu.findall("processes/process_info")
        if "C" in (_value(entry, "type") or "C")
    ]


@dataclass
class Query:
    """What `nvidia-smi -q -x` said."""

    driver_version: str | None = None
    cuda_version: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)


def parse_query(text: str) -> Query:
    """Raises ElementTree.ParseError where the text is no XML (the tool's errors are plain text)."""
    start = text.find("<?xml")
    root = ElementTree.fromstring(text[start:] if start > 0 else text)  # noqa: S314 (the driver wrote it)
    query = Query(_value(root, "driver_version"), _value(root, "cuda_version"))
    for index, gpu in enumerate(root.findall("gpu")):
        query.gpus.append(parse_gpu(index, gpu))
        query.processes += parse_processes(index, gpu)
    return query


def parse_topology(text: str) -> list[Link]:
    """The link of each pair of GPUs, from the matrix of `nvidia-smi topo -m`."""
    lines = [line.split("\t") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    header = next(([cell.strip() for cell in line] for line in lines if "GPU0" in (c.strip() for c in line[1:])), None)
    links = []
    for line in lines if header else []:
        row = re.fullmatch(r"GPU(\d+)", line[0].strip())
        for name, cell in zip(header or [], line) if row else []:
            column = re.fullmatch(r"GPU(\d+)", name)
            if row and column and int(row.group(1)) < int(column.group(1)):
                links.append(Link((int(row.group(1)), int(column.group(1))), cell.strip()))
    return links


def parse_xid(line: str) -> Xid | None:
    """As in "Xid (PCI:0000:1b:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (...)"; pid and name may come first."""
    xid = re.search(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)[^)]*\): (\d+)", line)
    if not xid:
        return None
    severity = re.search(r", [A-Z0-9_/]+\s+(Fatal|Nonfatal)\s", line)
    action = re.search(r"recovery action changed .*\bto 0x[0-9a-f]+ \(([^)]+)\)", line)
    return Xid(
        code=int(xid.group(2)),
        pci_address=xid.group(1).lower(),
        fatal=severity.group(1) == "Fatal" if severity else None,
        recovery_action=action.group(1) if action else None,
        line=line,
    )


def parse_sxid(line: str) -> SXid | None:
    """As in "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 12028, Non-fatal, Link 32 egress non-posted PRIV error".

    Lines of Severity and Data follow each of these, and say nothing more.
    """
    sxid = re.search(
        r"(nvidia-nvswitch\d+): SXid \(PCI:([0-9a-fA-F:.]+)\): (\d+), (Fatal|Non-fatal|Correctable), "
        r"(?:Link (-?\d+) )?(.*?)(?: \(First\))?$",
        line,
    )
    if not sxid:
        return None
    switch, address, code, severity, link, error = sxid.groups()
    return SXid(int(code), switch, address.lower(), severity == "Fatal", int(link) if link else None, error, line)


def parse_kernel_log(text: str) -> KernelLog:
    log = KernelLog(readable=bool(text.strip()))
    for line in (line.strip() for line in text.splitlines()):
        if xid := parse_xid(line):
            log.xids.append(xid)
        if sxid := parse_sxid(line):
            log.sxids.append(sxid)
        if "fallen off the bus" in line:
            log.bus_drops.append(line)
    return log


def build_driver(proc_version: str, smi: Output, query: Query, library_file: str | None) -> Driver | None:
    """None where nothing of a driver is there."""
    module_version, open_module = parse_module_version(proc_version)
    loaded = module_version or query.driver_version  # NVML passes on the module's version
    mismatched = parse_mismatch(smi.text)
    library = library_file or mismatched
    if loaded is None and library is None and smi.code is None and smi.error is None:
        return None
    error = smi.error
    if error is None and not query.gpus:
        said = "no GPU answers" if query.driver_version else " ".join(smi.text.split())
        error = said[-MOST_OF_AN_ERROR:] or "nvidia-smi is missing"
    version = loaded or library
    return Driver(
        version=version,
        module_version=loaded,
        library_version=library,
        branch=int(version.split(".")[0]) if version and version[0].isdigit() else None,
        cuda_version=query.cuda_version,
        open_module=open_module,
        mismatch=bool(mismatched or (loaded and library and not same_version(loaded, library))),
        error=error,
    )


def same_version(one: str, other: str) -> bool:
    """True also where one of the two is shortened."""
    pairs = zip(one.split("."), other.split("."))
    return all(a == b for a, b in pairs)


def run(command: list[str], timeout: int) -> Output:
    path = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin")
    if path is None:
        return Output(None)
    try:
        done = subprocess.run(
            [path, *command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return Output(None, error=f"{' '.join(command)} did not answer within {timeout} s")
    except OSError as error:
        return Output(None, error=f"{' '.join(command)}: {error.strerror}")
    return Output(done.returncode, done.stdout.decode("utf-8", "replace"))


def library_on_disk(directories: tuple[str, ...] = LIBRARY_DIRECTORIES) -> str | None:
    """The version in the name of the file that libnvidia-ml.so.1 points at."""
    for directory in directories:
        name = os.path.basename(os.path.realpath(os.path.join(directory, "libnvidia-ml.so.1")))
        version = re.fullmatch(r"libnvidia-ml\.so\.(\d+\.\d+(?:\.\d+)?)", name)
        if version and os.path.exists(os.path.join(directory, name)):
            return version.group(1)
    return None


def gpus_on_pci(root: str = "/sys/bus/pci/devices") -> list[str]:
    return sorted(
        device.name
        for device in Path(root).glob("*")
        if read_text(device / "vendor").strip() == NVIDIA_VENDOR
        and read_text(device / "class").startswith(PCI_CLASSES_OF_GPUS)
    )


def kernel_log(timeout: int) -> KernelLog:
    """Since boot: from the journal, or from the kernel's ring where no journal has kernel lines."""
    journal = run(["journalctl", "--dmesg", "--boot", "--quiet", "--no-pager", "--output=short-iso"], timeout)
    if journal.code == 0 and journal.text.strip():
        return parse_kernel_log(journal.text)
    ring = run(["dmesg"], timeout)
    return parse_kernel_log(ring.text) if ring.code == 0 else KernelLog()


def name_containers(processes: list[Process], own_containers: list[str], timeout: int) -> None:
    """Fills in which container a process belongs to. Docker is asked only if one does."""
    of_the_node = read_text("/proc/1/cgroup")
    for process in processes:
        process.container_id = parse_container_id(read_text(f"/proc/{process.pid}/cgroup"), of_the_node)
    if not any(process.container_id for process in processes):
        return
    listing = run(["docker", "ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}"], timeout)
    names = dict(line.split(" ", 1) for line in listing.text.splitlines() if " " in line) if listing.code == 0 else {}
    for process in processes:
        process.container = names.get(process.container_id or "")
        process.own = process.container in own_containers


def collect(own_containers: list[str], timeout: int) -> Report:
    with ThreadPoolExecutor(max_workers=4) as pool:
        smi_job = pool.submit(run, ["nvidia-smi", "-q", "-x"], timeout)
        topology_job = pool.submit(run, ["nvidia-smi", "topo", "-m"], timeout)
        fabric_job = pool.submit(run, ["nv-fabricmanager", "--version"], timeout)
        log_job = pool.submit(kernel_log, timeout)
        smi, topology, fabric = smi_job.result(), topology_job.result(), fabric_job.result()
        log = log_job.result()
    query = Query()
    if smi.code is not None:
        with contextlib.suppress(ElementTree.ParseError):  # plain text: build_driver passes it on as the error
            query = parse_query(smi.text)
    name_containers(query.processes, own_containers, timeout)
    return Report(
        driver=build_driver(read_text("/proc/driver/nvidia/version"), smi, query, library_on_disk()),
        gpus=query.gpus,
        processes=query.processes,
        links=parse_topology(topology.text) if topology.code == 0 else [],
        fabric_manager_version=parse_fabric_manager_version(fabric.text) if fabric.code == 0 else None,
        kernel_log=log,
        pci=gpus_on_pci(),
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "own_containers": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    params: dict[str, Any] = module.params
    module.exit_json(changed=False, gpu=asdict(collect(params["own_containers"], params["timeout"])))


if __name__ == "__main__":
    main()
