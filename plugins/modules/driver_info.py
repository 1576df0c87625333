#!/usr/bin/python
"""The packages, sources, modules and logs around a node's NVIDIA driver, in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_info
short_description: Reads what is installed, loaded and to be had of the NVIDIA driver
description:
  - Collects what decides how a node comes to a driver, from dpkg, apt, C(/proc), C(/sys), systemd and Docker.
  - Read-only, and fetches nothing, so apt knows what its last update brought. Never fails because something is absent.
options:
  packages:
    description: Packages whose versions to ask apt for. Those that are installed are reported, too.
    type: list
    elements: str
    default: []
  patterns:
    description: Shell patterns of the names of installed packages to report.
    type: list
    elements: str
    default: ["*nvidia*", "libcuda*", "libnv*", "nvlsm", "nvlink5*", "cuda-*", "datacenter-gpu-manager*"]
  own_sources:
    description: Files of apt sources, and their keys, that are the deployment's own. Reported by themselves.
    type: list
    elements: path
    default: []
  units:
    description: systemd units whose state to report.
    type: list
    elements: str
    default: []
  modules:
    description: Kernel modules to look for among those that are loaded.
    type: list
    elements: str
    default: [nvidia, nouveau, ib_umad, mlx5_core, mlx5_ib]
  engine_unit:
    description: The unit that serves.
    type: str
    default: glm-engine.service
  cuda_directory:
    description: Directory of the CUDA toolkit.
    type: path
    default: /usr/local/cuda
  profile_path:
    description: The profile file that puts C(nvcc) on the PATH.
    type: path
    default: /etc/profile.d/glm-cuda.sh
  unattended_path:
    description: The file that keeps unattended upgrades away from the driver.
    type: path
    default: /etc/apt/apt.conf.d/52glm-nvidia-driver
  timeout:
    description: Seconds to wait for each command.
    type: int
    default: 60
attributes:
  check_mode:
    description: Reads the same as without it.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read what is there of a driver
  glm.fleet.driver_info:
    packages: [nvidia-open-570, nvidia-fabricmanager-570]
    units: [nvidia-persistenced.service]
  register: result
"""

RETURN = r"""
driver:
  description:
    - C(kernel) the running release; C(kernel_packages) versions of the installed C(linux-image-*) by name.
    - C(headers) whether modules can be built for it; C(headers_package), and C(headers_candidate) or null. The same
      of C(linux-modules-extra) as C(modules_extra), C(modules_extra_package), C(modules_extra_candidate).
    - C(modules) those of the option that are loaded.
    - C(loaded) C(version), C(branch) and C(open) of the loaded driver, or null.
    - C(installed) versions by name; C(half) packages that dpkg has not finished; C(held) packages on hold.
    - C(candidates) for each of the option C(packages) and of C(installed), the versions that apt can fetch, newest
      first.
    - C(sources) other sources of drivers, C(path), C(uri), the C(repository) that its packages lie in, without scheme,
      and whether the file holds such C(alone).
    - C(own_sources) text of each of that option's files, null where there is none.
    - C(preferences) files of apt preferences that name NVIDIA.
    - C(secure_boot) true or false, null without UEFI.
    - C(lock) C(pid) and C(process) that hold dpkg's lock, or null.
    - C(dkms_log) C(version), C(path) and the last error C(lines) of the newest log of a build, or null.
    - C(services) C(load), C(active) and C(enabled) of each unit.
    - C(fabric_manager_version), C(toolkit) the CUDA toolkit's version, C(nvcc_profile) the profile file's text, each
      null where there is none.
    - C(serving) C(unit), whether it is C(active), and names of the running C(containers) that use GPUs.
    - C(unattended) whether unattended upgrades leave the driver alone.
    - C(disk_free) bytes, of C(/), C(/boot), C(/usr) and C(/var).
  returned: always
  type: dict
"""

import fnmatch
import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import Source, apt_sources
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.docker import docker_get, docker_runs
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_text
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.processes import open_files

LOCK = "/var/lib/dpkg/lock-frontend"
DISKS = ("/", "/boot", "/usr", "/var")
MOST_OF_A_COMMAND_LINE = 80  # characters
LINES_OF_A_LOG = 5
# dpkg's states with files on the disk; the second letter of an abbreviation.
UNFINISHED = {"U": "unpacked", "F": "half-configured", "H": "half-installed", "W": "triggers", "t": "triggers"}
SOURCES_OF_DRIVERS = re.compile(r"nvidia|graphics-drivers|\bcuda\b", re.IGNORECASE)
OTHER_SOURCES_OF_NVIDIA = re.compile(r"libnvidia-container|nvidia-container-toolkit", re.IGNORECASE)
ERROR = re.compile(r"\berror\b|\bfatal\b|\*\*\*", re.IGNORECASE)


