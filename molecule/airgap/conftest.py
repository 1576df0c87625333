"""A site without a way out: what leaves its hosts for elsewhere is dropped, and counted by the kernel."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, provided
from testbed import ROOT, Play, Run, docker

INVENTORY = ROOT / "molecule/airgap/inventory"
INTERNET = "http://198.18.80.2"  # the testbed's mirror: registry, hub and repositories
NODE, SITE = "airgap-node", "airgap-site"
ADDRESSES = {NODE: "198.18.80.11", SITE: "198.18.80.12"}
DISTRIBUTION, MEDIA = "debian13", "/media/bundle"
IMAGES = ["vllm/vllm-openai:glm52-cu129"]
QUESTIONS = "/var/log/names.log"


class Site(Fleet):
    """The controller's side of it: the machine that makes the bundle has a way out, and this one has a disk."""

    bundle_dir: Path
    sources: Path

    def bundle(self, *arguments: str, seconds: int = 600, **settings: Any) -> Run:
        """playbooks/bundle.yml as on a machine with a way out."""
        return self.play(
            *arguments,
            playbook="playbooks/bundle.yml",
            seconds=seconds,
            **{
                "glm_bundle_dir": str(self.bundle_dir),
                "glm_bundle_distributions": [DISTRIBUTION],
                "glm_bundle_apt_sources": {DISTRIBUTION: str(self.sources)},
                "glm_bundle_kernels": [self.run(NODE, "uname -r").strip()],
                "glm_registry_mirror": f"{INTERNET}:5000",
                "glm_hf_endpoint": f"{INTERNET}:8081",
                "glm_docker_apt_url": f"{INTERNET}:8080/linux",
                "glm_nvidia_apt_url": f"{INTERNET}:8080/compute/cuda/repos",
                "glm_nvidia_apt_key_fingerprint": docker(
                    "exec", "glm-airgap-mirror", "cat", "/srv/apt/key.fingerprint"
                ).strip(),
                "glm_nvidia_container_apt_url": f"{INTERNET}:8080/libnvidia-container/stable/deb",
                **settings,
            },
        )

    def mirror(self, *arguments: str, seconds: int = 600, **settings: Any) -> Run:
        return self.play(*arguments, playbook="playbooks/mirror.yml", seconds=seconds, **settings)

    def carry(self) -> None:
        """The disk goes to the site."""
        self.run(SITE, f"rm -rf {MEDIA} && mkdir -p {MEDIA}")
        with subprocess.Popen(
            ["tar", "-C", str(self.bundle_dir), "-c", "--exclude=./apt", "--exclude=./incoming", "."],
            stdout=subprocess.PIPE,
        ) as packed:
            subprocess.run(
                ["docker", "exec", "-i", f"glm-{SITE}", "tar", "-C", MEDIA, "-x"], stdin=packed.stdout, check=True
            )
        assert packed.returncode == 0

    # --- the packet filter ---

    def filter(self, host: str, *arguments: str) -> str:
        pid = docker("inspect", "--format", "{{.State.Pid}}", f"glm-{host}").strip()
        done = subprocess.run(
            ["nsenter", "--target", pid, "--net", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def name_server(self) -> None:
        """The site's own, on the mirror's host: it knows no name, and notes what it is asked for."""
        self.run(
            SITE,
            "apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends dnsmasq-base >/dev/null && "
            f"systemd-run --quiet --unit=names dnsmasq --keep-in-foreground --no-resolv --no-hosts --local=/#/ "
            f"--user=root --log-queries --log-facility={QUESTIONS}",
        )

    def questions(self) -> set[str]:
        """The names that the site's hosts have asked for."""
        return set(re.findall(r"query\[\w+\] (\S+) from", self.run(SITE, f"cat {QUESTIONS}")))

    def close(self) -> None:
        """No way out, but to the mirror. Of all that leaves, also of containers: after the routing."""
        for host, allowed in ((NODE, [ADDRESSES[SITE]]), (SITE, [])):
            rules = [
                ["-o", "lo", "-j", "ACCEPT"],
                [
                    "-p",
                    "igmp",
                    "-d",
                    "224.0.0.0/24",
                    "-j",
                    "ACCEPT",
                ],  # the kernel's, at a new bridge: it stays on the link
                ["-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"],
                *(["-d", address, "-j", "ACCEPT"] for address in allowed),
                *(["-p", protocol, "-j", "DROP"] for protocol in ("tcp", "udp", "all")),
            ]
            for rule in rules:
                self.filter(host, "iptables", "-t", "mangle", "-A", "POSTROUTING", *rule)
            self.run(host, f"echo nameserver {ADDRESSES[SITE]} > /etc/resolv.conf")

    def attempts(self, host: str) -> int:
        """Packets that were to leave for elsewhere."""
        rules = self.filter(host, "iptables", "-t", "mangle", "-L", "POSTROUTING", "-v", "-x", "-n")
        found = re.findall(r"^\s*(\d+)\s+\d+\s+DROP\b", rules, re.M)
        assert found, f"{host} was restarted, and its filter is gone: {rules}"
        print(host, rules)
        return sum(map(int, found))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    play = Play(tmp_path_factory.mktemp("airgap"), INVENTORY)
    with provided(Site(play, (NODE,), {}), "AIRGAP_KEEP", IMAGES) as site:
        assert isinstance(site, Site)
        site.bundle_dir = play.scratch / "bundle"
        site.sources = sources_of(site, play.scratch)
        site.name_server()
        site.close()
        yield site


def sources_of(site: Site, directory: Path) -> Path:
    """The node's own apt sources, with their keys, and the kernel's headers."""
    keys = directory / "archive.gpg", directory / "kernels.asc"
    for key, command in (
        (keys[0], ["glm-" + NODE, "cat", "/usr/share/keyrings/debian-archive-keyring.gpg"]),
        (keys[1], ["glm-airgap-mirror", "cat", "/srv/apt/distribution/key.asc"]),
    ):
        key.write_bytes(subprocess.run(["docker", "exec", *command], capture_output=True, check=True).stdout)
    own = [line for line in site.run(NODE, "cat /etc/apt/sources.list").splitlines() if line.startswith("deb ")]
    lines = [re.sub(r"^deb (\[[^]]*\] )?", f"deb [signed-by={keys[0]}] ", line) for line in own]
    lines.append(f"deb [signed-by={keys[1]}] {INTERNET}:8080/distribution ./")
    path = directory / "sources.list"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def bundled(site: Site) -> Run:
    """A bundle of the release, made from nothing."""
    run = site.bundle()
    assert run.code == 0, run.messages or run.output[-3000:]
    return run


@pytest.fixture(scope="session")
def served(site: Site, bundled: Run) -> Run:
    """The bundle at the site, on its mirror."""
    site.carry()
    run = site.mirror()
    assert run.code == 0, run.messages or run.output[-3000:]
    return run


@pytest.fixture(scope="session")
def deployed(site: Site, served: Run) -> Run:
    """The bare node, from the mirror."""
    run = site.play(seconds=1200)
    assert run.code == 0, run.messages or run.output[-3000:]
    return run
