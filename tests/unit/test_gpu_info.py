"""gpu_info's parsers on a capture of a real H100 and on the 8x B200 node derived from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.modules import gpu_info
from loading import load_file

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "nvidia-smi"


def text(machine: str, name: str) -> str:
    return (FIXTURES / machine / name).read_text(encoding="utf-8")


def driver_of(machine: str, library: str | None = None) -> gpu_info.Driver:
    smi = gpu_info.Output(0, text(machine, "smi-q.xml"))
    version = text(machine, "proc-driver-nvidia-version.txt")
    driver = gpu_info.build_driver(version, smi, gpu_info.parse_query(smi.text), library)
    assert driver is not None
    return driver


def test_h100_is_read_as_it_was() -> None:
    query = gpu_info.parse_query(text("h100-580", "smi-q.xml"))
    assert len(query.gpus) == 1
    gpu = query.gpus[0]
    assert (gpu.name, gpu.memory_mib, gpu.pci_address) == ("NVIDIA H100 80GB HBM3", 81559, "0000:00:06.0")
    assert (gpu.fabric_state, gpu.fabric_status) == (None, None)
    assert (gpu.persistence, gpu.mig, gpu.ecc, gpu.recovery_action) == (True, False, True, "None")
    assert not any((gpu.remap_pending, gpu.remap_failure, gpu.repair_pending, gpu.unrepairable_memory))
    assert (gpu.ecc_uncorrected_volatile, gpu.ecc_uncorrected_aggregate) == (0, 0)
    assert query.processes == []


def test_h100_driver() -> None:
    driver = driver_of("h100-580", "580.159.04")
    assert (driver.version, driver.branch, driver.cuda_version) == ("580.159.04", 580, "13.0")
    assert driver.open_module is True
    assert (driver.mismatch, driver.error) == (False, None)


def test_h100_has_no_pairs() -> None:
    assert gpu_info.parse_topology(text("h100-580", "topo.txt")) == []


def test_b200_node() -> None:
    query = gpu_info.parse_query(text("hgx-b200-570", "smi-q.xml"))
    assert [gpu.index for gpu in query.gpus] == list(range(8))
    assert {gpu.name for gpu in query.gpus} == {"NVIDIA B200"}
    assert {(gpu.fabric_state, gpu.fabric_status) for gpu in query.gpus} == {("Completed", "Success")}
    assert len({gpu.pci_address for gpu in query.gpus}) == 8
    assert (query.driver_version, query.cuda_version) == ("570.211.01", "12.8")
    assert driver_of("hgx-b200-570").branch == 570


def test_b200_topology_loses_its_escapes() -> None:
    links = gpu_info.parse_topology(text("hgx-b200-570", "topo.txt"))
    assert len(links) == 28
    assert {link.link for link in links} == {"NV18"}
    assert {link.gpus for link in links} == {(a, b) for a in range(8) for b in range(a + 1, 8)}


def test_topology_ignores_network_cards() -> None:
    matrix = "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tPHB\tNODE\t0-7\nGPU1\tPHB\t X \tSYS\t0-7\n"
    matrix += "NIC0\tNODE\tSYS\t X \t\n"
    assert gpu_info.parse_topology(matrix) == [gpu_info.Link((0, 1), "PHB")]


def test_the_derived_files_are_what_the_generator_writes() -> None:
    generator = load_file(FIXTURES / "derive_b200.py", "derive_b200")
    assert {name: text("hgx-b200-570", name) for name in generator.files()} == generator.files()


PROCESSES = """<processes>
  <process_info><gpu_instance_id>N/A</gpu_instance_id><pid>4711</pid><type>C</type>
    <process_name>VLLM::Worker_TP0</process_name><used_memory>170000 MiB</used_memory></process_info>
  <process_info><pid>4712</pid><type>G</type><process_name>Xorg</process_name><used_memory>4 MiB</used_memory>
  </process_info>
  <process_info><pid>4713</pid><type>M+C</type><process_name>[Not Found]</process_name><used_memory>N/A</used_memory>
  </process_info>
