"""driver_info's parsers on what dpkg, apt, the kernel and DKMS write."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.modules import driver_info

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "nvidia-smi"


def test_the_documented_options_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, types and defaults, which are written twice."""
    seen: dict[str, Any] = {}

    class Module:
        def __init__(self, argument_spec: dict[str, Any], supports_check_mode: bool) -> None:
            seen.update(argument_spec)
            raise SystemExit

    monkeypatch.setattr(driver_info, "AnsibleModule", Module)
    with pytest.raises(SystemExit):
        driver_info.main()
    documented = yaml.safe_load(driver_info.DOCUMENTATION)["options"]
    assert {
        name: {k: v for k, v in option.items() if k != "description"} for name, option in documented.items()
    } == seen


# ---- kernel


def test_loaded_driver() -> None:
    text = (FIXTURES / "hgx-b200-570" / "proc-driver-nvidia-version.txt").read_text()
    assert driver_info.parse_loaded(text) == {"version": "570.211.01", "branch": 570, "open": True}
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\n"
    assert driver_info.parse_loaded(closed) == {"version": "535.161.08", "branch": 535, "open": False}
    assert driver_info.parse_loaded("") is None


def test_modules_are_matched_by_their_whole_name(tmp_path: Path) -> None:
    for name in ("nvidia_uvm", "mlx5_ib", "mlx5_core", "ib_uverbs"):
        (tmp_path / name).mkdir()
    wanted = ["nvidia", "ib_umad", "mlx5_core", "mlx5_ib"]
    assert driver_info.loaded_modules(wanted, str(tmp_path)) == ["mlx5_core", "mlx5_ib"]


@pytest.mark.parametrize(
    ("data", "state"),
    [(b"\x06\x00\x00\x00\x01", True), (b"\x06\x00\x00\x00\x00", False), (b"\x06\x00", None), (None, None)],
)
def test_secure_boot(tmp_path: Path, data: bytes | None, state: bool | None) -> None:
    (tmp_path / "SecureBootEnable-f0a30bc7-af08-4556-99c4-001009c93a44").write_bytes(b"\x03\x00\x00\x00\x01")
    if data is not None:
        (tmp_path / "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(data)
    assert driver_info.secure_boot(str(tmp_path)) is state


# ---- dpkg and apt

DPKG = (
    "ii \tbash\t5.2.21-2ubuntu4\n"
    "hi \tnvidia-open-570\t570.211.01-1ubuntu1\n"
    "hi \tnvidia-fabricmanager-570\t570.211.01-1\n"
    "ii \tlibnvidia-compute-570\t570.211.01-1ubuntu1\n"
    "ii \tlibnvidia-compute-570\t570.195.03-1ubuntu1\n"  # of i386
    "iF \tnvidia-dkms-580-open\t580.95.05-1ubuntu1\n"
    "iU \tnvidia-utils-580\t580.95.05-1ubuntu1\n"
    "iHR\tnvidia-modprobe\t580.95.05-1ubuntu1\n"
    "it \tman-db\t2.12.0-4build2\n"
    "iW \tlibc-bin\t2.39-0ubuntu8\n"
    "rc \tnvidia-utils-535\t535.183.01-0ubuntu1\n"
    "un \tnvidia-settings\t\n"
    "ii \tlinux-image-6.8.0-60-generic\t6.8.0-60.63\n"
    "rc \tlinux-image-6.8.0-31-generic\t6.8.0-31.31\n"
)


def test_packages() -> None:
    packages = driver_info.parse_packages(DPKG)
    assert packages.matching(["*nvidia*"]) == {
        "nvidia-open-570": "570.211.01-1ubuntu1",
        "nvidia-fabricmanager-570": "570.211.01-1",
        "libnvidia-compute-570": "570.211.01-1ubuntu1",
        "nvidia-dkms-580-open": "580.95.05-1ubuntu1",
        "nvidia-utils-580": "580.95.05-1ubuntu1",
    }
    assert packages.half == ["nvidia-dkms-580-open", "nvidia-utils-580", "nvidia-modprobe", "man-db", "libc-bin"]
    assert packages.held == ["nvidia-open-570", "nvidia-fabricmanager-570"]
    assert packages.matching(["linux-image-*"]) == {"linux-image-6.8.0-60-generic": "6.8.0-60.63"}


def test_no_dpkg() -> None:
    assert driver_info.parse_packages("") == driver_info.Packages()


POLICY = """\
nvidia-open-570:
  Installed: 570.195.03-1ubuntu1
  Candidate: 570.211.01-1ubuntu1
  Version table:
     580.95.05-1ubuntu1 -1
        500 https://mirror.example/compute/cuda/repos/ubuntu2404/x86_64  Packages
     570.211.01-1ubuntu1 1000
        500 https://mirror.example/compute/cuda/repos/ubuntu2404/x86_64  Packages
        500 https://other.example/compute/cuda/repos/ubuntu2404/x86_64  Packages
 *** 570.195.03-1ubuntu1 500
        500 https://mirror.example/compute/cuda/repos/ubuntu2404/x86_64  Packages
        100 /var/lib/dpkg/status
nvidia-persistenced:
  Installed: 535.1-1
  Candidate: 535.1-1
  Version table:
 *** 535.1-1 100
        100 /var/lib/dpkg/status
linux-headers-6.8.0-60-generic:
  Installed: (none)
  Candidate: 6.8.0-60.63
  Version table:
     6.8.0-60.63 500
        500 http://archive.example/ubuntu noble-updates/main amd64 Packages
nvidia-kernel-open:
  Installed: (none)
  Candidate: (none)
  Version table:
"""


def test_policy() -> None:
    policy = driver_info.parse_policy(POLICY)
    assert policy["nvidia-open-570"].candidate == "570.211.01-1ubuntu1"
    assert policy["nvidia-open-570"].versions == [
        "580.95.05-1ubuntu1",
        "570.211.01-1ubuntu1",
        "570.195.03-1ubuntu1",
    ]
    assert policy["nvidia-persistenced"].versions == []  # installed, and in no source
    assert policy["linux-headers-6.8.0-60-generic"].candidate == "6.8.0-60.63"
    assert policy["nvidia-kernel-open"] == driver_info.Policy()
    assert "nvidia-unheard-of" not in policy
    assert driver_info.parse_policy("") == {}


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "preferences.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2204/x86_64/ /\n"
        "deb http://archive.example/ubuntu noble main restricted\n"
    )
    return tmp_path


