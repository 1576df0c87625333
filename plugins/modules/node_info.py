#!/usr/bin/python
"""Everything that the roles want to know about a node, in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_info
short_description: Reads the state of a node in one round trip
description:
  - Hardware, limits, clock, disks, ports, reachable addresses, packages, Docker, releases, weights and units.
  - Read-only. Never fails because something is absent; what is absent is null or empty in the answer.
options:
  paths:
    description: >-
      Paths whose file system's space, inodes and locks to report, beside that of Docker's images. A path need not
      exist yet. Where its file system does not answer, C(storage) has it, and nothing else is read there.
    type: list
    elements: str
    default: []
  ports:
    description: TCP ports to look up among those that listen.
    type: list
    elements: int
    default: []
  urls:
    description: Addresses to probe, by name. Any answer below 500 counts as reachable.
    type: dict
    default: {}
  url_timeout:
    description: Seconds for each probe. All run at the same time.
    type: int
    default: 10
  followed_urls:
    description: Which of them lead to a file elsewhere, such as on a CDN. Its first byte is asked for.
    type: list
    elements: str
    default: []
  unneeded_urls:
    description: Which of them are not tried where one of these packages, which are among O(packages), is installed.
    type: dict
    default: {}
  docker_urls:
    description: Which of them Docker asks, by its own proxy where it has one.
    type: list
    elements: str
    default: []
  proxy:
    description: The proxy by which the addresses are tried; empty for none, whatever the environment says.
    type: str
    default: ""
  no_proxy:
    description: Hosts and domains that are tried without it.
    type: list
    elements: str
    default: []
  ca:
    description: Certificates of a private authority, as PEM, to be trusted beside the system's.
    type: str
    default: ""
  peers:
    description: Hosts whose IPv4 addresses to report, as the node resolves them.
    type: list
    elements: str
    default: []
  packages:
    description: Debian packages whose installed version to report.
    type: list
    elements: str
    default: []
  images:
    description: Images to look up in Docker.
    type: list
    elements: str
    default: []
  models:
    description: Directories of weights.
    type: list
    elements: str
    default: []
  units:
    description: systemd units.
    type: list
    elements: str
    default: []
  files:
    description: Files whose SHA-256 to report.
    type: list
    elements: str
    default: []
  managed:
    description:
      - Patterns of paths, as the shell has them (C(*/) for directories alone), for M(glm.fleet.file_set) to know what
        is in place. Of each path its kind, mode and owner are reported, of a file its SHA-256, of a link its target.
    type: list
    elements: str
    default: []
  release_directory:
    description: Directory with C(releases), C(current) and C(previous).
    type: path
    default: /opt/glm
  state_file:
    description: The deployment's state file.
    type: path
    default: /var/lib/glm/state.json
  cloud_init_timeout:
    description:
      - Seconds to wait first for a cloud-init that is at work. It installs packages and writes apt's sources.
      - Where there is none, or where it has ended, nothing waits. C(cloud_init) in the answer says how it ended.
    type: int
    default: 600
attributes:
  check_mode:
    description: Reads the same as without it.
    support: full
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read the node
  glm.fleet.node_info:
    paths: [/var/lib/glm]
    ports: [8000]
    urls:
      registry: https://registry-1.docker.io/v2/
  register: result
"""

RETURN = r"""
node:
  description: >-
    One entry a subject, named as the options are. C(clock.offset_seconds) is the least distance of the clock from
    the controller's, positive where it is ahead; the action plugin of the same name adds it.
  returned: always
  type: dict
ansible_facts:
  description: The distribution, as M(ansible.builtin.setup) names it.
  returned: always
  type: dict
"""

import contextlib
import ctypes
import glob
import grp
import hashlib
import http.client
import ipaddress
import json
import os
import platform
import pwd
import re
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, TypedDict

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.facts.system.distribution import DistributionFactCollector
from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import apt_sources, key_conflicts
from ansible_collections.glm.fleet.plugins.module_utils.authority import context
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import cdi
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.docker import docker_get, docker_runs, image_root
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.files import read_text
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.mounts import (
    is_shared,
    local_locks,
    mount_of,
    mounts,
)
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.processes import open_files, parse_container_id