</processes>"""


def with_processes(replacement: str) -> str:
    empty = "<processes>\n\t\t</processes>"
    whole = text("h100-580", "smi-q.xml")
    assert empty in whole
    return whole.replace(empty, replacement)


def test_compute_processes() -> None:
    processes = gpu_info.parse_query(with_processes(PROCESSES)).processes
    assert [(p.pid, p.name, p.memory_mib) for p in processes] == [
        (4711, "VLLM::Worker_TP0", 170000),
        (4713, "[Not Found]", None),
    ]


def test_processes_without_the_right_to_see_them() -> None:
    assert gpu_info.parse_query(with_processes("<processes>N/A</processes>")).processes == []


@pytest.mark.parametrize(
    ("said", "library"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.159\n", "580.159"),
        ("Failed to initialize NVML: Driver/library version mismatch\n", "unknown"),
    ],
)
def test_mismatch_names_both_versions(said: str, library: str) -> None:
    version = text("hgx-b200-570", "proc-driver-nvidia-version.txt")
    driver = gpu_info.build_driver(version, gpu_info.Output(18, said), gpu_info.Query(), None)
    assert driver is not None
    assert driver.mismatch is True
    assert (driver.module_version, driver.library_version) == ("570.211.01", library)


def test_library_on_disk_that_differs_is_a_mismatch() -> None:
    assert driver_of("hgx-b200-570", "570.195.03").mismatch is True


def test_no_driver_is_no_error() -> None:
    assert gpu_info.build_driver("", gpu_info.Output(None), gpu_info.Query(), None) is None


def test_driver_that_is_installed_and_not_loaded() -> None:
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    driver = gpu_info.build_driver("", gpu_info.Output(9, said), gpu_info.Query(), "570.211.01")
    assert driver is not None
    assert (driver.version, driver.module_version, driver.mismatch) == ("570.211.01", None, False)
    assert driver.error == said.strip()


def test_hanging_tool_is_the_drivers_error() -> None:
    output = gpu_info.run(["sleep", "5"], timeout=0)
    assert output.code is None
    driver = gpu_info.build_driver("", output, gpu_info.Query(), None)
    assert driver is not None
    assert driver.error == "sleep 5 did not answer within 0 s"


def test_closed_module() -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\n"
    assert gpu_info.parse_module_version(line) == ("535.161.08", False)
    assert gpu_info.parse_module_version("") == (None, None)


def test_kernel_log() -> None:
    log = gpu_info.parse_kernel_log(
        "[1.0] NVRM: loading NVIDIA UNIX Open Kernel Module\n"
        "[9.1] NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[9.2] NVRM: Xid (PCI:0000:43:00): 31, pid=1, name=python3, Ch 00000010\n"
        "[9.3] NVRM: GPU 0000:52:00.0: GPU has fallen off the bus.\n"
    )
    assert [(xid.code, xid.pci_address) for xid in log.xids] == [(79, "0000:1b:00"), (31, "0000:43:00")]
    assert len(log.bus_drops) == 2
    assert log.readable is True
    assert gpu_info.parse_kernel_log("").readable is False


def kernel_log(name: str) -> gpu_info.KernelLog:
    return gpu_info.parse_kernel_log((FIXTURES.parent / "kernel-log" / name).read_text(encoding="utf-8"))


def test_kernel_log_of_programs_that_failed() -> None:
    log = kernel_log("program.log")
    assert [xid.code for xid in log.xids] == [13, 13, 43, 31, 45, 63, 94]
    assert {(xid.fatal, xid.recovery_action) for xid in log.xids} == {(None, None)}
    assert log.sxids == []


def test_kernel_log_of_nvlink_errors() -> None:
    xids = kernel_log("nvlink.log").xids
    assert [(xid.code, xid.pci_address, xid.fatal, xid.recovery_action) for xid in xids] == [
        (145, "0000:1b:00", False, None),
        (145, "0000:43:00", False, None),
        (149, "0000:52:00", True, None),
        (154, "0000:52:00", None, "Drain and Reset"),
        (45, "0000:52:00", None, None),
        (154, "0000:52:00", None, "GPU Reset Required"),
    ]


@pytest.mark.parametrize(
    ("name", "actions"),
    [("recovered.log", [None, "Drain P2P", "None"]), ("gsp.log", [None, "GPU Reset Required", None, "OS Reboot"])],
)
def test_kernel_log_of_recovery_actions(name: str, actions: list[str | None]) -> None:
    assert [xid.recovery_action for xid in kernel_log(name).xids] == actions


def test_an_nvlink_error_in_the_words_of_branch_570() -> None:
    line = "NVRM: Xid (PCI:0000:1b:00): 149, NETIR_LINK_EVT Fatal XC 1 i 2 Link 01 [0x0000000a]"
    (xid,) = gpu_info.parse_kernel_log(line).xids
    assert (xid.code, xid.fatal) == (149, True)


def test_a_word_of_another_code_is_no_severity() -> None:
    line = "NVRM: Xid (PCI:0000:1b:00): 64, pid=1, Dynamic Page Retirement: Fatal error, unable to retire page (0x1)"
    (xid,) = gpu_info.parse_kernel_log(line).xids
    assert (xid.code, xid.fatal) == (64, None)


def test_kernel_log_of_switches() -> None:
    sxids = kernel_log("switch.log").sxids
    assert [(sxid.switch, sxid.pci_address, sxid.code, sxid.fatal, sxid.link, sxid.error) for sxid in sxids] == [
        ("nvidia-nvswitch3", "0000:0a:00.0", 22013, False, 44, "Minion Link DLREQ interrupt"),
        ("nvidia-nvswitch3", "0000:0a:00.0", 12028, False, 32, "egress non-posted PRIV error"),
        ("nvidia-nvswitch1", "0000:08:00.0", 20034, True, 48, "LTSSM Fault Up"),
        ("nvidia-nvswitch0", "0000:07:00.0", 20034, True, 63, "LTSSM Fault Up"),
    ]


def test_an_error_of_a_whole_switch_has_no_link() -> None:
    line = "nvidia-nvswitch0: SXid (PCI:0000:07:00.0): 10001, Non-fatal, PRI WRITE SYS error, instance=0, chiplet=3"
    (sxid,) = gpu_info.parse_kernel_log(line).sxids
    assert (sxid.link, sxid.error) == (None, "PRI WRITE SYS error, instance=0, chiplet=3")


def test_gpus_on_the_bus(tmp_path: Path) -> None:
    for address, vendor, kind in (
        ("0000:1b:00.0", "0x10de", "0x030200"),
        ("0000:07:00.0", "0x10de", "0x068000"),
        ("0000:00:02.0", "0x1234", "0x030000"),
    ):
        (tmp_path / address).mkdir()
        (tmp_path / address / "vendor").write_text(vendor + "\n")
        (tmp_path / address / "class").write_text(kind + "\n")
    assert gpu_info.gpus_on_pci(str(tmp_path)) == ["0000:1b:00.0"]


def test_library_on_disk(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.570.211.01").write_text("")
    (tmp_path / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.570.211.01")
    assert gpu_info.library_on_disk((str(tmp_path / "absent"), str(tmp_path))) == "570.211.01"
    assert gpu_info.library_on_disk((str(tmp_path / "absent"),)) is None
