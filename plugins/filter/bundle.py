"""What a bundle has of packages, and what is wrong with the settings of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import lines_of, stanzas_of

OLD_KEY = ("3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC")


class Distribution(NamedTuple):
    """`key`: the file and fingerprint of NVIDIA's key for it."""

    name: str
    codename: str
    key: tuple[str, str] = OLD_KEY


# By NVIDIA's names, as in the addresses of its repositories.
DISTRIBUTIONS = {
    "ubuntu2204": Distribution("Ubuntu", "jammy"),
    "ubuntu2404": Distribution("Ubuntu", "noble"),
    "debian12": Distribution("Debian", "bookworm"),
    "debian13": Distribution("Debian", "trixie", ("8793F200.pub", "02182E60104FCDC26EAE1B8597A5D4CB8793F200")),
}
# python3-apt: Ansible's own module for packages wants it.
SYSTEM = (
    *("ca-certificates", "python3-apt", "python3-debian", "haproxy", "nginx", "pigz"),
    *("prometheus", "prometheus-alertmanager", "prometheus-node-exporter"),
)
DOCKER = ("docker-ce", "docker-ce-cli", "containerd.io")
TOOLKIT = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)


def bundle_packages(
    distributions: Iterable[str], settings: Mapping[str, Any], package_set: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For each distribution what the roles of a node install, and where from: `packages` of the module bundle.

    `settings` are variables of role bundle without their prefix; `package_set` is a file of drivers/.
    """
    return [_packages(name, DISTRIBUTIONS[name], settings, package_set) for name in distributions]


def _packages(
    name: str, of: Distribution, settings: Mapping[str, Any], package_set: Mapping[str, Any]
) -> dict[str, Any]:
    version = settings["driver_version"] or package_set["version"]
    pinning = package_set["pinning"].replace("{version}", version) if settings["driver"] else ""
    names = [*SYSTEM, *(f"{toolkit}={settings['toolkit_version']}-*" for toolkit in TOOLKIT)]
    if settings["docker_source"] == "docker":
        names += DOCKER
    else:
        names += ["docker.io"] + (["docker-cli"] if of.name == "Debian" else [])
    if settings["acme"]:
        names.append("certbot")
    headers: list[str] = []
    optional: list[str] = []
    if settings["driver"]:
        pinned = [*package_set["driver"][of.name], *package_set["fabric"]]
        names += [pinning, *(f"{package}={version}*" for package in pinned), *package_set["unpinned"]]
        names += [package_set[part]["package"] for part in ("cuda_toolkit", "dcgm") if settings[part]]
        # Of another distribution's kernel there are none.
        headers = [f"linux-headers-{kernel}" for kernel in settings["kernels"]]
        optional = headers + [f"linux-modules-extra-{kernel}" for kernel in settings["kernels"]]
    return {
        "distribution": name,
        "repositories": list(_repositories(name, of, settings)),
        "names": names,
        "optional": optional,
        "somewhere": headers,
        "pinning": pinning,
    }


def _repositories(name: str, of: Distribution, settings: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    """The last one takes the packages that no other has.

    NVIDIA's CUDA repository has the toolkit's packages too: of two sources apt takes the first.
    """
    url = settings["toolkit_apt_url"].rstrip("/")
    yield _repository(
        f"{url}/amd64",
        "apt/toolkit/stable/deb/amd64",
        key_url=f"{url.removesuffix('/stable/deb')}/gpgkey",
        key_path="apt/toolkit/gpgkey",
    )
    if settings["driver"]:
        path = f"{name}/x86_64"
        uri = f"{settings['driver_apt_url']}/{path}"
        yield _repository(
            uri,
            f"apt/nvidia/{path}",
            key_url=f"{uri}/{of.key[0]}",
            fingerprint=settings["driver_key_fingerprint"] or of.key[1],
            key_path=f"apt/nvidia/{path}/{of.key[0]}",
        )
    if settings["docker_source"] == "docker":
        uri = f"{settings['docker_apt_url']}/{of.name.lower()}"
        path = f"apt/docker/{of.name.lower()}"
        yield _repository(
            uri, path, suite=of.codename, component="stable", key_url=f"{uri}/gpg", key_path=f"{path}/gpg"
        )
    source = Path(settings["apt_sources"][name]).read_text(encoding="utf-8")
    yield _repository("", f"apt/system/{name}", source=source, key_path=f"apt/system/{name}/key.asc")


def _repository(uri: str, path: str, **more: str) -> dict[str, str]:
    empty = {"suite": "/", "component": "", "key_url": "", "fingerprint": "", "source": ""}
    return {"uri": uri, "path": path, **empty, **more}


def bundle_problems(
    directory: str, distributions: Iterable[str], apt_sources: Mapping[str, str], driver: Any, kernels: Iterable[str]
) -> list[str]:
    """What is wrong with the settings of a bundle, a line each."""
    found = []
    if not Path(directory).is_absolute():
        found.append(
            f"glm_bundle_dir: {directory!r} is no absolute path: set it to the directory for the bundle"
            if directory
            else "glm_bundle_dir is empty: set it to the directory for the bundle"
        )
    names = list(distributions)
    if not names:
        found.append("glm_bundle_distributions is empty: set it to those of the nodes and of the mirror's host")
    for name in names:
        if name not in DISTRIBUTIONS:
            found.append(f"glm_bundle_distributions: {name} is not known: take from {', '.join(DISTRIBUTIONS)}")
        elif not apt_sources.get(name):
            found.append(
                f"glm_bundle_apt_sources has no {name}: set it to a file with apt sources of that distribution, as its "
                "nodes have them in /etc/apt"
            )
        elif not Path(apt_sources[name]).is_file():
            found.append(f"glm_bundle_apt_sources: there is no file {apt_sources[name]}")
        else:
            found += _key_problems(apt_sources[name])
    if driver and not list(kernels):
        found.append(
            "glm_bundle_kernels is empty, and the driver's modules are built with the headers of the nodes' kernel: "
            "set it to what `uname -r` says there"
        )
    return found


def _key_problems(path: str) -> Iterable[str]:
    """Sources that apt could not check here, where the system's own keys are another distribution's."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    for values in stanzas_of(text) if re.search(r"(?im)^types:", text) else lines_of(text):
        key = values.get("signed-by", "")
        place = next((word for word in re.split(r"[\s,]+", key) if word.startswith("/")), "")
        if "BEGIN PGP" not in key and (not place or not Path(place).is_file()):
            said = f"{place} is not on this machine" if place else "it has no Signed-By"
            yield (
                f"glm_bundle_apt_sources: {path}: {values.get('uris', '')} {values.get('suites', '')}: {said}: bring "
                "the keyring of that distribution, and name its path there"
            )


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"bundle_packages": bundle_packages, "bundle_problems": bundle_problems}