def sources(apt: Path, name: str, text: str, own: list[str] | None = None) -> list[dict[str, Any]]:
    (apt / "sources.list.d" / name).write_text(text)
    found = driver_info.driver_sources(own or [], str(apt))
    return [{**source, "path": Path(source["path"]).name} for source in found]


def test_comments_and_other_sources_are_none(apt: Path) -> None:
    assert sources(apt, "docker.list", "deb https://download.docker.com/linux/ubuntu noble stable\n") == []


def test_one_line_source(apt: Path) -> None:
    line = "deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] https://developer.download.nvidia.com/x/ /\n"
    assert sources(apt, "cuda-ubuntu2404-x86_64.list", line) == [
        {
            "path": "cuda-ubuntu2404-x86_64.list",
            "uri": "https://developer.download.nvidia.com/x/ /",
            "repository": "developer.download.nvidia.com/x/",
            "alone": True,
        }
    ]


def test_a_local_repository_of_cuda_is_a_source(apt: Path) -> None:
    (found,) = sources(apt, "local.list", "deb file:///var/cuda-repo-ubuntu2404-12-8-local /\n")
    assert found["uri"] == "file:///var/cuda-repo-ubuntu2404-12-8-local /"


STANZAS = """\
Types: deb
URIs: http://archive.example/ubuntu
Suites: noble
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 nvidiaCUDAnvidia
 -----END PGP PUBLIC KEY BLOCK-----

# A driver's source
Types: deb
URIs: https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu/
Suites: noble
Components: main

Enabled: no
Types: deb
URIs: https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/
Suites: /
"""


def test_stanzas(apt: Path) -> None:
    uri = "https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu/ noble main"
    repository = "ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu/dists/noble"
    assert sources(apt, "all.sources", STANZAS) == [
        {"path": "all.sources", "uri": uri, "repository": repository, "alone": False}
    ]


def test_a_source_of_no_binaries_is_none_to_install_from(apt: Path) -> None:
    (found,) = sources(apt, "cuda.list", "deb-src https://developer.download.nvidia.com/x/ /\n")
    assert found["repository"] == ""


def test_own_source_and_the_container_toolkits_are_no_other_ones(apt: Path) -> None:
    own = str(apt / "sources.list.d" / "glm-nvidia-cuda.sources")
    (apt / "sources.list.d" / "nvidia-container-toolkit.list").write_text(
        "deb https://nvidia.github.io/libnvidia-container/stable/deb/amd64 /\n"
    )
    (apt / "sources.list.d" / "old.list.save").write_text("deb https://developer.download.nvidia.com/x/ /\n")
    stanza = "Types: deb\nURIs: https://mirror.example/compute/cuda/repos/debian13/x86_64/\nSuites: /\n"
    assert sources(apt, "glm-nvidia-cuda.sources", stanza, [own]) == []
    assert len(sources(apt, "glm-nvidia-cuda.sources", stanza)) == 1