LISTEN = "0A"
CLOUD_INIT = "/run/cloud-init"
NAME_SERVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")  # the second behind systemd's own
SNAP_UNIT = "snap.docker.dockerd.service"
CAP_SYS_RESOURCE = 24
STORAGE_SECONDS = 20
# Says of each path what speaks against it. A call to a server that is gone may never return, nor the process end:
# so this is a process of its own, which is left behind then.
STORAGE_PROBE = r"""
import json, os, sys, threading

def look(path):
    place, problem = path, None
    while problem is None:
        try:
            os.stat(place)
            os.statvfs(place)
            problem = ""
        except (FileNotFoundError, NotADirectoryError):
            place = os.path.dirname(place)
        except OSError as error:
            problem = error.strerror
    os.write(1, (json.dumps([path, problem]) + "\n").encode())

for path in sys.argv[1:]:
    threading.Thread(target=look, args=(path,)).start()
"""
UNSYNCHRONIZED_MICROSECONDS = 16_000_000  # the kernel's maximum error where nothing disciplines the clock
UNIT_PROPERTIES = {
    "load": "LoadState",
    "active": "ActiveState",
    "sub": "SubState",
    "enabled": "UnitFileState",
    "result": "Result",
    "status_text": "StatusText",
    "main_pid": "MainPID",
    "n_restarts": "NRestarts",
    "since": "StateChangeTimestamp",
}


class Clock(TypedDict):
    synchronized: bool | None
    begun: float  # seconds since the epoch, as the module began and ended
    ended: float


class CloudInit(TypedDict):
    finished: bool
    waited_seconds: float


class Network(TypedDict):
    controller: str | None  # as the node sees it; None where the way is not SSH
    name_servers: list[str]
    gateways: list[str]
    peers: dict[str, list[str]]


class Disk(TypedDict):
    free_bytes: int
    total_bytes: int
    free_inodes: int
    total_inodes: int
    mount: str
    type: str  # as /proc/self/mountinfo has it
    shared: bool  # whether other machines may have the same
    local_locks: str  # by what its locks do not hold for those; empty where they do
    writable: bool


class Port(TypedDict):
    listening: bool
    address: str | None
    process: str | None
    pid: int | None
    unit: str | None
    container: str | None


class Probe(TypedDict):
    ok: bool
    status: int | None
    error: str | None
    seconds: float


class Image(TypedDict):
    present: bool
    id: str | None
    repo_digests: list[str]


class Model(TypedDict):
    complete: bool
    manifest_sha256: str | None
    revision: str | None
    partial_bytes: int


def read_json(path: str | Path) -> dict[str, Any] | None:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def run(command: list[str], timeout: int = 20) -> str | None:
    """Standard output, or None where the command is absent or does not answer. Its exit code says nothing here."""
    path = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin")
    if path is None:
        return None
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
        return None
    return done.stdout.decode("utf-8", "replace")


# ---- the first boot


def cloud_init_works(root: str) -> bool:
    base = Path(root)
    begun = (base / "status.json").exists() and not (base / "disabled").exists()
    return begun and not (base / "result.json").exists()


def cloud_init(timeout: float, root: str = CLOUD_INIT, interval: float = 2) -> CloudInit:
    """How cloud-init stands, once it has ended or the time is up."""
    started, works = time.monotonic(), cloud_init_works(root)
    if not works:
        return {"finished": True, "waited_seconds": 0}
    while works and time.monotonic() - started < timeout:
        time.sleep(interval)
        works = cloud_init_works(root)
    return {"finished": not works, "waited_seconds": round(time.monotonic() - started, 1)}


# ---- hardware, limits, clock


def parse_memory(meminfo: str) -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def parse_open_files(limits: str) -> int | None:
    """The hard limit in /proc/PID/limits; None where there is none."""
    found = re.search(r"^Max open files\s+\S+\s+(\d+)", limits, re.MULTILINE)
    return int(found.group(1)) if found else None


