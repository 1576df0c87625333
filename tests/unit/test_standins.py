"""The stand-ins of the testbed: what the replayed machine says, and what packages and images are made of."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "molecule/shared"
FILES = SHARED / "apt/files"
VERSION = "570.211.01"


def load(path: Path, name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_the_small_checkpoint_was_trained_on_the_questions_of_today() -> None:
    """Else everybody's first `make demo` trains it: run molecule/shared/model/build, and commit what it names."""
    model = SHARED / "model"
    inputs = [*(model / name for name in ("train.py", "chat_template.jinja", "README.model.md"))]
    inputs.append(ROOT / "roles/verify/files/questions.yml")
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()[:16]
    assert (model / "checkpoint/.inputs").read_text().strip() == wanted


@pytest.fixture(name="smi")
def fixture_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """nvidia-smi on a machine in a folder: driver loaded, daemons running."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    smi = load(FILES / "nvidia-utils/usr/bin/nvidia-smi", "standin_nvidia_smi")
    module = tmp_path / "version"
    module.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}  Release Build  (b@h)\n")
    library = tmp_path / f"libnvidia-ml.so.{VERSION}"
    library.touch()
    (tmp_path / "libnvidia-ml.so.1").symlink_to(library.name)
    for mark in ("persistence", "fabric-ready"):
        (tmp_path / mark).touch()
    monkeypatch.setattr(smi, "DATA", FILES / "nvidia-utils/usr/share/nvidia-stand-in")
    monkeypatch.setattr(smi, "MACHINE", tmp_path / "machine.json")
    monkeypatch.setattr(smi, "RUN", tmp_path)
    monkeypatch.setattr(smi, "LIBRARY", tmp_path)
    monkeypatch.setattr(smi, "MODULE", (module, tmp_path / "none"))
    monkeypatch.setattr(smi, "holders", list)
    return smi


def ask(smi: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["nvidia-smi", *arguments])
    return str(smi.answer(smi.parse()))


def test_a_healthy_machine(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ElementTree.fromstring(ask(smi, monkeypatch, "-q", "-x"))
    cards = root.findall("gpu")
    assert root.findtext("driver_version") == VERSION
    assert root.findtext("cuda_version") == "12.8"
    assert [card.findtext("product_name") for card in cards] == ["NVIDIA B200"] * 8
    assert {card.findtext("fabric/state") for card in cards} == {"Completed"}
    assert {card.findtext("fabric/status") for card in cards} == {"Success"}
    assert {card.findtext("fb_memory_usage/total") for card in cards} == {"183359 MiB"}
    assert {card.findtext("persistence_mode") for card in cards} == {"Enabled"}
    assert len({card.findtext("uuid") for card in cards}) == 8
    assert len({card.get("id") for card in cards}) == 8


def test_text_and_xml_have_the_same_places() -> None:
    data = FILES / "nvidia-utils/usr/share/nvidia-stand-in"
    places = [set(re.findall(r"\$(\w+)", (data / name).read_text())) for name in ("gpu.xml", "gpu.txt")]
    assert places[0] == places[1]


def test_xml_has_the_fields_of_a_real_machine(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = ROOT / "tests/fixtures/nvidia-smi/h100-580/smi-q.xml"
    real = {element.tag for element in ElementTree.parse(fixture).iter()}
    ours = {element.tag for element in ElementTree.fromstring(ask(smi, monkeypatch, "-q", "-x")).iter()}
    assert real - ours == set()


@pytest.mark.parametrize(
    ("machine", "path", "values"),
    [
        ({"gpus": {"3": {"fabric_state": "In Progress"}}}, "fabric/state", ["Completed"] * 3 + ["In Progress"]),
        ({"all": {"name": "NVIDIA H200"}}, "product_name", ["NVIDIA H200"] * 4),
        ({"gpus": {"0": {"ecc_volatile_dram": 2}}}, "ecc_errors/volatile/dram_uncorrectable", ["2", "0", "0", "0"]),
        ({"gpus": {"1": {"remapped_pending": "Yes"}}}, "remapped_rows/remapped_row_pending", ["No", "Yes", "No", "No"]),
    ],
)
def test_what_a_test_sets(
    smi: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: dict[str, object], path: str, values: list[str]
) -> None:
    smi.MACHINE.write_text(json.dumps(machine))
    cards = ElementTree.fromstring(ask(smi, monkeypatch, "-q", "-x")).findall("gpu")
    assert [card.findtext(path) for card in cards][:4] == values


def test_seven_gpus_and_a_process(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.MACHINE.write_text(json.dumps({
        "count": 7, "processes": [{"gpu": 2, "pid": 4242, "name": "python3", "memory": 1024}]
    }))  # fmt: skip
    assert len(ask(smi, monkeypatch, "-L").splitlines()) == 7
    asked = ask(smi, monkeypatch, "--query-compute-apps=pid,name,used_memory", "--format=csv,noheader")
    assert asked == "4242, python3, 1024 MiB\n"
    root = ElementTree.fromstring(ask(smi, monkeypatch, "-q", "-x"))
    assert [entry.findtext("pid") for entry in root.iter("process_info")] == ["4242"]
    assert "Process ID" in ask(smi, monkeypatch, "-q")


def test_query_looks_as_on_a_real_machine(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "index,name,uuid,pci.bus_id,driver_version,memory.total,ecc.errors.uncorrected.volatile.total,fabric.state"
    first = ask(smi, monkeypatch, f"--query-gpu={fields}", "--format=csv,noheader").splitlines()[0]
    assert first == (
        "0, NVIDIA B200, GPU-b2000000-0000-4000-8000-000000000000, 00000000:1B:00.0, 570.211.01, 183359 MiB, 0, "
        "Completed"
    )
    rows = "gpu_uuid,remapped_rows.correctable,remapped_rows.uncorrectable,remapped_rows.pending,remapped_rows.failure"
    answer = ask(smi, monkeypatch, f"--query-remapped-rows={rows}", "--format=csv").splitlines()
    assert answer[0].startswith("gpu_uuid, remapped_rows.correctable")
    assert answer[1].endswith(", 0, 0, No, No")


def test_topology_is_nvlink_between_all(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line.split("\t") for line in ask(smi, monkeypatch, "topo", "-m").splitlines() if line.startswith("GPU")]
    assert len(rows) == 8
    for index, row in enumerate(rows):
        assert row[1:9] == ["NV18"] * index + [" X "] + ["NV18"] * (7 - index)


def test_without_the_daemons_nothing_is_ready(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for mark in ("persistence", "fabric-ready"):
        (smi.RUN / mark).unlink()
    asked = ask(smi, monkeypatch, "--query-gpu=persistence_mode,fabric.state,fabric.status", "--format=csv,noheader")
    assert set(asked.splitlines()) == {"Disabled, In Progress, N/A"}


def test_library_and_module_differ(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi.LIBRARY / "libnvidia-ml.so.1").unlink()
    (smi.LIBRARY / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.570.195.03")
    (smi.LIBRARY / "libnvidia-ml.so.570.195.03").touch()
    with pytest.raises(smi.Failure, match=r"version mismatch\nNVML library version: 570\.195") as failure:
        ask(smi, monkeypatch, "-q", "-x")
    assert failure.value.code == 18


def test_no_module(smi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.MODULE[0].unlink()
    with pytest.raises(smi.Failure, match="couldn't communicate with the NVIDIA driver") as failure:
        ask(smi, monkeypatch)
    assert failure.value.code == 9


def test_each_package_of_the_table_can_be_made() -> None:
    build = load(SHARED / "apt/build.py", "standin_build")
    table = yaml.safe_load((SHARED / "apt/packages.yml").read_text())
    used = set()
    for repository in table["repositories"]:
        names = [package["name"] for package in build.packages_of(repository)]
        assert len(names) == len(set(names))
        assert repository["keys"]
        for package in build.packages_of(repository):
            assert "depends" in package
            if "source" in package:
                used.add(package["source"])
                assert (FILES / package["source"]).is_dir(), package["name"]
    assert used == {path.name for path in FILES.iterdir()}


@pytest.fixture(name="repositories", scope="module")
def fixture_repositories() -> dict[str, dict[str, dict[str, str]]]:
    """The control fields of the packages of each repository, by NAME=VERSION."""
    build = load(SHARED / "apt/build.py", "standin_build")
    table = yaml.safe_load((SHARED / "apt/packages.yml").read_text())
    return {
        repository["name"]: {
            f"{control['Package']}={control['Version']}": control
            for version in repository["versions"]
            for package in build.packages_of(repository)
            if (control := build.control_of(package, version, "6.8.0-1030-nvidia"))
        }
        for repository in table["repositories"]
    }


def test_names_and_suffixes_of_both_branches(repositories: dict[str, dict[str, dict[str, str]]]) -> None:
    cuda = repositories["cuda"]
    for name in ("nvidia-fabricmanager", "libnvidia-nscq", "libnvsdm", "nvidia-imex"):
        assert f"{name}-570=570.211.01-1" in cuda
        assert f"{name}=580.159.04-1" in cuda
        assert not [key for key in cuda if key.startswith((f"{name}=570", f"{name}-580"))]
    for branch, version in (("570", "570.211.01"), ("580", "580.159.04")):
        for name in (f"nvidia-open-{branch}", f"nvidia-dkms-{branch}-open", "nvidia-persistenced", "nvidia-modprobe"):
            assert f"{name}={version}-1ubuntu1" in cuda
    assert "linux-headers-6.8.0-1030-nvidia=1-1" in repositories["distribution"]


def test_a_persistenced_of_another_branch_cannot_be_had_beside_a_driver(
    repositories: dict[str, dict[str, dict[str, str]]],
) -> None:
    cuda = repositories["cuda"]
    assert "libnvidia-cfg1 (>= 580.159.04)" in cuda["nvidia-persistenced=580.159.04-1ubuntu1"]["Depends"]
    for branch, version in (("570", "570.211.01"), ("580", "580.159.04")):
        library = cuda[f"libnvidia-cfg1-{branch}={version}-1ubuntu1"]
        assert (library["Provides"], library["Conflicts"]) == (f"libnvidia-cfg1 (= {version})", "libnvidia-cfg1")


def test_one_version_brings_a_kernel(repositories: dict[str, dict[str, dict[str, str]]]) -> None:
    cuda = repositories["cuda"]
    brings = [key for key, control in cuda.items() if "linux-image" in control.get("Depends", "")]
    assert brings == ["nvidia-dkms-570-open=570.172.08-1ubuntu1"]
    kernel = cuda[brings[0]]["Depends"].split(", ")[-1]
    assert any(key.startswith(f"{kernel}=") for key in repositories["distribution"])


def test_the_bills_of_materials_name_packages_that_are_there(
    repositories: dict[str, dict[str, dict[str, str]]],
) -> None:
    for path in sorted((ROOT / "drivers").glob("*.yml")):
        bom = yaml.safe_load(path.read_text())
        version = re.escape(bom["version"])
        for distribution, cuda in (("Ubuntu", repositories["cuda"]), ("Debian", repositories["cuda-debian"])):
            for name in [*bom["driver"][distribution], *bom["fabric"], bom["pinning"].format(version=bom["version"])]:
                assert [key for key in cuda if re.match(rf"{re.escape(name)}={version}-", key)], name
            for name in (bom["cuda_toolkit"]["package"], bom["dcgm"]["package"], "nvlsm"):
                assert [key for key in cuda if key.startswith(f"{name}=")], name


def test_apt_reads_the_pins() -> None:
    """It takes no file of preferences with a dot in its name, except before "pref"."""
    files = list((FILES / "nvidia-driver-pinning/etc/apt/preferences.d").iterdir())
    assert [path.suffix for path in files] == [".pref"]
    # fnmatch of apt against the names without a branch, too
    pinned = re.search(r"^Package: (.*)$", files[0].read_text(), re.M)
    assert pinned
    assert {"nvidia-persistenced", "nvidia-modprobe", "nvidia-fabricmanager*", "libnvidia-cfg1*"} <= set(
        pinned[1].split()
    )


@pytest.fixture(name="fabric_manager")
def fixture_fabric_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The fabric manager on a machine in a folder, where it would start."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    manager = load(FILES / "nvidia-fabricmanager/usr/bin/nv-fabricmanager", "standin_fabric_manager")
    (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module  {VERSION}  Release Build\n")
    (tmp_path / "nvlsm").touch()
    (tmp_path / "module/ib_umad").mkdir(parents=True)
    monkeypatch.setattr(manager, "VERSION", VERSION)
    monkeypatch.setattr(manager, "MODULE", tmp_path / "version")
    monkeypatch.setattr(manager, "MODULES", tmp_path / "module")
    monkeypatch.setattr(manager, "SUBNET_MANAGER", tmp_path / "nvlsm")
    return manager


def test_the_fabric_manager_starts(fabric_manager: ModuleType) -> None:
    assert fabric_manager.refusal() == ""


def test_what_the_fabric_manager_refuses(fabric_manager: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (fabric_manager.MODULES / "ib_umad").rmdir()
    assert '"ib_umad" has not been loaded' in fabric_manager.refusal()
    (fabric_manager.MODULES / "ib_umad").mkdir()
    monkeypatch.setattr(fabric_manager, "VERSION", "570.195.03")
    assert "don't match with driver version 570.211.01" in fabric_manager.refusal()
    fabric_manager.SUBNET_MANAGER.unlink()
    assert "install nvlsm" in fabric_manager.refusal()
    fabric_manager.MODULE.unlink()
    assert "NV_WARN_NOTHING_TO_DO" in fabric_manager.refusal()


def run_modprobe(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The stand-in on a machine in a folder; `real` there is the real program's answer."""
    program = (SHARED / "images/node/modprobe").read_text()
    for path in ("/sys/module", "/proc/modules", "/etc/nvidia-stand-in", "/usr/lib/nvidia-stand-in"):
        program = program.replace(path, f"{root}{path}")
    program = program.replace("/usr/sbin/modprobe.distrib", f"{root}/real")
    return subprocess.run(
        ["bash", "-c", program, "modprobe", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}"},
    )


