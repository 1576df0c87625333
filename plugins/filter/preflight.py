"""Judges what node_info and gpu_info saw of a node: one rule, one small function, one line a finding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address
from pathlib import PurePosixPath
from typing import Any

# Ansible loads a filter by its file and puts no folder of a project's own on the path.
from ansible_collections.glm.fleet.plugins.plugin_utils.findings import (
    FIRST_BRANCH_OF_CUDA,
    GIB,
    Finding,
    gib,
    listed,
    same_version,
    versions,
)
from ansible_collections.glm.fleet.plugins.plugin_utils.xids import (
    Judged,
    judge_sxids,
    judge_xids,
    recovery_cure,
)

# In the errors of image_digest and hub_manifest; a node that does not get there either says so itself.
NOT_REACHED = "cannot be reached"
DOCKERS_NETWORK = "172.17.0.0/16"  # of docker0, where nothing else is set


@dataclass(frozen=True)
class Context:
    """What was seen (node, gpu, facts), and what is wanted of it."""

    node: Mapping[str, Any]
    gpu: Mapping[str, Any]
    facts: Mapping[str, Any]
    wanted: Mapping[str, Any]

    @property
    def driver(self) -> Mapping[str, Any]:
        """Empty without a driver, so that the rules about it have nothing to say."""
        return self.gpu.get("driver") or {}

    @property
    def gpus(self) -> list[Mapping[str, Any]]:
        return list(self.gpu.get("gpus", []))

    @property
    def image_present(self) -> bool:
        reference = self.wanted["image"].get("pull_ref", "")
        return bool(self.node["images"].get(reference, {}).get("present"))

    @property
    def weights_present(self) -> bool:
        wanted, found = self.wanted["weights"].get("sha256"), self.model.get("manifest_sha256")
        return bool(self.model.get("complete")) and (wanted is None or wanted == found)

    @property
    def needs_packages(self) -> bool:
        """Whether apt is to work here, beside what the driver needs."""
        node = self.node
        return not (node["docker"]["running"] and node["container_toolkit"] and node["packages"].get("haproxy"))

    @property
    def weights_path(self) -> str:
        """Where the weights go, if that is known yet."""
        path: str = self.wanted["model_directory"]
        return path if {path} & {*self.node["disks"], *self.node["storage"]} else self.wanted["data_directory"]

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.node["models"].get(self.wanted["model_directory"], {})
        return found

    @property
    def image_directory(self) -> str:
        return str(self.node["docker"]["image_root"] or self.wanted["docker_directory"])


Rule = Callable[[Context], Iterator[Finding]]
REFUSALS: list[Rule] = []
WARNINGS: list[Rule] = []


def refusal(rule: Rule) -> Rule:
    REFUSALS.append(rule)
    return rule


def warning(rule: Rule) -> Rule:
    WARNINGS.append(rule)
    return rule


# ---- words


def named(gpus: Iterable[Mapping[str, Any]]) -> str:
    return listed((f"GPU {gpu['index']} ({gpu['pci_address']})" for gpu in gpus), 8)


# ---- system


@refusal
def system(c: Context) -> Iterator[Finding]:
    distribution, version = c.facts.get("distribution", "unknown"), str(c.facts.get("distribution_version", ""))
    found = f"{distribution} {version}"
    supported = c.wanted["systems"]
    if not any(found == name or found.startswith(f"{name}.") for name in supported):
        yield Finding(
            "system",
            f"the operating system is not supported (found {found}, wanted {' or '.join(supported)})",
            "install the node with one of these",
        )


@refusal
def architecture(c: Context) -> Iterator[Finding]:
    if c.node["arch"] != "x86_64":
        yield Finding(
            "architecture",
            f"the processor is not supported (found {c.node['arch']}, wanted x86_64)",
            "use an x86_64 node: the engine images and the driver packages are for that",
        )


@refusal
def memory(c: Context) -> Iterator[Finding]:
    minimum = c.wanted["min_memory_gib"]
    if c.node["memory_bytes"] < minimum * GIB:
        yield Finding(
            "memory",
            f"too little memory (found {gib(c.node['memory_bytes'])}, wanted {minimum} GiB)",
            "use a larger node, or lower glm_min_memory_gib if the model is smaller",
        )


@refusal
def shared_memory(c: Context) -> Iterator[Finding]:
    minimum = c.wanted["min_shm_gib"]
    if c.node["shm_bytes"] < minimum * GIB:
        yield Finding(
            "shared_memory",
            f"shared memory at /dev/shm is too small (found {gib(c.node['shm_bytes'])}, wanted {minimum} GiB)",
            f"run `mount -o remount,size={minimum}G /dev/shm` and put it in /etc/fstab, or lower glm_min_shm_gib",
        )


@refusal
def open_files(c: Context) -> Iterator[Finding]:
    limit, minimum = c.node["nofile_limit"], c.wanted["min_open_files"]
    if limit is not None and limit < minimum:
        yield Finding(
            "open_files",
            f"a container cannot get enough open files (found a limit of {limit}, wanted {minimum})",
            "raise the sysctl fs.nr_open, or lower glm_min_open_files and glm_container_ulimits",
        )


@refusal
def clock(c: Context) -> Iterator[Finding]:
    seen, most = c.node["clock"], c.wanted["max_clock_offset_seconds"]
    offset = seen["offset_seconds"]
    fix = "run `timedatectl set-ntp true`, or install chrony"
    if seen["synchronized"] is False:
        yield Finding("clock", "the clock is not synchronized (found NTPSynchronized=no, wanted yes)", fix)
    elif abs(offset) > most:
        yield Finding(
            "clock", f"the clock differs from this machine's (found {offset:.0f} s, wanted at most {most} s)", fix
        )


def needs_by_mount(c: Context) -> dict[str, tuple[int, int, list[str]]]:
    """Bytes wanted and free on each file system, and what for."""
    needs: dict[str, tuple[int, int, list[str]]] = {}

    def add(path: str, size: int, purpose: str) -> None:
        disk = c.node["disks"].get(path)
        if disk and size > 0:
            total, _free, purposes = needs.get(disk["mount"], (0, 0, []))
            needs[disk["mount"]] = (total + size, disk["free_bytes"], [*purposes, f"{gib(size)} {purpose}"])

    data = c.wanted["data_directory"]
    if not c.weights_present:
        there = c.model.get("partial_bytes", 0)
        add(c.weights_path, c.wanted["weights"].get("total_bytes", 0) - there, "for the rest of the weights")
    if not c.image_present:
        unpacked = (c.wanted["image"].get("size_bytes") or 0) * c.wanted["image_unpacked_factor"]
        add(c.image_directory, int(unpacked), "for the image")
        blobs = c.node["models"].get(c.wanted["image_blobs"])
        if blobs:
            size = sum(blob["size"] for blob in c.wanted["image"]["blobs"])
            add(data, size - blobs["partial_bytes"], "for what the nodes give each other of the image")
    add(data, int(c.wanted["disk_reserve_gib"] * GIB), "in reserve")
    return needs


def larger_disk(c: Context, mount: str) -> str:
    """How what fills a file system goes to another: the data, the weights, else the image."""
    if c.node["disks"].get(c.wanted["data_directory"], {}).get("mount") == mount:
        return "set glm_data_dir to a path on a larger disk"
    if c.node["disks"].get(c.weights_path, {}).get("mount") == mount:
        return "set glm_weights_dir to a path on a larger disk"
    images, docker = PurePosixPath(c.image_directory), c.node["docker"]["root_dir"]
    # Docker's own containerd lies in Docker's directory, and moves with it.
    of_docker = docker in map(str, [images, *images.parents]) if docker else images.name != "containerd"
    if of_docker:
        return f"move Docker's {docker or images} to a larger disk (data-root in /etc/docker/daemon.json)"
    return f"move containerd's {images} to a larger disk (root in /etc/containerd/config.toml)"


@refusal
def disk_space(c: Context) -> Iterator[Finding]:
    for mount, (needed, free, purposes) in needs_by_mount(c).items():
        if free < needed:
            yield Finding(
                "disk_space",
                f"the file system at {mount} is too full (found {gib(free)} free, wanted {gib(needed)}: "
                f"{', '.join(purposes)})",
                f"free space there, or {larger_disk(c, mount)}",
            )


@refusal
def inodes(c: Context) -> Iterator[Finding]:
    minimum, seen = c.wanted["min_free_inodes"], set()
    for path, disk in c.node["disks"].items():
        few = disk["total_inodes"] and disk["free_inodes"] < minimum
        if few and disk["mount"] not in seen and path not in c.wanted["weights_sources"]:
            seen.add(disk["mount"])
            yield Finding(
                "inodes",
                f"too few inodes at {disk['mount']} for {path} (found {disk['free_inodes']} free, wanted {minimum})",
                "delete what holds many small files there, or set glm_data_dir to another disk",
            )


@refusal
def shared_state(c: Context) -> Iterator[Finding]:
    disk = c.node["disks"].get(c.wanted["data_directory"], {})
    if disk.get("shared"):
        yield Finding(
            "shared_state",
            f"the state and the caches of nodes would be one (found {disk['type']} at {disk['mount']} for "
            f"{c.wanted['data_directory']}, wanted a file system of the node's own)",
            "set glm_data_dir to a local path, and glm_weights_dir to the shared one for the weights alone",
        )


def other_path(c: Context, path: str) -> str:
    settings = {
        c.wanted["docker_directory"]: "data-root in /etc/docker/daemon.json",
        **dict.fromkeys(c.wanted["weights_sources"], "glm_weights_sources"),
        c.weights_path: "glm_weights_dir",
        c.wanted["data_directory"]: "glm_data_dir",
    }
    return f"set {settings[path]} to another path"


@refusal
def storage(c: Context) -> Iterator[Finding]:
    dead = c.node["storage"]
    for path, problem in dead.items():
        if not any(str(parent) in dead for parent in PurePosixPath(path).parents):
            yield Finding(
                "storage",
                f"the file system of {path} cannot be read (found {problem}, wanted an answer)",
                "mount it anew (`umount --force --lazy` first), so that root may read it, or " + other_path(c, path),
            )


@refusal
def storage_to_write(c: Context) -> Iterator[Finding]:
    seen = set()
    for path in (c.wanted["data_directory"], *(() if c.weights_present else (c.weights_path,))):
        disk = c.node["disks"].get(path)
        if disk and not disk["writable"] and disk["mount"] not in seen:
            seen.add(disk["mount"])
            yield Finding(
                "storage",
                f"root may not write to {path} (found {disk['type']} at {disk['mount']}, wanted one that lets it)",
                "mount it for writing, with no_root_squash on the server where it is NFS, or " + other_path(c, path),
            )


@refusal
def weights_locks(c: Context) -> Iterator[Finding]:
    disk = c.node["disks"].get(c.weights_path, {})
    if disk.get("local_locks") and not c.weights_present:
        yield Finding(
            "weights_locks",
            f"two nodes would fetch the weights at once, since locks at {disk['mount']} hold for one node alone (found "
            f"{disk['local_locks']}, wanted locks that all nodes share)",
            "mount it with them (NFS without nolock and local_lock), or set glm_weights_dir to a local path and "
            "glm_weights_sources to this one",
        )


# ---- the first boot, apt, Docker


@refusal
def first_boot(c: Context) -> Iterator[Finding]:
    seen = c.node["cloud_init"]
    if not seen["finished"]:
        yield Finding(
            "cloud_init",
            f"cloud-init still works on the first boot (found it at work after {seen['waited_seconds']:.0f} s, wanted "
            "it done)",
            "see `cloud-init status --long` there, and run again once it is done",
        )


@warning
def waited_for_first_boot(c: Context) -> Iterator[Finding]:
    seen = c.node["cloud_init"]
    if seen["finished"] and seen["waited_seconds"]:
        yield Finding(
            "cloud_init",
            f"cloud-init still worked on the first boot (found it done after {seen['waited_seconds']:.0f} s, wanted it "
            "done before)",
            "nothing has to be done",
        )


def apt_keys_conflict(c: Context) -> Iterator[Finding]:
    for conflict in c.node["apt"]["key_conflicts"]:
        paths = list(dict.fromkeys(conflict["paths"]))
        yield Finding(
            "apt_keys",
            f"apt refuses all work, since one repository has two keys (found two values of Signed-By for "
            f"{conflict['source']} in {' and '.join(paths)}, wanted one)",
            "remove one of the two, and see that `apt-get update` ends well",
        )


@refusal
def apt_keys(c: Context) -> Iterator[Finding]:
    if c.needs_packages:
        yield from apt_keys_conflict(c)


@warning
def unneeded_apt_keys(c: Context) -> Iterator[Finding]:
    if not c.needs_packages:
        yield from apt_keys_conflict(c)


@refusal
def docker_snap(c: Context) -> Iterator[Finding]:
    if c.node["docker"]["snap"]:
        yield Finding(
            "docker_snap",
            "Docker comes from a snap, in which GPUs by CDI and live-restore do not work (found "
            "snap.docker.dockerd.service, wanted Docker's own packages or the distribution's)",
            "remove it with `snap remove docker` (its containers and images go with it), or turn it off with "
            "`snap disable docker` (they stay on the disk)",
        )


def docker_network(config: Mapping[str, Any]) -> IPv4Network | None:
    """Where Docker puts docker0, by its daemon.json. None where the site has made a bridge for it."""
    if config.get("bridge"):
        return None
    if config.get("bip"):
        return IPv4Network(config["bip"], strict=False)
    for pool in config.get("default-address-pools") or []:
        if ":" not in str(pool["base"]):
            return next(IPv4Network(pool["base"], strict=False).subnets(new_prefix=int(pool["size"])))
    return IPv4Network(DOCKERS_NETWORK)


@refusal
def overlapping_network(c: Context) -> Iterator[Finding]:
    docker, seen = c.node["docker"], c.node["network"]
    if docker["running"]:
        return  # it is there already, and the way is not cut
    fix = "set container_runtime_daemon_config: {bip: 10.255.0.1/24}, or another network that is free at your site"
    try:
        network = docker_network({**(docker["daemon_json"] or {}), **c.wanted["docker_config"]})
    except (ValueError, KeyError, TypeError, StopIteration) as problem:
        yield Finding("docker_network", f"Docker's network cannot be told (found {problem}, wanted an address)", fix)
        return
    ways = [("the controller", seen["controller"])]
    ways += [("a name server", server) for server in seen["name_servers"]]
    ways += [("the default gateway", gateway) for gateway in seen["gateways"]]
    ways += [("a gateway of the fleet", address) for found in seen["peers"].values() for address in found]
    cut = [way for way in ways if network and is_in(way[1], network)]
    if cut:
        names, addresses = (listed(dict.fromkeys(words)) for words in zip(*cut))
        yield Finding(
            "docker_network",
            f"Docker's own network would cut the way to {addresses} (found {names} in {network}, wanted nothing of the "
            "site there)",
            fix,
        )


def is_in(address: str | None, network: IPv4Network) -> bool:
    try:
        return address is not None and ip_address(address) in network
    except ValueError:
        return False


# ---- network


def port_in_use(c: Context, port: int, role: str, setting: str, ours: bool) -> Iterator[Finding]:
    seen = c.node["ports"].get(str(port), {})
    if seen.get("listening") and not ours:
        holder = seen.get("container") or seen.get("process") or "an unknown process"
        where = ", ".join(
            str(part) for part in (f"pid {seen['pid']}" if seen.get("pid") else None, seen["unit"]) if part
        )
        yield Finding(
            f"{role}_port",
            f"port {port} is taken (found {holder}{f' ({where})' if where else ''}, wanted it free)",
            f"stop that process, or set {setting} to a free port",
        )


@refusal
def edge_port(c: Context) -> Iterator[Finding]:
    seen = c.node["ports"].get(str(c.wanted["edge_port"]), {})
    ours = seen.get("unit") == "haproxy.service"
    yield from port_in_use(c, c.wanted["edge_port"], "edge", "glm_port", ours)


@refusal
def metrics_port(c: Context) -> Iterator[Finding]:
    ours = c.node["ports"].get(str(c.wanted["metrics_port"]), {}).get("unit") == "haproxy.service"
    yield from port_in_use(c, c.wanted["metrics_port"], "metrics", "glm_metrics_port", ours)


@refusal
def engine_port(c: Context) -> Iterator[Finding]:
    seen = c.node["ports"].get(str(c.wanted["engine_port"]), {})
    ours = seen.get("container") in c.wanted["own_containers"]
    yield from port_in_use(c, c.wanted["engine_port"], "engine", "glm_engine_port", ours)


@refusal
def agent_port(c: Context) -> Iterator[Finding]:
    port = c.wanted["engine_port"] + 1
    ours = c.node["ports"].get(str(port), {}).get("unit") == "glm-engine.service"
    yield from port_in_use(c, port, "agent", "glm_engine_port, which is one less,", ours)


def reaches(c: Context, name: str) -> bool:
    return bool(c.node["urls"].get(name, {"ok": True})["ok"])


def unreachable(c: Context, name: str, setting: str) -> Iterator[Finding]:
    if not reaches(c, name):
        probe = c.node["urls"][name]
        yield Finding(
            name,
            f"the node does not reach {c.wanted['urls'][name]} (found {probe['error']}, wanted an answer)",
            f"open the way from the node, or set {setting} to a mirror that it reaches",
        )


# What needs each address, and the setting that names another one.
ADDRESSES: dict[str, tuple[Callable[[Context], bool], str]] = {
    "registry": (lambda c: not c.image_present, "glm_registry_mirror"),
    "registry_token": (lambda c: not c.image_present, "glm_registry_mirror"),
    "registry_files": (lambda c: not c.image_present, "glm_registry_mirror"),
    "hub": (lambda c: not c.weights_present, "glm_hf_endpoint"),
    "hub_files": (lambda c: not c.weights_present, "glm_hf_endpoint"),
    # They may have come in another way than by these packages.
    "docker_packages": (lambda c: not c.node["docker"].get("version"), "glm_docker_apt_url"),
    "toolkit_packages": (lambda c: not c.node["container_toolkit"], "glm_nvidia_container_apt_url"),
    "driver_packages": (lambda c: not c.driver, "glm_nvidia_apt_url"),
    "acme": (lambda _: True, "glm_acme_directory"),
}


@refusal
def addresses(c: Context) -> Iterator[Finding]:
    for name, (needed, setting) in ADDRESSES.items():
        if needed(c):
            yield from unreachable(c, name, setting)


@warning
def unneeded_addresses(c: Context) -> Iterator[Finding]:
    for name in ("registry", "hub"):
        needed, setting = ADDRESSES[name]
        if not needed(c):
            yield from unreachable(c, name, setting)


@warning
def environment_proxy(c: Context) -> Iterator[Finding]:
    found = c.node.get("environment_proxy")
    if found and not c.wanted["http_proxy"]:
        yield Finding(
            "environment_proxy",
            f"the node's environment has a proxy, which neither Docker nor a unit sees (found {found.split('@')[-1]}, "
            "wanted none)",
            "set glm_http_proxy to it, or remove it from the node's environment",
        )


def from_module(check: str, error: str) -> Finding:
    """The error of image_digest or hub_manifest, which ends in what to do."""
    text, _colon, fix = error.rpartition(": ")
    return Finding(check, text, fix)


@refusal
def image(c: Context) -> Iterator[Finding]:
    error = c.wanted["image_error"]
    if error and not (NOT_REACHED in error and not c.image_present and not reaches(c, "registry")):
        yield from_module("image", error)


@refusal
def weights(c: Context) -> Iterator[Finding]:
    error = c.wanted["weights_error"]
    if error and not (NOT_REACHED in error and not c.weights_present and not reaches(c, "hub")):
        yield from_module("weights", error)


# ---- driver


@refusal
def driver(c: Context) -> Iterator[Finding]:
    if not c.gpu.get("driver"):
        yield Finding(
            "driver",
            f"there is no NVIDIA driver (found none, wanted {c.wanted['min_driver_version']} or later)",
            f"install the open kernel modules of branch {c.wanted['driver_branch']} and reboot",
        )
    elif c.driver["error"] and not c.driver["mismatch"]:
        yield Finding(
            "driver",
            f"the driver {c.driver['version'] or 'of unknown version'} does not work "
            f'(found "{c.driver["error"]}", wanted an answer from nvidia-smi)',
            "run `modprobe nvidia`, see `journalctl -k -g NVRM`, or reboot the node",
        )


@refusal
def driver_library(c: Context) -> Iterator[Finding]:
    if c.driver and c.driver["mismatch"]:
        loaded, library = c.driver["module_version"], c.driver["library_version"]
        yield Finding(
            "driver_library",
            f"the driver was changed under the running kernel (found library {library}, "
            f"wanted {loaded} as the loaded module)",
            f"reboot the node to load {library}, or install the packages of {loaded} again, and hold them",
        )


@refusal
def driver_version(c: Context) -> Iterator[Finding]:
    found, minimum = c.driver.get("version"), c.wanted["min_driver_version"]
    if found and versions(found) < versions(minimum):
        yield Finding(
            "driver_version",
            f"the driver is too old for the GPU (found {found}, wanted {minimum} or later)",
            f"install a driver of branch {max(c.wanted['driver_branch'], versions(minimum)[0])} and reboot",
        )


@refusal
def driver_branch(c: Context) -> Iterator[Finding]:
    found, wanted = c.driver.get("branch"), c.wanted["driver_branch"]
    if found and found != wanted:
        yield Finding(
            "driver_branch",
            f"the loaded driver is of another branch (found {found}, wanted {wanted})",
            f"set glm_driver_branch: {found} to keep it, or glm_driver_mode: upgrade to replace it",
        )


@warning
def end_of_life(c: Context) -> Iterator[Finding]:
    branch = c.driver.get("branch")
    if branch in c.wanted["end_of_life_branches"]:
        yield Finding(
            "driver_branch",
            f"NVIDIA no longer maintains the driver's branch (found {branch}, wanted a maintained one)",
            "plan the move to branch 580: new releases of the engines come for CUDA 13 alone, which 570 does not run",
        )


@refusal
def open_module(c: Context) -> Iterator[Finding]:
    if c.wanted["open_kernel_module"] and c.driver.get("open_module") is False:
        yield Finding(
            "open_module",
            "the driver's kernel module is the closed one (found proprietary, wanted open)",
            f"install nvidia-open-{c.driver['branch']} in place of it and reboot",
        )


@refusal
def fabric_manager(c: Context) -> Iterator[Finding]:
    manager, loaded = c.gpu.get("fabric_manager_version"), c.driver.get("module_version")
    if manager and loaded and not same_version(manager, loaded):
        yield Finding(
            "fabric_manager",
            f"the fabric manager does not fit the driver (found {manager}, wanted {loaded})",
            f"install nvidia-fabricmanager of {loaded} and restart nvidia-fabricmanager.service",
        )


@refusal
def image_cuda(c: Context) -> Iterator[Finding]:
    cuda = c.wanted["image"].get("cuda")
    if not cuda or not c.driver.get("version") or c.wanted["allow_cuda_compat"]:
        return
    major, supported = versions(cuda)[0], c.driver["cuda_version"]
    branch = FIRST_BRANCH_OF_CUDA.get(major, 0)
    fits = versions(supported)[0] >= major if supported else (c.driver["branch"] or 0) >= branch
    if not fits:
        yield Finding(
            "image_cuda",
            f"the image's CUDA is too new for the driver (found CUDA {cuda} in the image, wanted at most "
            f"{supported or 'what branch ' + str(c.driver['branch']) + ' supports'} for driver {c.driver['version']})",
            f"set glm_image to a build for CUDA {major - 1}, install driver {branch or 'of a newer branch'}, or set "
            "glm_allow_cuda_compat: true to run slower on the image's compatibility libraries",
        )


# ---- GPUs


def gpus_with(c: Context, key: str, check: str, text: str, fix: str) -> Iterator[Finding]:
    """A finding about all GPUs for which `key` holds; `text` has a place for their names."""
    bad = [gpu for gpu in c.gpus if gpu[key]]
    if bad:
        yield Finding(check, text.format(named(bad)), fix)


@refusal
def gpu_count(c: Context) -> Iterator[Finding]:
    wanted = c.wanted["gpu_count"]
    if c.gpus and len(c.gpus) != wanted:
        yield Finding(
            "gpu_count",
            f"the number of GPUs is wrong (found {len(c.gpus)}, wanted {wanted})",
            "reset or reboot the node and see `lspci -d 10de:` for the missing one, or set glm_gpu_count",
        )


@refusal
def gpu_lost(c: Context) -> Iterator[Finding]:
    lost = sorted(set(c.gpu.get("pci", [])) - {gpu["pci_address"] for gpu in c.gpus})
    if c.gpus and lost:
        yield Finding(
            "gpu_lost",
            f"the driver lost a GPU that is on the bus (found {listed(lost)}, wanted it in nvidia-smi)",
            "reboot the node; if it stays away, have the GPU replaced",
        )


@refusal
def gpu_model(c: Context) -> Iterator[Finding]:
    model = c.wanted["gpu_model"]
    wrong = sorted({gpu["name"] for gpu in c.gpus if not re.search(rf"\b{re.escape(model)}\b", gpu["name"])})
    if wrong:
        yield Finding(
            "gpu_model",
            f"the GPUs are of another model (found {listed(wrong)}, wanted {model})",
            "set glm_gpu_model, and a profile that fits it, or take this node out of the inventory",
        )


@refusal
def fabric(c: Context) -> Iterator[Finding]:
    bad = [gpu for gpu in c.gpus if (gpu["fabric_state"], gpu["fabric_status"]) != ("Completed", "Success")]
    if c.wanted["fabric_required"] and bad:
        pairs = ([gpu["fabric_state"], gpu["fabric_status"]] for gpu in bad)
        states = sorted({"/".join(part or "N/A" for part in pair) if any(pair) else "no fabric" for pair in pairs})
        yield Finding(
            "fabric",
            f"the NVLink fabric is not ready (found {listed(states)} on {named(bad)}, wanted Completed/Success)",
            "see `systemctl status nvidia-fabricmanager` and that nvlsm is installed, then restart it",
        )


@refusal
def nvlink(c: Context) -> Iterator[Finding]:
    wanted = c.wanted["nvlink"]
    bad = [link for link in c.gpu.get("links", []) if link["link"] != wanted]
    if wanted and bad:
        pairs = (f"{link['link']} between GPU {link['gpus'][0]} and GPU {link['gpus'][1]}" for link in bad)
        yield Finding(
            "nvlink",
            f"GPUs are not joined by NVLink as they should be (found {listed(pairs)}, wanted {wanted})",
            "see `nvidia-smi nvlink --status`, restart nvidia-fabricmanager, or set preflight_nvlink",
        )


@refusal
def ecc(c: Context) -> Iterator[Finding]:
    bad = [gpu for gpu in c.gpus if gpu["ecc_uncorrected_volatile"]]
    if bad:
        yield Finding(
            "ecc",
            f"uncorrected memory errors since the driver was loaded (found "
            f"{sum(gpu['ecc_uncorrected_volatile'] for gpu in bad)} on {named(bad)}, wanted 0)",
            "reset the GPU with `nvidia-smi --gpu-reset` or reboot; have it replaced if they come back",
        )


@refusal
def memory_repair(c: Context) -> Iterator[Finding]:
    reset = "stop what uses the GPU and reset it with `nvidia-smi --gpu-reset`, or reboot the node"
    replace = "have the GPU replaced"
    for key, text, fix in (
        ("remap_pending", "a row remap is pending (found on {}, wanted none)", reset),
        ("remap_failure", "a row remap failed (found on {}, wanted none)", replace),
        ("repair_pending", "a memory repair is pending (found on {}, wanted none)", reset),
        ("unrepairable_memory", "memory is beyond repair (found on {}, wanted none)", replace),
    ):
        yield from gpus_with(c, key, "row_remap", text, fix)


@refusal
def recovery_action(c: Context) -> Iterator[Finding]:
    bad = [gpu for gpu in c.gpus if gpu["recovery_action"] not in (None, "None")]
    if bad:
        actions = sorted({gpu["recovery_action"] for gpu in bad})
        yield Finding(
            "gpu_recovery",
            f"the driver asks for a recovery (found {listed(actions)} on {named(bad)}, wanted None)",
            "; ".join(dict.fromkeys(recovery_cure(action) for action in actions)),
        )


@refusal
def mig(c: Context) -> Iterator[Finding]:
    yield from gpus_with(
        c, "mig", "mig", "MIG is on (found on {}, wanted off)", "run `nvidia-smi -mig 0` and reset the GPUs"
    )


@refusal
def gpu_process(c: Context) -> Iterator[Finding]:
    foreign = [process for process in c.gpu.get("processes", []) if not process["own"]]
    if foreign:
        seen = (
            f"{process['name']} (pid {process['pid']}"
            + (f", container {process['container'] or process['container_id'][:12]}" if process["container_id"] else "")
            + f") on GPU {process['gpu']}"
            for process in foreign
        )
        yield Finding(
            "gpu_process",
            f"another process computes on the GPUs (found {listed(seen)}, wanted none but the engine's)",
            "stop it, or wait until it has ended",
        )


def xids(c: Context) -> Iterator[Judged]:
    return judge_xids(c.gpu.get("kernel_log", {}).get("xids", []), c.wanted["fatal_xids"])


def sxids(c: Context) -> Iterator[Judged]:
    return judge_sxids(c.gpu.get("kernel_log", {}).get("sxids", []))


def logged(errors: Iterable[Judged], check: str, text: str, hint: str) -> Iterator[Finding]:
    """One finding about errors of the kernel log: each kind once, with its places, and each cure once."""
    places: dict[str, dict[str, None]] = {}  # dictionaries as sets that keep their order
    cures: dict[str, dict[str, None]] = {}
    for error in errors:
        places.setdefault(f"{error.label} ({error.meaning})", {})[error.place] = None
        cures.setdefault(error.cure, {})[error.label] = None
    if places:
        found = listed((f"{error} on {listed(where)}" for error, where in places.items()), 8)
        fixes = [f"{listed(labels, 8)}: {cure}" for cure, labels in cures.items()] if len(cures) > 1 else [*cures]
        yield Finding(
            check, f"{text} in the kernel log since boot (found {found}, wanted none)", "; ".join([*fixes, hint])
        )


@refusal
def fatal_xid(c: Context) -> Iterator[Finding]:
    fatal = (xid for xid in xids(c) if xid.refuses)
    hint = "only a reboot clears the log, and preflight_fatal_xids chooses other codes"
    yield from logged(fatal, "xid", "fatal GPU errors", hint)


@warning
def other_xid(c: Context) -> Iterator[Finding]:
    other = (xid for xid in xids(c) if not xid.refuses)
    yield from logged(other, "xid", "GPU errors", "see `journalctl -k -g Xid`")


@refusal
def fatal_sxid(c: Context) -> Iterator[Finding]:
    fatal = (sxid for sxid in sxids(c) if sxid.refuses)
    yield from logged(fatal, "sxid", "fatal NVSwitch errors", "only a reboot clears the log")


@warning
def other_sxid(c: Context) -> Iterator[Finding]:
    other = (sxid for sxid in sxids(c) if not sxid.refuses)
    yield from logged(other, "sxid", "NVSwitch errors", "see `journalctl -k -g SXid`")


@refusal
def bus_drop(c: Context) -> Iterator[Finding]:
    drops = [line for line in c.gpu.get("kernel_log", {}).get("bus_drops", []) if "Xid" not in line]
    if drops:
        where = dict.fromkeys(
            found.group() for line in drops for found in [re.search(r"[0-9a-f]{4}:\S+?(?=:?\s)", line)] if found
        )
        yield Finding(
            "bus_drop",
            f"a GPU has fallen off the bus since boot (found {listed(where) or drops[0]}, wanted none)",
            "power-cycle the node, and have the GPU or its riser replaced if it comes back",
        )


@warning
def persistence(c: Context) -> Iterator[Finding]:
    bad = [gpu for gpu in c.gpus if gpu["persistence"] is False]
    if bad:
        yield Finding(
            "persistence",
            f"persistence mode is off (found on {named(bad)}, wanted on)",
            "run `systemctl enable --now nvidia-persistenced`",
        )


@warning
def ecc_off(c: Context) -> Iterator[Finding]:
    bad = [gpu for gpu in c.gpus if gpu["ecc"] is False]
    if bad:
        yield Finding("ecc", f"ECC is off (found on {named(bad)}, wanted on)", "run `nvidia-smi -e 1` and reboot")


@warning
def ecc_history(c: Context) -> Iterator[Finding]:
    bad = [gpu for gpu in c.gpus if gpu["ecc_uncorrected_aggregate"] and not gpu["ecc_uncorrected_volatile"]]
    if bad:
        yield Finding(
            "ecc",
            f"uncorrected memory errors in the GPU's life (found on {named(bad)}, wanted 0)",
            "watch these GPUs; the driver has mapped the rows out",
        )


@warning
def kernel_log(c: Context) -> Iterator[Finding]:
    if c.driver and not c.gpu.get("kernel_log", {}).get("readable"):
        yield Finding(
            "kernel_log",
            "the kernel log is not readable (found nothing from journalctl -k or dmesg, wanted the lines since boot)",
            "Xid errors of the past stay unseen; let journald keep kernel messages",
        )


def preflight_findings(
    node: Mapping[str, Any], gpu: Mapping[str, Any], facts: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, list[dict[str, str]]]:
    """All findings of a node: those that refuse it, and those that only warn."""
    context = Context(node, gpu, facts, wanted)
    return {
        "findings": [finding.as_dict() for rule in REFUSALS for finding in rule(context)],
        "warnings": [finding.as_dict() for rule in WARNINGS for finding in rule(context)],
    }


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"preflight_findings": preflight_findings}
