"""Whether a bundle has what is wanted of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def mirror_problems(url: str, key_file: str) -> list[str]:
    """What is wrong with the settings of a mirror, a line each. Nothing without one."""
    found = []
    if url and not re.fullmatch(r"https?://[^/\s]+", url):
        found.append(f"glm_mirror_url: {url} is no address of a mirror: write http://HOST:PORT, without a path")
    if url and not Path(key_file).is_file():
        found.append(
            f"glm_mirror_key_file: there is no file {key_file} on the controller: bring it there from where the bundle "
            "was made"
        )
    return found


def bundle_name(facts: Mapping[str, Any]) -> str:
    """A host's distribution by NVIDIA's names, as ubuntu2404."""
    name = str(facts.get("distribution", "unknown"))
    version = str(facts.get("distribution_version" if name == "Ubuntu" else "distribution_major_version", ""))
    return name.lower() + version.replace(".", "")


def mirror_findings(
    offer: Mapping[str, Any], facts: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[dict[str, str]]:
    """What stands between a host and the bundle that `offer` describes. Nothing without a mirror.

    wanted: url, driver (whether it is to be installed), driver_branch, docker_source.
    """
    if not wanted["url"]:
        return []
    return [{"id": "mirror", "line": f"mirror: {line}"} for line in _findings(offer, facts, wanted)]


def bundle_findings(offer: Mapping[str, Any], facts: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The same for the mirror's host, which needs a web server of the bundle."""
    return list(_findings(offer, facts, wanted))


def _findings(offer: Mapping[str, Any], facts: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    if "id" not in offer:
        yield f"glm_mirror_url: {wanted['url']} has no bundle: set it to the site's mirror, or run playbooks/mirror.yml"
        return
    name, again = bundle_name(facts), "make the bundle again"
    if name not in offer["distributions"]:
        yield (
            f"the bundle {offer['id']} is for {', '.join(offer['distributions'])}, and this host is {name}: add it to "
            f"glm_bundle_distributions and {again}"
        )
    machine = str(facts.get("architecture", offer["architecture"]))
    if machine != offer["architecture"]:
        yield f"the bundle {offer['id']} is for {offer['architecture']}, and this host is {machine}"
    if wanted["driver"] and offer["driver_branch"] != wanted["driver_branch"]:
        has = f"driver branch {offer['driver_branch']}" if offer["driver_branch"] else "no driver"
        yield (
            f"the bundle {offer['id']} has {has}, and glm_driver_branch is {wanted['driver_branch']}: set it to that "
            f"of the bundle, or {again}"
        )
    if offer["docker_source"] != wanted["docker_source"]:
        yield (
            f"the bundle {offer['id']} was made with glm_docker_source: {offer['docker_source']}, and it is "
            f"{wanted['docker_source']} here: set it to that of the bundle, or {again}"
        )


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "mirror_problems": mirror_problems,
            "bundle_name": bundle_name,
            "mirror_findings": mirror_findings,
            "bundle_findings": bundle_findings,
        }
