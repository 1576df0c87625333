"""Plans how a node comes to the wanted driver: one rule, one small function, one line a finding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Ansible loads a filter by its file and puts no folder of a project's own on the path.
from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import repository
from ansible_collections.glm.fleet.plugins.plugin_utils.findings import Finding, gib, listed, same_version, versions

DISTRIBUTIONS = ("ubuntu2204", "ubuntu2404", "debian12", "debian13")  # as NVIDIA writes them
MIB = 1024**2
SIGNATURE = r"NO_PUBKEY|not signed|required signer|signature|GPG|EXPKEYSIG|BADSIG|fingerprint|[Ss]igning key"
FULL = 64 * MIB  # bytes free below which a failed transaction is put down to the disk
MOST_OF_A_MESSAGE = 400  # characters, from the end
# Names that carry a driver's version: of NVIDIA, of Ubuntu's archive (prebuilt modules) and of Debian's.
DRIVER_PACKAGE = re.compile(
    r"(nvidia|libnvidia|libnvsdm|nvlink5|xserver-xorg-video-nvidia|cuda-drivers|firmware-nvidia"
    r"|linux-(modules|objects|signatures)-nvidia)(-|$)"
    r"|lib(cuda1|cudadebugger1|nvcuvid1|nvoptix1)$|lib(egl|gl|gles|glx|opengl)[a-z0-9]*-nvidia"
)
# ... and those like them that do not go with the driver.
OTHER_PACKAGE = re.compile(
    r"(lib)?nvidia-(container|ctk|docker|cuda|settings|prime|egl|support|installer|vaapi|gds|fs)(-|\d|$)"
)
PREBUILT_MODULES = re.compile(r"linux-(modules|objects|signatures)-nvidia-")
# Ubuntu's archive (570.195.03-0ubuntu0.24.04.1), its PPA (-0ubuntu0~gpu24.04.1) and Lambda's (-0lambda1). NVIDIA
# itself once wrote -0ubuntu1.
OTHER_ORIGIN = re.compile(r"-0ubuntu(?!1$)|0lambda")


def upstream(version: str) -> str:
    """A package's version without epoch and revision: 570.211.01 of 1:570.211.01-1ubuntu1."""
    return version.split(":", 1)[-1].split("-", 1)[0]


def branch_of(name: str, version: str) -> int | None:
    """The driver branch of an installed package, None of one that does not belong to a driver."""
    if not DRIVER_PACKAGE.match(name) or OTHER_PACKAGE.match(name):
        return None
    found = re.match(r"([3-9]\d\d)\.\d", upstream(version)) or re.search(r"-([3-9]\d\d)(?:-|$)", name)
    return int(found.group(1)) if found else None


def of_other_origin(name: str, version: str) -> bool:
    return bool(PREBUILT_MODULES.match(name) or OTHER_ORIGIN.search(version))