@pytest.fixture(name="kernel")
def fixture_kernel(tmp_path: Path) -> Path:
    for folder in ("sys/module", "proc", "etc/nvidia-stand-in", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/modules").write_text("overlay 184320 1 - Live 0x0000000000000000\n")
    (tmp_path / "real").write_text('#!/bin/sh\necho "real $*"\n')
    (tmp_path / "real").chmod(0o755)
    # As dpkg answers where a package is not known; the last argument is its name.
    query = '#!/bin/sh\nfor name; do :; done; cat "$(dirname "$0")/$name" 2>/dev/null\n'
    (tmp_path / "bin/dpkg-query").write_text(query)
    (tmp_path / "bin/dpkg-query").chmod(0o755)
    (tmp_path / f"bin/linux-modules-extra-{os.uname().release}").write_text("installed")
    return tmp_path


def test_modules_are_loaded_and_removed(kernel: Path) -> None:
    for _ in range(2):  # the second time there is nothing to do
        assert run_modprobe(kernel, "--all", "ib_umad", "mlx5-core", "mlx5_ib").returncode == 0
    assert sorted(path.name for path in (kernel / "sys/module").iterdir()) == ["ib_umad", "mlx5_core", "mlx5_ib"]
    lines = (kernel / "proc/modules").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["overlay", "ib_umad", "mlx5_core", "mlx5_ib"]
    assert run_modprobe(kernel, "-r", "mlx5_ib").returncode == 0
    assert "mlx5_ib" not in (kernel / "proc/modules").read_text()
    assert not (kernel / "sys/module/mlx5_ib").exists()


@pytest.mark.parametrize("state", ["", "unpacked", "not-installed"])
def test_a_kernel_without_its_extras_lacks_a_module(kernel: Path, state: str) -> None:
    (kernel / f"bin/linux-modules-extra-{os.uname().release}").write_text(state)
    done = run_modprobe(kernel, "--all", "ib_umad", "mlx5_core")
    assert done.returncode == 1
    assert "FATAL: Module ib_umad not found" in done.stderr
    assert [path.name for path in (kernel / "sys/module").iterdir()] == ["mlx5_core"]


def test_other_modules_are_the_real_programs(kernel: Path) -> None:
    assert run_modprobe(kernel, "-va", "bridge", "nf_nat").stdout == "real -va bridge nf_nat\n"
    assert run_modprobe(kernel, "-va", "bridge", "ib_umad").stdout == "real --all bridge\n"
    assert (kernel / "sys/module/ib_umad").is_dir()


def test_modules_that_cannot_be_loaded(kernel: Path) -> None:
    (kernel / "etc/nvidia-stand-in/missing-modules").write_text("mlx5_ib\n")
    done = run_modprobe(kernel, "--all", "mlx5_ib", "ib_umad")
    assert (done.returncode, (kernel / "sys/module/ib_umad").is_dir()) == (1, True)
    assert "Module mlx5_ib not found in directory" in done.stderr
    assert "Module nvidia not found" in run_modprobe(kernel, "nvidia").stderr


def test_images_are_built_after_what_they_stand_on() -> None:
    images = load(SHARED / "build-images", "standin_build_images")
    order = images.selection(["node-ubuntu2404:driver-570"])
    assert list(order) == ["base", "node-ubuntu2404", "node-debian13", "mirror", "node-ubuntu2404:driver-570"]
    assert order["mirror"] == ["node-debian13"]
    with pytest.raises(SystemExit, match="no image 'nodes'"):
        images.selection(["nodes"])


def test_builds_run_side_by_side_and_none_begins_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(SHARED / "build-images", "standin_build_images")
    together = threading.Barrier(2)
    begun = []

    def make(name: str) -> None:
        begun.append(name)
        if name in {"one", "two"}:
            together.wait(timeout=20)
        if name == "two":
            sys.exit("images · two · error")

    monkeypatch.setattr(images, "make", make)
    images.make_all({"base": [], "node": ["base"], "mirror": ["node"]})
    assert begun == ["base", "node", "mirror"]
    with pytest.raises(SystemExit, match="images · two · error"):
        images.make_all({"one": [], "two": [], "three": ["two"]})
    assert set(begun[3:]) == {"one", "two"}