def test_preferences(apt: Path) -> None:
    pinned = apt / "preferences.d" / "cuda-repository-pin-600"
    pinned.write_text("Package: nsight-compute\nPin: origin *ubuntu.com*\n\nPackage: nvidia-*\nPin-Priority: 600\n")
    (apt / "preferences.d" / "docker").write_text("Package: docker-ce\nPin-Priority: 600\n")
    assert driver_info.driver_preferences(str(apt)) == [str(pinned)]


# ---- the lock


def test_locks() -> None:
    text = (
        "1: POSIX  ADVISORY  WRITE 4711 fd:01:131090 0 EOF\n"
        "1: -> POSIX  ADVISORY  WRITE 4712 fd:01:131090 0 EOF\n"
        "2: FLOCK  ADVISORY  WRITE 812 00:1a:9 0 EOF\n"
        "3: POSIX  ADVISORY  READ  813 fd:01:131090 0 EOF\n"
        "4: POSIX  ADVISORY  WRITE 0 fd:01:131090 0 EOF\n"
        "5: OFDLCK ADVISORY  WRITE -1 fd:01:131090 0 EOF\n"
    )
    assert driver_info.parse_locks(text, 131090) == [4711]
    assert driver_info.parse_locks(text, 13109) == []


def test_the_holder_of_a_lock_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock-frontend"
    assert driver_info.lock_holder(str(path)) is None
    with path.open("w") as lock:
        assert driver_info.lock_holder(str(path)) is None
        fcntl.lockf(lock, fcntl.LOCK_EX)
        holder = driver_info.lock_holder(str(path))
    assert holder is not None
    assert holder["pid"] == os.getpid()
    assert "py" in holder["process"]
    assert driver_info.lock_holder(str(path)) is None


def test_the_same_inode_elsewhere_is_no_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock-frontend"
    lock.write_text("")
    process = tmp_path / "proc" / "4711"
    (process / "fd").mkdir(parents=True)
    (process / "comm").write_text("unattended-upgr\n")
    (tmp_path / "proc" / "locks").write_text(
        f"1: POSIX  ADVISORY  WRITE 4711 00:2f:{lock.stat().st_ino} 0 EOF\n"
        f"2: POSIX  ADVISORY  WRITE 4799 00:2f:{lock.stat().st_ino} 0 EOF\n"  # gone meanwhile
    )
    (process / "fd" / "3").symlink_to("/somewhere/else")
    assert driver_info.lock_holder(str(lock), str(tmp_path / "proc")) is None
    (process / "fd" / "4").symlink_to(lock)
    assert driver_info.lock_holder(str(lock), str(tmp_path / "proc")) == {"pid": 4711, "process": "unattended-upgr"}
    (process / "cmdline").write_text("/usr/bin/python3\0/usr/bin/unattended-upgrade\0")
    holder = driver_info.lock_holder(str(lock), str(tmp_path / "proc"))
    assert holder == {"pid": 4711, "process": "/usr/bin/python3 /usr/bin/unattended-upgrade"}


# ---- DKMS

FAILED_BUILD = """\
DKMS make.log for nvidia-570.211.01 for kernel 6.8.0-60-generic (x86_64)
Mon Nov  2 10:11:12 UTC 2026
make[1]: Entering directory '/usr/src/linux-headers-6.8.0-60-generic'
  CC [M]  /var/lib/dkms/nvidia/570.211.01/build/nvidia/nv-mmap.o
/var/lib/dkms/nvidia/570.211.01/build/nvidia/nv-mmap.c:481:5: error: implicit declaration of 'vm_flags_set'
cc1: some warnings being treated as errors
make[3]: *** [scripts/Makefile.build:243: /var/lib/dkms/nvidia/570.211.01/build/nvidia/nv-mmap.o] Error 1
make[2]: *** [/usr/src/linux-headers-6.8.0-60-generic/Makefile:1926: /var/lib/dkms/nvidia/570.211.01/build] Error 2
make[1]: *** [Makefile:240: __sub-make] Error 2
make[1]: Leaving directory '/usr/src/linux-headers-6.8.0-60-generic'
make: *** [Makefile:82: modules] Error 2
"""


def log(root: Path, name: str, text: str, age: int = 0) -> Path:
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