@dataclass(frozen=True)
class Context:
    """What was seen (driver_info, gpu_info), the branch's package set, and what is wanted."""

    info: Mapping[str, Any]
    gpu: Mapping[str, Any]
    package_set: Mapping[str, Any]
    wanted: Mapping[str, Any]

    @property
    def adopts(self) -> bool:
        return bool(self.wanted["mode"] == "adopt")

    @property
    def branch(self) -> int:
        return int(self.package_set["branch"])

    @property
    def asked(self) -> str:
        """The version that the user named, or nothing."""
        return str(self.wanted.get("version") or "")

    @property
    def loaded(self) -> Mapping[str, Any]:
        """Empty where no module is loaded."""
        return self.info.get("loaded") or {}

    @property
    def library(self) -> str | None:
        """The version of the libraries where it is not the loaded module's: a reboot loads that one."""
        driver = self.gpu.get("driver") or {}
        return str(driver["library_version"]) if driver.get("mismatch") and driver.get("library_version") else None

    @property
    def nouveau(self) -> bool:
        return "nouveau" in self.info["modules"]

    @cached_property
    def other_sources(self) -> list[Mapping[str, Any]]:
        """Sources of drivers but for those that name the very repository that the driver is to come from."""
        return [source for source in self.info["sources"] if source["repository"] != self.wanted_repository]

    @property
    def wanted_repository(self) -> str:
        return repository(**self.wanted["repository"])

    @cached_property
    def drivers(self) -> dict[str, int]:
        """Branches of the installed packages of drivers, by name."""
        found = {name: branch_of(name, version) for name, version in self.info["installed"].items()}
        return {name: branch for name, branch in found.items() if branch is not None}

    def installed_version(self, name: str) -> str:
        return upstream(self.info["installed"].get(name, ""))

    def is_finished(self, name: str) -> bool:
        """A package that dpkg has not configured has no module, whatever its version."""
        return name in self.info["installed"] and name not in self.info["half"]

    @cached_property
    def target(self) -> str:
        """The version that the node is to run.

        `install` keeps a driver of the wanted branch that is loaded and knows the GPU, and adds what is missing;
        `upgrade` goes to the package set'.
        """
        if self.asked:
            return self.asked
        if self.adopts:
            return str(
                self.loaded["version"] if self.loaded.get("branch") == self.branch else self.package_set["version"]
            )
        if self.wanted["mode"] == "install" and self.loaded.get("branch") == self.branch:
            there = [self.installed_version(name) for name in self.package_set["pinned"]]
            of_branch = [version for version in there if versions(version)[:1] == (self.branch,)]
            kept = of_branch[0] if of_branch else str(self.loaded["version"])
            if versions(kept) >= versions(self.wanted["min_version"]):
                return kept
        return str(self.package_set["version"])

    @property
    def pinning(self) -> str:
        return str(self.package_set["pinning"]).format(version=self.target)

    @cached_property
    def packages(self) -> list[str]:
        """All versioned packages where one of them is missing or of another version, so that apt solves them as one."""
        right = all(
            self.is_finished(name)
            and self.installed_version(name) == self.target
            and not of_other_origin(name, self.info["installed"][name])
            for name in self.package_set["pinned"]
        )
        if self.adopts or right:
            return []
        return [f"{name}={self.target}*" for name in (*self.package_set["pinned"], *self.moving)]

    @cached_property
    def moving(self) -> list[str]:
        """Other packages of the loaded driver whose names have no branch: they go to the wanted version with it.

        apt lowers a package's version only where it is asked to.
        """
        known = self.info["candidates"]
        return [
            name
            for name, branch in self.drivers.items()
            if name not in self.package_set["pinned"]
            and branch == self.loaded.get("branch")
            and not re.search(r"-([3-9]\d\d)(-|$)|-pinning-", name)
            and not of_other_origin(name, self.info["installed"][name])
            and any(upstream(version) == self.target for version in known.get(name, []))
        ]

    @cached_property
    def unpinned(self) -> list[str]:
        """What is missing of the packages that have versions of their own."""
        if self.adopts:
            return []
        names = list(self.package_set["unpinned"])
        names += [self.package_set[part]["package"] for part in ("cuda_toolkit", "dcgm") if self.wanted.get(part)]
        missing = [str(name) for name in names if not self.is_finished(name)]
        if not self.info["headers"]:
            missing.append(self.info["headers_package"])
        # On Ubuntu the InfiniBand modules come in a package beside the kernel's.
        if self.info.get("modules_extra_candidate") and not self.info["modules_extra"]:
            missing.append(self.info["modules_extra_package"])
        return missing

    @property
    def changes(self) -> bool:
        return bool(self.packages or self.unpinned or (not self.adopts and self.pinning not in self.info["installed"]))

    @property
    def action(self) -> str:
        if self.adopts:
            return "adopt" if self.hold else "nothing"
        if not self.changes:
            return "nothing"
        replaces = self.loaded and self.packages and self.loaded["version"] != self.target
        return "upgrade" if replaces else "install"

    @property
    def replaced(self) -> list[str]:
        """Packages that the move itself supersedes: those of the loaded driver's branch, and other pins."""
        if not self.packages:
            return []
        return [
            name
            for name, branch in self.drivers.items()
            if name not in (*self.package_set["pinned"], *self.moving, self.pinning)
            and not of_other_origin(name, self.info["installed"][name])
            and (
                name.startswith("nvidia-driver-pinning-")
                or (branch != self.branch and branch == self.loaded.get("branch"))
            )
        ]

    @property
    def conflicting(self) -> list[str]:
        """Packages of another branch or origin, that would break or mix with the wanted ones."""
        if self.adopts:
            branch = self.loaded.get("branch")
            # Debian ships a newer nvidia-modprobe beside its driver: it only makes device nodes.
            others = {name: other for name, other in self.drivers.items() if name != "nvidia-modprobe"}
            return [name for name, other in others.items() if branch not in (None, other)]
        kept = {*self.package_set["pinned"], *self.moving}
        return [
            name
            for name, branch in self.drivers.items()
            if self.packages
            and name not in self.replaced
            and (of_other_origin(name, self.info["installed"][name]) or (branch != self.branch and name not in kept))
        ]

    @property
    def hold(self) -> list[str]:
        """Packages to hold that are not: what is adopted, or what the package set names."""
        if self.adopts:
            ours = (*self.package_set["pinned"], *self.package_set["unpinned"])
            names = [name for name in self.info["installed"] if name in self.drivers or name in ours]
        else:
            names = [*self.package_set["pinned"], *self.package_set["unpinned"], self.pinning]
        return [name for name in names if name not in self.info["held"]]

    @property
    def to_hold(self) -> list[str]:
        """A transaction takes away the holds of what it changes."""
        return list(dict.fromkeys((*self.hold, *(self.package_set["pinned"] if self.packages else ()))))

    @property
    def modules(self) -> list[str]:
        wanted = self.wanted.get("modules") or ("ib_umad", "mlx5_core", "mlx5_ib")
        return [] if self.adopts else [name for name in wanted if name not in self.info["modules"]]

    @property
    def services(self) -> list[str]:
        """Daemons of the packages that do not run or do not start on boot; a static unit has others that start it."""
        units = ["nvidia-persistenced.service", "nvidia-fabricmanager.service"]
        units += [self.package_set["dcgm"]["unit"]] if self.wanted.get("dcgm") else []
        seen = self.info["services"]
        return [
            unit
            for unit in ([] if self.adopts else units)
            if self.changes
            or seen.get(unit, {}).get("active") != "active"
            or seen.get(unit, {}).get("enabled") == "disabled"
        ]

    @property
    def next_version(self) -> str | None:
        """What a reboot would load once the plan is carried out."""
        return (self.library or self.loaded.get("version")) if self.adopts else self.target

    @property
    def reboot(self) -> bool:
        if self.adopts:
            return bool(self.loaded and self.library)
        other = self.loaded and (
            self.loaded["version"] != self.next_version or (self.packages and self.loaded.get("open") is False)
        )
        return bool(other or self.nouveau)

    @property
    def wanted_words(self) -> str:
        return f"{self.asked} of branch {self.branch}" if self.asked else f"branch {self.branch}"