def run(command: list[str], timeout: int) -> str:
    """Standard output; empty where the command is absent or does not answer. Its exit code says nothing here."""
    path = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin")
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, *command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return done.stdout.decode("utf-8", "replace")


# ---- kernel


def parse_loaded(text: str) -> dict[str, Any] | None:
    """The loaded driver, from /proc/driver/nvidia/version."""
    line = next((line for line in text.splitlines() if line.startswith("NVRM version:")), "")
    version = re.search(r"\s(\d+)(\.\d+(?:\.\d+)?)\s", line)
    if not version:
        return None
    branch, rest = version.groups()
    return {"version": branch + rest, "branch": int(branch), "open": "Open Kernel Module" in line}


def loaded_modules(wanted: list[str], root: str = "/sys/module") -> list[str]:
    """Those of `wanted` that the kernel has, be it as a module or built in."""
    return [name for name in wanted if os.path.isdir(os.path.join(root, name))]


def secure_boot(root: str = "/sys/firmware/efi/efivars") -> bool | None:
    """The variable's fifth byte; the first four are its attributes."""
    for path in sorted(Path(root).glob("SecureBoot-*")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if len(data) > 4:
            return data[4] == 1
    return None


# ---- dpkg and apt


@dataclass
class Packages:
    """What dpkg knows: versions by name of what lies on the disk, and what is special about some."""

    installed: dict[str, str] = field(default_factory=dict)
    half: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def matching(self, patterns: list[str]) -> dict[str, str]:
        return {
            name: version
            for name, version in self.installed.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }


def parse_packages(listing: str) -> Packages:
    """From `dpkg-query` with lines of abbreviated status, name and version."""
    packages = Packages()
    for line in listing.splitlines():
        state, name, version = [*line.split("\t"), "", ""][:3]
        if len(state) < 2 or not name:
            continue
        unfinished = state[1] in UNFINISHED or state[2:3] == "R"  # R: it has to be installed again
        if unfinished and name not in packages.half:
            packages.half.append(name)
        if state[0] == "h" and name not in packages.held:
            packages.held.append(name)
        if version and (state[1] == "i" or (unfinished and state[1] in "UFWt")):
            packages.installed.setdefault(name, version)  # the same name of another architecture
    return packages


@dataclass
class Policy:
    candidate: str | None = None  # what apt would install, after its preferences
    versions: list[str] = field(default_factory=list)  # what a source has, newest first


def parse_policy(text: str) -> dict[str, Policy]:
    """From `apt-cache policy NAME...`. A version that is only installed, and in no source, cannot be had."""
    answer: dict[str, Policy] = {}
    policy, version = Policy(), ""
    for line in text.splitlines():
        name = re.match(r"(\S+):$", line)
        candidate = re.match(r"  Candidate: (\S+)", line)
        entry = re.match(r" (?:    |\*\*\* )(\S+) -?\d+$", line)
        source = re.match(r" +-?\d+ (\S+)", line)
        if name:
            policy = answer.setdefault(name.group(1), Policy())
        elif candidate:
            policy.candidate = None if candidate.group(1) == "(none)" else candidate.group(1)
        elif entry:
            version = entry.group(1)
        elif source and source.group(1) != "/var/lib/dpkg/status" and version not in policy.versions:
            policy.versions.append(version)
    return answer


def driver_sources(own: list[str], root: str = "/etc/apt") -> list[dict[str, Any]]:
    """Other sources of drivers. NVIDIA's container toolkit has a source of its own, which is none."""
    files: dict[str, list[Source]] = {}
    for source in apt_sources(root):
        if source.path not in own:
            files.setdefault(source.path, []).append(source)
    found = []
    for path, entries in files.items():
        drivers = [
            entry
            for entry in entries
            if SOURCES_OF_DRIVERS.search(entry.words) and not OTHER_SOURCES_OF_NVIDIA.search(entry.words)
        ]
        found += [
            {
                "path": path,
                "uri": entry.words,
                "repository": entry.repository if entry.kind == "deb" else "",
                "alone": len(drivers) == len(entries),
            }
            for entry in drivers
        ]
    return found


def driver_preferences(root: str = "/etc/apt") -> list[str]:
    base = Path(root)
    files = [base / "preferences", *sorted((base / "preferences.d").glob("*"))]
    return [str(path) for path in files if SOURCES_OF_DRIVERS.search(read_text(path))]


# ---- who holds dpkg's lock


def parse_locks(text: str, inode: int) -> list[int]:
    """Processes that hold a write lock on an inode; in /proc/locks those that wait are marked with an arrow."""
    pids = []
    for fields in (line.split() for line in text.splitlines()):
        if len(fields) >= 8 and fields[3] == "WRITE" and fields[5].rsplit(":", 1)[-1] == str(inode):
            pids.append(int(fields[4]))
    return [pid for pid in pids if pid > 0]  # one outside of this PID namespace is shown as 0


def has_open(pid: int, path: str, proc: str = "/proc") -> bool:
    """Inodes repeat on other file systems. A process that may not be looked into counts as one that has it open."""
    try:
        return path in open_files(pid, proc)
    except PermissionError:
        return True
    except OSError:
        return False  # gone meanwhile


def lock_holder(path: str = LOCK, proc: str = "/proc") -> dict[str, Any] | None:
    try:
        inode = os.stat(path).st_ino
    except OSError:
        return None
    for pid in parse_locks(read_text(f"{proc}/locks"), inode):
        if has_open(pid, os.path.realpath(path), proc):
            words = read_text(f"{proc}/{pid}/cmdline").replace("\0", " ").strip()
            name = read_text(f"{proc}/{pid}/comm").strip()
            return {"pid": pid, "process": (words or name or "unknown")[:MOST_OF_A_COMMAND_LINE]}
    return None


# ---- DKMS


def error_lines(text: str) -> list[str]:
    """The last lines that name an error."""
    return [line.strip() for line in text.splitlines() if ERROR.search(line)][-LINES_OF_A_LOG:]


def dkms_log(root: str = "/var/lib/dkms") -> dict[str, Any] | None:
    """The newest log of a build. DKMS leaves the log of a failed one in build/, of a finished one in log/."""
    found = []
    for pattern in ("nvidia*/*/build/make.log", "nvidia*/*/log/make.log", "nvidia*/*/*/*/log/make.log"):
        for path in Path(root).glob(pattern):
            try:
                found.append((path.stat().st_mtime, path))
            except OSError:
                continue  # gone meanwhile
    if not found:
        return None
    path = max(found)[1]
    text = read_text(path)
    lines = error_lines(text)
    if not lines and path.parent.name == "build":  # cut off: its end is what there is to say
        lines = [line.strip() for line in text.splitlines() if line.strip()][-LINES_OF_A_LOG:]
    return {"version": path.relative_to(root).parts[1], "path": str(path), "lines": lines} if lines else None


# ---- services, toolkit, containers


def parse_units(listing: str, names: list[str]) -> dict[str, dict[str, str | None]]:
    """State of each unit from `systemctl show`, whose blocks come in the order of the arguments."""
    blocks = [
        dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for block in listing.strip().split("\n\n")
    ]
    if len(blocks) != len(names):
        blocks = [{} for _name in names]
    return {
        name: {
            "load": block.get("LoadState") or "not-found",
            "active": block.get("ActiveState") or "inactive",
            "enabled": block.get("UnitFileState") or None,
        }
        for name, block in zip(names, blocks)
    }


def parse_version(text: str) -> str | None:
    version = re.search(r"(\d+\.\d+(?:\.\d+)?)", text)
    return version.group(1) if version else None


def parse_toolkit(version_json: str, nvcc: str) -> str | None:
    """The toolkit's version from its version.json, or as nvcc says it (12.8)."""
    try:
        return str(json.loads(version_json)["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        release = re.search(r"release (\d+\.\d+)", nvcc)
        return release.group(1) if release else None


def toolkit(directory: str, timeout: int) -> str | None:
    nvcc = os.path.join(directory, "bin", "nvcc")
    said = run([nvcc, "--version"], timeout) if os.path.exists(nvcc) else ""
    return parse_toolkit(read_text(os.path.join(directory, "version.json")), said)


def uses_gpus(container: dict[str, Any]) -> bool:
    """By any of the ways in which Docker gives a container GPUs: CDI, --gpus, a device, NVIDIA's runtime."""
    host = container.get("HostConfig") or {}
    for request in host.get("DeviceRequests") or []:
        names = [*(request.get("DeviceIDs") or []), request.get("Driver") or ""]
        capabilities = [name for group in request.get("Capabilities") or [] for name in group]
        if any("nvidia" in name for name in names) or "gpu" in capabilities:
            return True
    devices = (device.get("PathOnHost") or "" for device in host.get("Devices") or [])
    return host.get("Runtime") == "nvidia" or any(path.startswith("/dev/nvidia") for path in devices)


def gpu_containers() -> list[str]:
    if not docker_runs():
        return []
    containers = (docker_get(f"/containers/{entry['Id']}/json") for entry in docker_get("/containers/json") or [])
    return sorted(container["Name"].lstrip("/") for container in containers if container and uses_gpus(container))


# ---- everything


def disk_free() -> dict[str, int]:
    free = {}
    for path in DISKS:
        try:
            stat = os.statvfs(path)
        except OSError:
            continue
        free[path] = stat.f_bavail * stat.f_frsize
    return free


def blocks_upgrades(text: str) -> bool:
    """Whether a file of apt's configuration keeps unattended upgrades away from NVIDIA's packages."""
    return "Package-Blacklist" in text and "nvidia" in text


def text_or_none(path: str) -> str | None:
    return read_text(path) if os.path.exists(path) else None


def collect(params: dict[str, Any]) -> dict[str, Any]:
    kernel, timeout = platform.release(), params["timeout"]
    headers, extra = f"linux-headers-{kernel}", f"linux-modules-extra-{kernel}"
    units = [*params["units"], params["engine_unit"]]
    names = list(dict.fromkeys(params["packages"]))
    with ThreadPoolExecutor(max_workers=4) as pool:
        dpkg = ["dpkg-query", "--show", "--showformat=${db:Status-Abbrev}\\t${Package}\\t${Version}\\n"]
        packages_job = pool.submit(run, dpkg, timeout)
        show = ["systemctl", "show", "--property=LoadState,ActiveState,UnitFileState", *units]
        units_job = pool.submit(run, show, timeout)
        fabric_job = pool.submit(run, ["nv-fabricmanager", "--version"], timeout)
        containers_job = pool.submit(gpu_containers)
        packages = parse_packages(packages_job.result())
        present = packages.matching(params["patterns"])
        asked = list(dict.fromkeys([*names, *present, headers, extra]))
        policy = parse_policy(run(["apt-cache", "policy", *asked], timeout))
        services = parse_units(units_job.result(), units)
    return {
        "kernel": kernel,
        "kernel_packages": packages.matching(["linux-image-*"]),
        "headers": os.path.exists(f"/lib/modules/{kernel}/build"),
        "headers_package": headers,
        "headers_candidate": policy.get(headers, Policy()).candidate,
        "modules_extra": extra in packages.installed,
        "modules_extra_package": extra,
        "modules_extra_candidate": policy.get(extra, Policy()).candidate,
        "modules": loaded_modules(params["modules"]),
        "loaded": parse_loaded(read_text("/proc/driver/nvidia/version")),
        "installed": {
            **present,
            **{name: packages.installed[name] for name in names if name in packages.installed},
        },
        "half": packages.half,
        "held": packages.held,
        "candidates": {name: policy.get(name, Policy()).versions for name in (*names, *present)},
        "sources": driver_sources(params["own_sources"]),
        "own_sources": {path: text_or_none(path) for path in params["own_sources"]},
        "preferences": driver_preferences(),
        "secure_boot": secure_boot(),
        "lock": lock_holder(),
        "dkms_log": dkms_log(),
        "services": {name: services[name] for name in params["units"]},
        "fabric_manager_version": parse_version(fabric_job.result()),
        "toolkit": toolkit(params["cuda_directory"], timeout),
        "serving": {
            "unit": params["engine_unit"],
            "active": services[params["engine_unit"]]["active"] in ("active", "activating", "reloading"),
            "containers": containers_job.result(),
        },
        "nvcc_profile": text_or_none(params["profile_path"]),
        "unattended": blocks_upgrades(read_text(params["unattended_path"])),
        "disk_free": disk_free(),
    }


def main() -> None:
    patterns = ["*nvidia*", "libcuda*", "libnv*", "nvlsm", "nvlink5*", "cuda-*", "datacenter-gpu-manager*"]
    modules = ["nvidia", "nouveau", "ib_umad", "mlx5_core", "mlx5_ib"]
    strings = {"type": "list", "elements": "str"}
    module = AnsibleModule(
        argument_spec={
            "packages": {**strings, "default": []},
            "patterns": {**strings, "default": patterns},
            "own_sources": {"type": "list", "elements": "path", "default": []},
            "units": {**strings, "default": []},
            "modules": {**strings, "default": modules},
            "engine_unit": {"type": "str", "default": "glm-engine.service"},
            "cuda_directory": {"type": "path", "default": "/usr/local/cuda"},
            "profile_path": {"type": "path", "default": "/etc/profile.d/glm-cuda.sh"},
            "unattended_path": {"type": "path", "default": "/etc/apt/apt.conf.d/52glm-nvidia-driver"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, driver=collect(module.params))


if __name__ == "__main__":
    main()