def test_failed_build(tmp_path: Path) -> None:
    path = log(tmp_path, "nvidia/570.211.01/build/make.log", FAILED_BUILD)
    log(tmp_path, "nvidia/570.195.03/build/make.log", "an older error\n", age=60)
    found = driver_info.dkms_log(str(tmp_path))
    assert found is not None
    assert (found["version"], found["path"]) == ("570.211.01", str(path))
    assert len(found["lines"]) == 5
    assert found["lines"][0].endswith("error: implicit declaration of 'vm_flags_set'")
    assert found["lines"][-1] == "make: *** [Makefile:82: modules] Error 2"


def test_a_build_that_was_cut_off_ends_with_its_last_lines(tmp_path: Path) -> None:
    log(tmp_path, "nvidia/570.211.01/build/make.log", "\n".join(f"CC {i}.o" for i in range(9)) + "\n\n")
    found = driver_info.dkms_log(str(tmp_path))
    assert found is not None
    assert found["lines"] == [f"CC {i}.o" for i in range(4, 9)]


def test_a_finished_build_is_no_failure(tmp_path: Path) -> None:
    log(tmp_path, "nvidia/570.195.03/build/make.log", FAILED_BUILD, age=60)
    log(tmp_path, "nvidia/570.211.01/6.8.0-60-generic/x86_64/log/make.log", "  LD [M]  nvidia.ko\n")
    assert driver_info.dkms_log(str(tmp_path)) is None
    assert driver_info.dkms_log(str(tmp_path / "absent")) is None


# ---- services, toolkit, containers


def test_units() -> None:
    listing = (
        "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n\n"
        "LoadState=not-found\nActiveState=inactive\nUnitFileState=\n"
    )
    assert driver_info.parse_units(listing, ["nvidia-persistenced.service", "nvidia-dcgm.service"]) == {
        "nvidia-persistenced.service": {"load": "loaded", "active": "active", "enabled": "enabled"},
        "nvidia-dcgm.service": {"load": "not-found", "active": "inactive", "enabled": None},
    }
    absent = {"load": "not-found", "active": "inactive", "enabled": None}
    assert driver_info.parse_units("", ["a.service", "b.service"]) == {"a.service": absent, "b.service": absent}


def test_toolkit() -> None:
    version_json = '{"cuda": {"name": "CUDA SDK", "version": "12.8.1"}, "nvidia_driver": {"version": "570.124.06"}}'
    nvcc = "Cuda compilation tools, release 12.8, V12.8.93\nBuild cuda_12.8.r12.8/compiler.35583870_0\n"
    assert driver_info.parse_toolkit(version_json, nvcc) == "12.8.1"
    assert driver_info.parse_toolkit("", nvcc) == "12.8"
    assert driver_info.parse_toolkit("{}", "") is None


def test_version_of_the_fabric_manager() -> None:
    assert driver_info.parse_version("Fabric Manager version is : 570.211.01\n") == "570.211.01"
    assert driver_info.parse_version("") is None


@pytest.mark.parametrize(
    ("host", "uses"),
    [
        ({"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"], "Capabilities": None}]}, True),
        ({"DeviceRequests": [{"Driver": "", "Count": -1, "DeviceIDs": None, "Capabilities": [["gpu"]]}]}, True),
        ({"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["vendor.example/nic=0"], "Capabilities": None}]}, False),
        ({"Devices": [{"PathOnHost": "/dev/nvidia0"}]}, True),
        ({"Devices": [{"PathOnHost": "/dev/fuse"}], "DeviceRequests": None, "Runtime": "runc"}, False),
        ({"Runtime": "nvidia"}, True),
        ({}, False),
    ],
)
def test_containers_that_use_gpus(host: dict[str, Any], uses: bool) -> None:
    assert driver_info.uses_gpus({"Name": "/one", "HostConfig": host}) is uses


def test_block_list() -> None:
    assert driver_info.blocks_upgrades('Unattended-Upgrade::Package-Blacklist {\n  "nvidia-";\n};\n') is True
    assert driver_info.blocks_upgrades('Unattended-Upgrade::Package-Blacklist {\n  "docker";\n};\n') is False
    assert driver_info.blocks_upgrades("") is False


def test_a_bare_machine_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where every command is missing."""
    monkeypatch.setattr(driver_info, "run", lambda command, timeout: "")
    monkeypatch.setattr(driver_info, "docker_runs", lambda: False)
    params: dict[str, Any] = {
        name: option.get("default") for name, option in yaml.safe_load(driver_info.DOCUMENTATION)["options"].items()
    }
    seen = driver_info.collect({**params, "packages": ["nvidia-open-570"], "units": ["x.service"]})
    assert (seen["installed"], seen["candidates"]) == ({}, {"nvidia-open-570": []})
    assert seen["services"]["x.service"]["load"] == "not-found"
    assert seen["serving"] == {"unit": "glm-engine.service", "active": False, "containers": []}