Rule = Callable[[Context], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


# ---- adopt


@rule
def nothing_to_adopt(c: Context) -> Iterator[Finding]:
    if c.adopts and not c.loaded:
        there = sorted({c.installed_version(name) for name in c.drivers if "pinning" not in name}, key=versions)
        found = f"{listed(there)} installed and not loaded" if there else "nouveau" if c.nouveau else "none"
        yield Finding(
            "driver",
            f"no NVIDIA driver is loaded (found {found}, wanted {c.wanted_words})",
            "set glm_driver_mode: install",
        )


@rule
def other_branch(c: Context) -> Iterator[Finding]:
    if c.adopts and c.loaded and c.loaded["branch"] != c.branch:
        yield Finding(
            "driver_branch",
            f"the loaded driver is of another branch (found {c.loaded['version']}, wanted "
            f"{c.asked or c.package_set['version']} or another of branch {c.branch})",
            f"set glm_driver_branch: {c.loaded['branch']} to keep it, or glm_driver_mode: upgrade to replace it",
        )


@rule
def other_version(c: Context) -> Iterator[Finding]:
    if c.adopts and c.asked and c.loaded.get("branch") == c.branch and c.loaded["version"] != c.asked:
        yield Finding(
            "driver_version",
            f"the loaded driver is of another version (found {c.loaded['version']}, wanted {c.asked})",
            'set glm_driver_version: "" to keep it, or glm_driver_mode: upgrade to replace it',
        )


@rule
def closed_module(c: Context) -> Iterator[Finding]:
    if c.adopts and c.loaded.get("open") is False:
        yield Finding(
            "open_module",
            "the loaded kernel module is the closed one (found proprietary, wanted open)",
            "set glm_driver_mode: upgrade",
        )


@rule
def fabric_manager(c: Context) -> Iterator[Finding]:
    manager = c.info.get("fabric_manager_version")
    if c.adopts and c.loaded and manager and not c.library and not same_version(manager, c.loaded["version"]):
        yield Finding(
            "fabric_manager",
            f"the fabric manager does not fit the driver (found {manager}, wanted {c.loaded['version']})",
            "set glm_driver_mode: install to have the one of the driver's version",
        )


# ---- versions


@rule
def version_of_another_branch(c: Context) -> Iterator[Finding]:
    branch = versions(c.asked)[:1]
    if c.asked and branch != (c.branch,):
        yield Finding(
            "driver_version",
            f"the version is not of the branch (found glm_driver_version: {c.asked}, wanted one of branch {c.branch})",
            f"set glm_driver_branch: {branch[0]}, or glm_driver_version: {c.package_set['version']}"
            if branch
            else f"set glm_driver_version: {c.package_set['version']}",
        )


@rule
def too_old(c: Context) -> Iterator[Finding]:
    found = c.loaded.get("version") if c.adopts else c.target
    minimum = str(c.wanted["min_version"])
    if found and versions(found) < versions(minimum):
        fix = "glm_driver_mode: upgrade" if c.adopts else f"glm_driver_version: {c.package_set['version']}"
        yield Finding(
            "driver_version",
            f"the driver is too old for the GPU (found {found}, wanted {minimum} or later)",
            f"set {fix}",
        )


@rule
def unknown_to_apt(c: Context) -> Iterator[Finding]:
    if not c.wanted.get("candidates_known") or not c.changes:
        return
    known = {name: [upstream(version) for version in found] for name, found in c.info["candidates"].items()}
    needed = [name for name in (*(c.package_set["pinned"] if c.packages else ()), c.pinning) if name in known]
    lacking = [name for name in needed if c.target not in known[name]]
    if not lacking:
        return
    pinned = [known[name] for name in c.package_set["pinned"] if name in known]
    everywhere = [version for version in (pinned[0] if pinned else []) if all(version in other for other in pinned)]
    choices = list(dict.fromkeys(version for version in everywhere if versions(version)[:1] == (c.branch,)))
    yield Finding(
        "driver_version",
        f"apt has no {c.target} of {listed(lacking)} (found {listed(choices, 12) or 'no version of all packages'}, "
        f"wanted {c.target})",
        ("set glm_driver_version to one of those, or " if choices else "set ")
        + "glm_nvidia_apt_url to a repository that has it",
    )


@rule
def unpinned_unknown_to_apt(c: Context) -> Iterator[Finding]:
    known = c.info["candidates"]
    lacking = [name for name in c.unpinned if name in known and not known[name]]
    if c.wanted.get("candidates_known") and lacking:
        optional = {
            c.package_set["cuda_toolkit"]["package"]: "glm_cuda_toolkit",
            c.package_set["dcgm"]["package"]: "glm_dcgm",
        }
        without = "".join(f", or {optional[name]}: false to do without" for name in lacking if name in optional)
        yield Finding(
            "packages",
            f"apt does not know all packages (found no {listed(lacking)}, wanted any version)",
            f"set glm_nvidia_apt_url to a repository that has them{without}",
        )


# ---- what the node has to offer, where packages are to change


@rule
def distribution(c: Context) -> Iterator[Finding]:
    found = c.wanted.get("distribution")
    if not c.adopts and found and found not in DISTRIBUTIONS:
        yield Finding(
            "distribution",
            f"NVIDIA's packages are not known for this distribution (found {found}, wanted {listed(DISTRIBUTIONS)})",
            "install the driver by hand, and set glm_driver_mode: adopt",
        )


@rule
def kernel(c: Context) -> Iterator[Finding]:
    minimum = str(c.package_set["min_kernel"])
    if c.packages and versions(c.info["kernel"])[:2] < versions(minimum)[:2]:
        yield Finding(
            "kernel",
            f"the kernel is too old for branch {c.branch} (found {c.info['kernel']}, wanted {minimum} or later)",
            "install a newer kernel of the distribution and reboot the node",
        )


@rule
def headers(c: Context) -> Iterator[Finding]:
    # Before the sources' lists are read, nothing is known of what they have.
    if c.packages and c.wanted.get("candidates_known") and not c.info["headers"] and not c.info["headers_candidate"]:
        yield Finding(
            "kernel_headers",
            f"the driver cannot be built for the running kernel (found no {c.info['headers_package']}, "
            "wanted it installed or in apt's lists)",
            "boot a kernel whose headers apt has (a newer one may be installed already: reboot), "
            "or add the source that this kernel came from",
        )


@rule
def secure_boot(c: Context) -> Iterator[Finding]:
    # Where a module that DKMS built is loaded, its key is enrolled.
    proven = c.loaded and any("dkms" in name for name in c.drivers)
    if c.packages and c.info.get("secure_boot") and not proven:
        yield Finding(
            "secure_boot",
            "the kernel loads signed modules alone, and DKMS builds unsigned ones (found Secure Boot on, wanted off)",
            "turn Secure Boot off in the firmware, or enroll DKMS's key (`mokutil --import /var/lib/dkms/mok.pub`), "
            "install and load the driver by hand, and run again",
        )


@rule
def nouveau(c: Context) -> Iterator[Finding]:
    if c.nouveau and c.reboot and not c.wanted["allow_reboot"]:
        yield Finding(
            "nouveau",
            "nouveau holds the GPUs, and goes with a reboot only (found nouveau loaded, wanted no other driver)",
            "set glm_allow_reboot: true",
        )


@rule
def other_sources(c: Context) -> Iterator[Finding]:
    allowed = c.wanted["remove_conflicting"]
    left = [source for source in c.other_sources if c.packages and not (allowed and source["alone"])]
    if left:
        found = listed(f"{source['uri']} in {source['path']}" for source in left)
        mixed = sorted({source["path"] for source in left if not source["alone"]})
        yield Finding(
            "apt_sources",
            f"other sources of drivers would mix in their packages (found {found}, wanted none)",
            f"take them out of {listed(mixed)}, which holds other sources, too"
            if mixed
            else "remove them, or set glm_driver_remove_conflicting: true",
        )


@rule
def other_packages(c: Context) -> Iterator[Finding]:
    if not c.conflicting or (c.wanted["remove_conflicting"] and not c.adopts):
        return
    found = listed((f"{name} {c.info['installed'][name]}" for name in c.conflicting), 6)
    branch = c.loaded["branch"] if c.adopts else c.branch
    fix = "remove them, or set glm_driver_remove_conflicting: true"
    yield Finding(
        "packages",
        f"packages of another branch or origin are installed (found {found}, wanted branch {branch} of NVIDIA's alone)",
        fix + (" and glm_driver_mode: install" if c.adopts else ""),
    )


# ---- work that would be cut off


@rule
def reboot(c: Context) -> Iterator[Finding]:
    if not c.reboot or c.nouveau or c.wanted["allow_reboot"]:
        return
    kind = " (the closed module)" if c.loaded.get("open") is False and not c.adopts else ""
    back = f", or install the packages of {c.loaded['version']} again" if c.adopts else ""
    verb = "is installed" if c.adopts or not c.packages else "would be installed"
    yield Finding(
        "reboot",
        f"a reboot is needed and not allowed (found {c.loaded['version']} loaded{kind}, while {c.next_version} {verb})",
        f"set glm_allow_reboot: true{back}",
    )


@rule
def serving(c: Context) -> Iterator[Finding]:
    disturbs = (c.loaded and c.packages) or c.reboot
    if not disturbs or c.wanted.get("drained"):
        return
    unit, containers = c.info["serving"], c.info["serving"]["containers"]
    found = [unit["unit"]] if unit["active"] else []
    found += [f"container {name}" for name in containers if not (unit["active"] and name in unit["unit"])]
    found += [
        f"{process['name']} (pid {process['pid']})"
        for process in c.gpu.get("processes", [])
        if not found or not process.get("container_id")
    ]
    if found:
        yield Finding(
            "serving",
            f"the GPUs are at work (found {listed(found)}, wanted a drained node)",
            "run playbooks/driver.yml, which drains the node first"
            if unit["active"]
            else "stop it, or wait until it has ended",
        )


# ---- the plan


def plan_lines(c: Context) -> list[str]:
    """The plan as a person reads it."""
    kinds = {True: " (open)", False: " (closed)", None: ""}
    loaded = f"{c.loaded['version']}{kinds[c.loaded.get('open')]}" if c.loaded else "nouveau" if c.nouveau else "none"
    there = sorted({c.installed_version(name) for name in c.drivers if "pinning" not in name}, key=versions)
    lines = [
        f"driver: loaded {loaded}, installed {listed(there) or 'none'}, wanted {c.target}; "
        f"mode {c.wanted['mode']}: {c.action}"
    ]
    if c.info["half"]:
        lines.append(f"finish first what dpkg has not: {listed(c.info['half'], 8)}")
    if c.info.get("lock"):
        lines.append(f"wait for dpkg's lock, held by {c.info['lock']['process']} (pid {c.info['lock']['pid']})")
    removed = c.replaced + (c.conflicting if not c.adopts else [])
    for words, names in (
        ("disable the sources", sources_to_disable(c)),
        ("replace", removed),
        ("pin", [c.pinning] if not c.adopts and c.pinning not in c.info["installed"] else []),
        (f"install at {c.target}", [package.split("=", 1)[0] for package in c.packages]),
        ("install", c.unpinned),
        ("load the modules", c.modules if c.changes else []),
        ("start, now and on boot", c.services),
        ("hold", c.to_hold),
    ):
        if names:
            lines.append(f"{words}: {', '.join(names)}")
    if c.reboot:
        what = "nouveau" if c.nouveau else c.loaded["version"]
        lines.append(f"reboot: {what} is loaded, {c.next_version} comes with the reboot")
    elif c.changes:
        lines.append("reboot: not needed")
    return lines


def sources_to_disable(c: Context) -> list[str]:
    """Files, where that is allowed. One that holds other sources, too, stays: a rule names it."""
    allowed = c.packages and c.wanted["remove_conflicting"]
    return list(dict.fromkeys(source["path"] for source in c.other_sources if allowed and source["alone"]))


def source_to_use(c: Context) -> str:
    """The node's own source of the wanted repository, as cuda-keyring adds it. apt takes no second key for it."""
    disabled = sources_to_disable(c)
    paths = (source["path"] for source in c.info["sources"] if source["repository"] == c.wanted_repository)
    return next((path for path in paths if path not in disabled), "")


def driver_plan(
    info: Mapping[str, Any], gpu: Mapping[str, Any] | None, package_set: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """What has to be done on a node, and what stands in the way of it.

    `action` is nothing, adopt, install or upgrade. With findings nothing may be done.
    """
    c = Context(info, gpu or {}, package_set, wanted)
    remove = c.replaced + ([] if c.adopts else c.conflicting)
    changed = {package.split("=", 1)[0] for package in c.packages} | set(remove)
    return {
        "action": c.action,
        "version": c.target,
        "findings": [finding.as_dict() for rule in RULES for finding in rule(c)],
        "pinning": c.pinning,
        "packages": c.packages,
        "unpinned": c.unpinned,
        "downgrade": [
            name for name in package_set["pinned"] if c.packages and is_newer(c.installed_version(name), c.target)
        ],
        "remove": [name for name in remove if name not in package_set["pinned"]],
        "source": source_to_use(c),
        "sources_to_disable": sources_to_disable(c),
        "hold": c.to_hold,
        "unhold": [name for name in info["held"] if name in changed],
        "modules": c.modules,
        "services": c.services,
        "reboot": c.reboot,
        "lines": plan_lines(c),
    }


def is_newer(found: str, wanted: str) -> bool:
    return bool(found) and versions(found) > versions(wanted)


# ---- afterwards


def driver_wrong(
    info: Mapping[str, Any], gpu: Mapping[str, Any] | None, package_set: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
    """What is not as wanted once the plan was carried out, one line each."""
    c = Context(info, gpu or {}, package_set, wanted)
    return [finding.line for rule in (driver_after, packages_after, fabric_after) for finding in rule(c)]


def driver_after(c: Context) -> Iterator[Finding]:
    log = "see `journalctl -k -g NVRM`"
    error = (c.gpu.get("driver") or {}).get("error")
    if not c.loaded:
        yield Finding(
            "driver", f"the driver is not loaded (found none, wanted {c.target})", f"run `modprobe nvidia`, {log}"
        )
    elif c.library or c.loaded["version"] != c.target:
        found = c.loaded["version"] + (f" with libraries of {c.library}" if c.library else "")
        yield Finding("driver", f"the loaded driver is not the wanted one (found {found}, wanted {c.target})", "reboot")
    elif error:
        yield Finding("driver", f'the driver does not work (found "{error}", wanted an answer from nvidia-smi)', log)


def packages_after(c: Context) -> Iterator[Finding]:
    if not c.adopts:
        wrong = [name for name in c.package_set["pinned"] if c.installed_version(name) != c.target]
        if wrong:
            found = listed(f"{name} {c.info['installed'].get(name, 'missing')}" for name in wrong)
            yield Finding(
                "packages", f"versions differ (found {found}, wanted {c.target})", "see /var/log/apt/term.log"
            )
    if c.hold:
        yield Finding(
            "packages", f"packages are not on hold (found {listed(c.hold)}, wanted hold)", "see `apt-mark hold`"
        )


def fabric_after(c: Context) -> Iterator[Finding]:
    manager = c.info.get("fabric_manager_version")
    if c.loaded and manager and not same_version(manager, c.loaded["version"]):
        yield Finding(
            "fabric_manager",
            f"the fabric manager does not fit the driver (found {manager}, wanted {c.loaded['version']})",
            "see `apt policy` of its package",
        )
    if c.modules:
        yield Finding(
            "modules",
            f"the fabric's modules are not loaded (found no {listed(c.modules)}, wanted them before its manager)",
            "run modprobe with them, and see the kernel log",
        )
    states: dict[str, list[str]] = {}
    for gpu in c.gpu.get("gpus", []):
        states.setdefault(gpu["fabric_state"], []).append(str(gpu["index"]))
    bad = [f"{state} on GPU {' '.join(gpus)}" for state, gpus in states.items() if state not in (None, "Completed")]
    if bad:
        yield Finding(
            "fabric",
            f"the NVLink fabric is not ready (found {listed(bad)}, wanted Completed)",
            "see `systemctl status nvidia-fabricmanager`",
        )
    down = [] if c.adopts else [
        f"{unit} {state['active']}"
        for unit, state in c.info["services"].items()
        if state["load"] == "loaded" and state["active"] != "active"
    ]  # fmt: skip
    if down:
        yield Finding(
            "services", f"services do not run (found {listed(down)}, wanted active)", "see journalctl -u of them"
        )


# ---- a transaction that failed


def apt_words(message: str) -> str:
    """apt's errors in one line, without the command that ansible's module puts before them."""
    said = re.sub(r"^'/?\S*apt-get .*?' failed: ", "", message.strip(), flags=re.DOTALL)
    # One a line of the program, all in one line of its Python library.
    lines = re.split(r"\n|(?:^|[,:] )(?=[EW]:)", said)
    for mark in ("E:", "W:"):
        errors = [line[2:].strip() for line in lines if line.startswith(mark)]
        if errors:
            return " ".join("; ".join(dict.fromkeys(errors)).split())[:MOST_OF_A_MESSAGE]
    return " ".join(said.split())[-MOST_OF_A_MESSAGE:]


def old_driver(info: Mapping[str, Any]) -> str:
    loaded = info.get("loaded")
    return f"the old driver {loaded['version']} is still loaded" if loaded else "no driver is loaded"


def lock_failure(message: str, info: Mapping[str, Any]) -> str | None:
    if not re.search(r"[Cc]ould not get lock|[Uu]nable to (acquire|lock)|Failed to lock apt", message):
        return None
    said = re.search(r"held by process (\d+)(?: \(([^)]+)\))?", message)
    lock = info.get("lock")
    if lock:
        holder = f"{lock['process']} (pid {lock['pid']})"
    elif said:
        holder = f"{said.group(2) or 'a process'} (pid {said.group(1)})"
    else:
        holder = "a process that has ended meanwhile"
    return f"apt_lock: dpkg's lock was not free in time (found {holder}, wanted it free): let it end, then run again"


def disk_failure(message: str, info: Mapping[str, Any]) -> str | None:
    log = "\n".join((info.get("dkms_log") or {}).get("lines", []))
    full = {path: free for path, free in info.get("disk_free", {}).items() if free < FULL}
    told = re.search(r"No space left on device|don't have enough free space", message + log)
    if not told and not full:
        return None
    seen = full or info.get("disk_free", {})
    free = ", ".join(f"{gib(size)} on {path}" for path, size in seen.items())
    return (
        f"disk_space: the disk is full (found {free} free, wanted room for the packages), {old_driver(info)}: "
        "free space, then run again: what dpkg left half done is finished first"
    )


def dkms_failure(message: str, info: Mapping[str, Any]) -> str | None:
    words, log = apt_words(message), info.get("dkms_log")
    if "bad return status" not in words.lower() and not any("dkms" in name for name in info["half"]):
        return None
    said = f'found "{" | ".join(log["lines"])}" at the end of {log["path"]}' if log else f'found "{words}"'
    version = f" {log['version']}" if log else ""
    return (
        f"dkms: the module{version} could not be built for the kernel {info['kernel']} ({said}, wanted a module), "
        f"{old_driver(info)}: "
        + ("mend what it names" if info["headers"] else f"install {info['headers_package']}")
        + ", or set glm_driver_version to a version that builds, then run again"
    )


def other_failure(message: str, info: Mapping[str, Any], source: str) -> str:
    """apt's own words, with what may help; the line of another task is left as it is."""
    words = apt_words(message)
    if source and re.search(SIGNATURE, words):
        return f"apt: {words}: {source} of the node was used as it is: mend its key, or remove it, then run again"
    if re.search(SIGNATURE, words):
        return f"apt: {words}: set glm_nvidia_apt_key_fingerprint to the fingerprint of the repository's key"
    if re.search(r"Failed to fetch|[Cc]ould not resolve|does not have a Release|Request failed|HTTP", words):
        return f"apt: {words}: check glm_nvidia_apt_url"
    if re.search(r"unmet dependencies|held broken packages|unable to correct problems|conflicts?\b", words, re.I):
        return f"apt: {words}: set glm_driver_remove_conflicting: true, or another glm_driver_version"
    if words != " ".join(message.split()):
        return f"apt: {words}, {old_driver(info)}: see /var/log/apt/term.log on the node, then run again"
    return words


def driver_failure(message: str, info: Mapping[str, Any], source: str = "") -> str:
    """One line for a transaction that failed.

    `info` is what driver_info saw afterwards, `source` the file of the node's own that was used.
    """
    for explain in (lock_failure, disk_failure, dkms_failure):
        line = explain(message, info)
        if line:
            return line
    return other_failure(message, info, source)


def packages_back(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """apt-get's words for the way from the installed versions `now` to those `before`."""
    back = [f"{name}={version}" for name, version in sorted(before.items()) if now.get(name) != version]
    return back + [f"{name}-" for name in sorted(now) if name not in before]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "driver_plan": driver_plan,
            "driver_failure": driver_failure,
            "driver_wrong": driver_wrong,
            "packages_back": packages_back,
        }