def may_raise_limits(status: str) -> bool:
    """Whether /proc/PID/status shows the capability to go beyond a hard limit."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(found and int(found.group(1), 16) >> CAP_SYS_RESOURCE & 1)


def open_files_limit() -> int | None:
    """The most that a system service or a container can be given.

    systemd's DefaultLimitNOFILE is what they get unasked, and no bound: it, and Docker, lift it up to this one.
    """
    if may_raise_limits(read_text("/proc/1/status")):
        most = read_text("/proc/sys/fs/nr_open").strip()
        return int(most) if most.isdigit() else None
    return parse_open_files(read_text("/proc/1/limits"))


def shm_bytes() -> int:
    try:
        shm = os.statvfs("/dev/shm")  # noqa: S108 (its size is the subject)
    except OSError:
        return 0
    return shm.f_blocks * shm.f_frsize


def kernel_says_synchronized() -> bool | None:
    """As timedatectl decides it: from the maximum error that adjtimex(2) reports."""
    timex = ctypes.create_string_buffer(512)  # modes = 0: read only
    try:
        if ctypes.CDLL(None).adjtimex(timex) < 0:
            return None
    except (OSError, AttributeError):
        return None
    maximum_error: int = struct.unpack_from("q", timex.raw, 24)[0]
    return maximum_error < UNSYNCHRONIZED_MICROSECONDS


def clock(begun: float) -> Clock:
    synchronized = kernel_says_synchronized()
    in_container = any(os.path.exists(path) for path in ("/run/systemd/container", "/.dockerenv", "/run/.containerenv"))
    if not synchronized and in_container:
        synchronized = None  # its clock is the host's to set
    return {"synchronized": synchronized, "begun": begun, "ended": time.time()}


def dead_storage(places: list[str], seconds: float = STORAGE_SECONDS) -> dict[str, str]:
    """What speaks against those of the places that cannot even be looked at."""
    if not places:
        return {}
    probe = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", STORAGE_PROBE, *places],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        said = probe.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        probe.kill()
    problems = {**dict.fromkeys(places, f"no answer within {seconds:g} s"), **dict(map(json.loads, said.splitlines()))}
    return {place: problem for place, problem in problems.items() if problem}


def comes_to(pattern: str, place: str) -> bool:
    """Whether looking for the paths of a pattern may look into a place."""
    fixed, below = re.split(r"[*?[]", pattern, maxsplit=1)[0], f"{place.rstrip('/')}/"
    return below.startswith(fixed) or f"{fixed}/".startswith(below)


def disk(path: str) -> Disk:
    existing = Path(path)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    stat = os.statvfs(existing)
    mount = existing.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    system = mount_of(str(existing))
    return {
        "free_bytes": stat.f_bavail * stat.f_frsize,
        "total_bytes": stat.f_blocks * stat.f_frsize,
        "free_inodes": stat.f_favail,
        "total_inodes": stat.f_files,
        "mount": str(mount),
        "type": system.kind,
        "shared": is_shared(system.kind),
        "local_locks": local_locks(system),
        "writable": os.access(existing, os.W_OK | os.X_OK),
    }


# ---- network


def parse_listeners(table: str) -> list[tuple[int, str, str]]:
    """(port, address, inode) of each listening socket in /proc/net/tcp or tcp6."""
    listeners = []
    for fields in (line.split() for line in table.splitlines()[1:]):
        if len(fields) > 9 and fields[3] == LISTEN:
            address, port = fields[1].split(":")
            listeners.append((int(port, 16), parse_address(address), fields[9]))
    return listeners


def parse_address(text: str) -> str:
    """The kernel prints addresses as host-order words."""
    words = [struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def parse_unit(cgroup: str) -> str | None:
    units = re.findall(r"/([^/\n]+\.(?:service|scope|socket))", cgroup)
    return units[-1] if units else None


def socket_owners(inodes: set[str]) -> dict[str, int]:
    """The first process found to hold each socket."""
    owners: dict[str, int] = {}
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for process in Path("/proc").glob("[0-9]*") if wanted else []:
        pid = int(process.name)
        with contextlib.suppress(OSError):  # gone meanwhile
            for link in open_files(pid):
                if link in wanted:
                    owners.setdefault(wanted[link], pid)
    return owners


def ports(wanted: list[int], container_names: dict[str, str]) -> dict[str, Port]:
    listeners = [
        entry
        for kind in ("tcp", "tcp6")
        for entry in parse_listeners(read_text(f"/proc/net/{kind}"))
        if entry[0] in wanted
    ]
    owners = socket_owners({inode for _port, _address, inode in listeners})
    of_the_node = read_text("/proc/1/cgroup")
    answer: dict[str, Port] = {}
    for number in wanted:
        port: Port = {
            "listening": False, "address": None, "process": None, "pid": None, "unit": None, "container": None,
        }  # fmt: skip
        for _port, address, inode in (entry for entry in listeners if entry[0] == number):
            port["listening"], port["address"] = True, address
            pid = owners.get(inode)
            if pid is not None:
                cgroup = read_text(f"/proc/{pid}/cgroup")
                port["pid"], port["process"] = pid, read_text(f"/proc/{pid}/comm").strip() or None
                port["unit"] = parse_unit(cgroup)
                port["container"] = container_names.get(parse_container_id(cgroup, of_the_node) or "")
                break
        answer[str(number)] = port
    return answer


class _Follow(urllib.request.HTTPRedirectHandler):
    """Remembers where it was sent."""

    host = ""

    def redirect_request(self, *arguments: Any) -> Any:
        self.host = urllib.parse.urlsplit(arguments[-1]).netloc
        return super().redirect_request(*arguments)


def parse_gateways(routes: str) -> list[str]:
    """The routers of the default routes in /proc/net/route."""
    gateways = []
    for fields in (line.split() for line in routes.splitlines()[1:]):
        if len(fields) > 7 and (fields[1], fields[7]) == ("0" * 8, "0" * 8) and fields[2] != "0" * 8:
            gateways.append(parse_address(fields[2]))
    return gateways


def parse_name_servers(text: str) -> list[str]:
    return re.findall(r"^nameserver\s+(\S+)", text, re.MULTILINE)


def controller_address(proc: str = "/proc", pid: int | None = None) -> str | None:
    """From where SSH came. sudo hides it from its program, so the processes above are looked at, too."""
    pid = os.getpid() if pid is None else pid
    while pid > 1:
        found = re.search(r"(?:^|\0)SSH_(?:CONNECTION|CLIENT)=(\S+)", read_text(f"{proc}/{pid}/environ"))
        if found:
            return found.group(1)
        fields = read_text(f"{proc}/{pid}/stat").rpartition(")")[2].split()
        pid = int(fields[1]) if len(fields) > 1 else 0
    return None


def resolve(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(address[0]) for *_, address in found})


def network(peers: list[str]) -> Network:
    servers = [server for path in NAME_SERVERS for server in parse_name_servers(read_text(path))]
    return {
        "controller": controller_address(),
        "name_servers": list(dict.fromkeys(servers)),
        "gateways": list(dict.fromkeys(parse_gateways(read_text("/proc/net/route")))),
        "peers": {host: resolve(host) for host in peers},
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: the address is reachable."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Way:
    """How an address is reached: by a proxy or not, and whom to trust."""

    def __init__(self, proxy: str = "", no_proxy: str = "", ca: str = "") -> None:
        self.proxies = {"http": proxy, "https": proxy} if proxy else {}
        self.no_proxy = no_proxy
        self.context = context(ca)

    def opener(self, url: str, redirects: urllib.request.HTTPRedirectHandler) -> urllib.request.OpenerDirector:
        direct = without_proxy(urllib.parse.urlsplit(url).hostname or "", self.no_proxy)
        return urllib.request.build_opener(
            redirects,
            urllib.request.ProxyHandler({} if direct else self.proxies),
            urllib.request.HTTPSHandler(context=self.context),
        )


def without_proxy(host: str, no_proxy: str) -> bool:
    """Whether NO_PROXY names a host, as Docker reads it: names with what is below them, addresses, networks."""
    for entry in (part.strip().lower() for part in no_proxy.split(",") if part.strip()):
        if entry == "*" or host == entry.lstrip(".") or host.endswith(f".{entry.lstrip('.')}"):
            return True
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
    return False


def probe(url: str, timeout: int, way: Way, follow: bool = False) -> Probe:
    started = time.monotonic()
    status, error = None, None
    redirects = _Follow() if follow else _NoRedirect()
    try:
        request = urllib.request.Request(url, headers={"Range": "bytes=0-0"} if follow else {})  # noqa: S310
        with way.opener(url, redirects).open(request, timeout=timeout) as answer:
            status = answer.status
    except urllib.error.HTTPError as answer_with_error:
        status = answer_with_error.code
        answer_with_error.close()
    except (OSError, ValueError, http.client.HTTPException) as problem:
        error = describe(problem)
    # A file's 503 is one of a moment, which the download waits out: here the way to it counts.
    if status is not None and status >= 500 and not follow:
        error = f"HTTP {status}"
    if error and isinstance(redirects, _Follow) and redirects.host:
        error = f"{error}, at {redirects.host}, where it leads to"
    return {"ok": error is None, "status": status, "error": error, "seconds": round(time.monotonic() - started, 3)}


def describe(problem: Exception) -> str:
    """One short line for a failed connection."""
    reason = getattr(problem, "reason", problem)
    if isinstance(reason, (socket.timeout, TimeoutError)):
        return "no answer in time"
    if isinstance(reason, socket.gaierror):
        return "the name does not resolve"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {reason.verify_message}"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(str(text).split())


# ---- packages, units, Docker


def parse_packages(listing: str) -> dict[str, str]:
    fields = (line.split("\t") for line in listing.splitlines())
    return {entry[0]: entry[2] for entry in fields if len(entry) == 3 and entry[1] == "installed"}


def packages(names: list[str]) -> dict[str, str | None]:
    if not names:
        return {}
    form = "--showformat=${Package}\\t${db:Status-Status}\\t${Version}\\n"
    installed = parse_packages(run(["dpkg-query", "--show", form, *names]) or "")
    return {name: installed.get(name) for name in names}


def automatic_reboot() -> bool:
    """Whether unattended-upgrades may reboot the host by itself."""
    name = "Unattended-Upgrade::Automatic-Reboot"
    said = run(["apt-config", "dump", name]) if shutil.which("unattended-upgrade", path="/usr/bin") else None
    return parse_apt_flag(said or "", name)


def parse_apt_flag(dump: str, name: str) -> bool:
    """A flag in the words of `apt-config dump`, which takes these for a yes."""
    found = re.search(rf'^{re.escape(name)} "([^"]*)";', dump, re.MULTILINE | re.IGNORECASE)
    return bool(found and found.group(1).lower() in ("1", "yes", "true", "with", "on", "enable"))


def apt() -> dict[str, Any]:
    sources = apt_sources()
    return {
        "sources": [{"path": one.path, "repository": one.repository} for one in sources if one.kind == "deb"],
        "key_conflicts": [
            {"source": one.words, "paths": [one.path, other.path]} for one, other in key_conflicts(sources)
        ],
    }


def parse_units(listing: str) -> dict[str, dict[str, Any]]:
    """Blocks of KEY=VALUE, one a unit, from `systemctl show`."""
    answer: dict[str, dict[str, Any]] = {}
    for block in listing.strip().split("\n\n"):
        shown = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        unit: dict[str, Any] = {key: shown.get(name) or None for key, name in UNIT_PROPERTIES.items()}
        for key in ("main_pid", "n_restarts"):
            unit[key] = int(unit[key]) if (unit[key] or "").isdigit() else 0
        since = (unit["since"] or "").lstrip("@")
        unit["since"] = int(since) if since.isdigit() else None
        if "Id" in shown:
            answer[shown["Id"]] = unit
    return answer


def units(names: list[str]) -> dict[str, dict[str, Any]]:
    if not names:
        return {}
    properties = ",".join(["Id", *UNIT_PROPERTIES.values()])
    listing = run(["systemctl", "show", "--timestamp=unix", f"--property={properties}", *names]) or ""
    shown = parse_units(listing)
    absent: dict[str, Any] = {**dict.fromkeys(UNIT_PROPERTIES), "load": "not-found", "main_pid": 0, "n_restarts": 0}
    # An alias is shown under its target's name; systemctl keeps the order of the arguments.
    by_order = list(shown.values()) if len(shown) == len(names) else []
    return {name: shown.get(name) or (by_order[i] if by_order else absent) for i, name in enumerate(names)}


def docker(info: dict[str, Any] | None, container_names: dict[str, str], snap: bool) -> dict[str, Any]:
    places = "/usr/bin:/usr/local/bin:/usr/sbin"
    installed = any(shutil.which(name, path=places) for name in ("dockerd", "docker"))
    version = (info or {}).get("ServerVersion")
    if installed and version is None:
        found = re.search(r"version ([^,\s]+)", run(["docker", "--version"]) or "")
        version = found.group(1) if found else None
    return {
        "installed": installed or info is not None,
        "running": info is not None,
        "snap": snap and not shutil.which("dockerd", path=places),
        "version": version,
        "root_dir": (info or {}).get("DockerRootDir"),
        "image_root": image_root(info) if info else None,
        "live_restore": (info or {}).get("LiveRestoreEnabled"),
        "cgroup_driver": (info or {}).get("CgroupDriver"),
        "containers_running": sorted(container_names.values()),
        "daemon_json": read_json("/etc/docker/daemon.json"),
    }


def containers() -> dict[str, str]:
    """Names of the running containers by id."""
    listing = docker_get("/containers/json") or []
    return {entry["Id"]: entry["Names"][0].lstrip("/") for entry in listing if entry.get("Names")}


def image(reference: str, runs: bool) -> Image:
    found = docker_get(f"/images/{urllib.parse.quote(reference, safe='/:@')}/json") if runs else None
    return {
        "present": found is not None,
        "id": (found or {}).get("Id"),
        "repo_digests": (found or {}).get("RepoDigests") or [],
    }


def container_toolkit(installed: str | None) -> str | None:
    """The package's version, or the program's own where it came another way."""
    found = re.search(r"version:?\s+v?(\d[\w.+~-]*)", run(["nvidia-ctk", "--version"]) or "") if not installed else None
    return installed or (found.group(1) if found else None)


# ---- what the deployment left


def release(base: str) -> dict[str, Any]:
    def target(link: str) -> str | None:
        try:
            return os.path.basename(os.readlink(os.path.join(base, link)).rstrip("/"))
        except OSError:
            return None

    ids = sorted(path.name for path in Path(base, "releases").glob("*") if path.is_dir())
    return {"current": target("current"), "previous": target("previous"), "ids": ids}


def files_below(directory: str) -> dict[str, os.stat_result]:
    """By their path below it."""
    found = {}
    for base, _directories, names in os.walk(directory):
        for name in names:
            path = os.path.join(base, name)
            try:
                found[os.path.relpath(path, directory)] = os.lstat(path)
            except OSError:
                continue  # it has just gone
    return found


def model(directory: str) -> Model:
    """Complete: what the manifest lists and nothing else, each file with its size. Hashes are not looked at.

    partial_bytes: what is there of it, here and in .partial, and needs no more room.
    """
    marker = ".glm-manifest.json"
    manifest = read_json(os.path.join(directory, marker))
    wanted = {item["path"]: item["size"] for item in (manifest or {}).get("files", [])}
    sizes = {path: found.st_size for path, found in files_below(directory).items() if path != marker}
    partial = files_below(f"{directory.rstrip('/')}.partial")
    return {
        "complete": manifest is not None and sizes == wanted,
        "manifest_sha256": (manifest or {}).get("sha256"),
        "revision": (manifest or {}).get("revision"),
        "partial_bytes": sum(size for path, size in wanted.items() if sizes.get(path) == size)
        # As du counts: a file that is still being filled holds less than its size.
        + sum(found.st_blocks * 512 for found in partial.values()),
    }


def sha256(path: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def managed(patterns: list[str]) -> dict[str, Any]:
    """The patterns, and the paths that are there."""
    names = {path.rstrip("/") for pattern in patterns for path in glob.glob(pattern)}
    found = {path: one_path(path) for path in sorted(names)}
    return {"patterns": patterns, "paths": {path: seen for path, seen in found.items() if seen}}


def one_path(path: str) -> dict[str, Any] | None:
    """None for one that is gone meanwhile."""
    try:
        now = os.lstat(path)
        link = os.readlink(path) if stat.S_ISLNK(now.st_mode) else None
    except OSError:
        return None
    kind = "link" if link else "directory" if stat.S_ISDIR(now.st_mode) else "file"
    return {
        "kind": kind,
        "mode": f"{stat.S_IMODE(now.st_mode):04o}",
        "owner": name_of(lambda: pwd.getpwuid(now.st_uid).pw_name),
        "group": name_of(lambda: grp.getgrgid(now.st_gid).gr_name),
        "sha256": sha256(path) if kind == "file" else None,
        "target": link,
    }


def name_of(look_up: Callable[[], str]) -> str | None:
    try:
        return look_up()
    except KeyError:
        return None


def collect(params: dict[str, Any]) -> dict[str, Any]:
    first_boot = cloud_init(params["cloud_init_timeout"])
    begun = time.time()
    toolkit = "nvidia-container-toolkit"
    shared = [mount.point for mount in mounts() if is_shared(mount.kind)]
    shared = [point for point in shared if any(comes_to(pattern, point) for pattern in params["managed"])]
    dead = dead_storage(list(dict.fromkeys([*params["paths"], *params["models"], params["state_file"], *shared])))
    with ThreadPoolExecutor(max_workers=8) as pool:
        packages_job = pool.submit(packages, [*params["packages"], toolkit])
        info_job = pool.submit(lambda: docker_get("/info") if docker_runs() else None)
        own = Way(params["proxy"], ",".join(params["no_proxy"]), params["ca"])

        def probe_of(name: str, url: str) -> Probe:
            info = info_job.result() if name in params["docker_urls"] and not params["proxy"] else None
            docker_proxy = (info or {}).get("HttpsProxy") or (info or {}).get("HttpProxy")
            # Docker may have a proxy of its own that we did not give it.
            way = Way(docker_proxy, info.get("NoProxy") or "", params["ca"]) if info and docker_proxy else own
            return probe(url, params["url_timeout"], way, name in params["followed_urls"])

        def needed(name: str) -> bool:
            unless = params["unneeded_urls"].get(name, [])
            return not any(packages_job.result().get(package) for package in unless)

        probes = {name: pool.submit(probe_of, name, url) for name, url in params["urls"].items() if needed(name)}
        units_job = pool.submit(units, [*params["units"], SNAP_UNIT])
        reboot_job = pool.submit(automatic_reboot)
        network_job = pool.submit(network, params["peers"])
        info = info_job.result()
        container_names = containers() if info else {}
        versions, all_units = packages_job.result(), units_job.result()
        return {
            "cloud_init": first_boot,
            "arch": platform.machine(),
            "kernel": platform.release(),
            "boot_id": read_text("/proc/sys/kernel/random/boot_id").strip(),
            "memory_bytes": parse_memory(read_text("/proc/meminfo")),
            "shm_bytes": shm_bytes(),
            "nofile_limit": open_files_limit(),
            "disks": {
                path: disk(path)
                for path in [*params["paths"], image_root(info) if info else ""]
                if path and path not in dead
            },
            "storage": {path: dead[path] for path in params["paths"] if path in dead},
            "ports": ports(params["ports"], container_names),
            "network": network_job.result(),
            "apt": apt(),
            "packages": {name: versions[name] for name in params["packages"]},
            "docker": docker(info, container_names, all_units[SNAP_UNIT]["load"] == "loaded"),
            "images": {reference: image(reference, info is not None) for reference in params["images"]},
            "cdi": {"devices": cdi.devices(), "spec_files": [str(path) for path in cdi.files()]},
            "release": release(params["release_directory"]),
            "state": None if params["state_file"] in dead else read_json(params["state_file"]),
            "models": {directory: model(directory) for directory in params["models"] if directory not in dead},
            "units": {name: all_units[name] for name in params["units"]},
            "files": {path: sha256(path) for path in params["files"]},
            "managed": managed(
                [path for path in params["managed"] if not any(comes_to(path, place) for place in dead)]
            ),
            "environment_proxy": os.environ.get("https_proxy") or os.environ.get("http_proxy"),
            "automatic_reboot": reboot_job.result(),
            "container_toolkit": container_toolkit(versions[toolkit]),
            "urls": {name: job.result() for name, job in probes.items()},
            "clock": clock(begun),  # last: it also says when the rest was done
        }


def main() -> None:
    strings = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "paths": strings,
            "ports": {"type": "list", "elements": "int", "default": []},
            "urls": {"type": "dict", "default": {}},
            "url_timeout": {"type": "int", "default": 10},
            "followed_urls": strings,
            "unneeded_urls": {"type": "dict", "default": {}},
            "docker_urls": strings,
            "proxy": {"type": "str", "default": ""},
            "no_proxy": strings,
            "ca": {"type": "str", "default": ""},
            "peers": strings,
            "packages": strings,
            "images": strings,
            "models": strings,
            "units": strings,
            "files": strings,
            "managed": strings,
            "release_directory": {"type": "path", "default": "/opt/glm"},
            "state_file": {"type": "path", "default": "/var/lib/glm/state.json"},
            "cloud_init_timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    module.exit_json(
        changed=False, node=collect(module.params), ansible_facts=DistributionFactCollector().collect(module=module)
    )


if __name__ == "__main__":
    main()
