"""The tests' way to playbooks/driver.yml and to the nodes: break something, and see what changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import ROOT, SNAPSHOT, Play, Run, docker

INVENTORY = ROOT / "molecule/driver-refusals/inventory"
ROLE = str(ROOT / "molecule/driver-refusals/role.yml")
MIRROR = "glm-driver-refusals-mirror"
ADDRESS = "198.18.69.2"
REPOSITORY = f"http://{ADDRESS}:8080/compute/cuda/repos/debian13/x86_64"
# Holds dpkg's lock as apt does, for the seconds of its argument.
HOLD_LOCK = (
    "import fcntl, sys, time; f = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    "print('held', flush=True); time.sleep(int(sys.argv[1]))"
)


@dataclass
class Node:
    """A node, from behind."""

    name: str
    play: Play

    def run(self, command: str, check: bool = True, seconds: int = 120) -> str:
        return docker("exec", "-i", f"glm-{self.name}", "/bin/sh", "-c", command, check=check, seconds=seconds)

    def driver(
        self, *arguments: str, playbook: str = "playbooks/driver.yml", seconds: int = 300, **settings: Any
    ) -> Run:
        """A run over this node alone."""
        limit = ("--limit", self.name)
        return self.play(*limit, *arguments, playbook=playbook, seconds=seconds, **settings)

    def snapshot(self) -> list[str]:
        return self.run(SNAPSHOT + "\nls /sys/module\n").splitlines()

    def boot(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id").strip()

    def loaded(self) -> str:
        """The version of the loaded module; empty where none is."""
        command = r"sed -n 's/.*x86_64  \([0-9.]*\) .*/\1/p' /proc/driver/nvidia/version 2>/dev/null"
        return self.run(command, check=False).strip()

    @contextlib.contextmanager
    def file(self, path: str, content: str = "") -> Iterator[None]:
        self.run(f"mkdir -p $(dirname {path}) && printf '%s' '{content}' > {path}")
        try:
            yield
        finally:
            self.run(f"rm -f {path}; rmdir --ignore-fail-on-non-empty $(dirname {path})")

    @contextlib.contextmanager
    def dkms_fails(self, version: str = "") -> Iterator[None]:
        """For one version, or for every one."""
        with self.file("/etc/nvidia-stand-in/dkms-fails", version):
            yield

    @contextlib.contextmanager
    def no_headers(self) -> Iterator[None]:
        """Of an archive that has moved on to a newer kernel."""
        source = "/etc/apt/sources.list.d/distribution.list"
        lists = "/var/lib/apt/lists"
        self.run(f"mv {source} /root/ && mkdir /root/lists && mv {lists}/*_distribution_* /root/lists/")
        try:
            yield
        finally:
            self.run(f"mv /root/distribution.list {source} && mv /root/lists/* {lists}/ && rmdir /root/lists")

    @contextlib.contextmanager
    def nouveau(self) -> Iterator[None]:
        self.run("modprobe nouveau")
        try:
            yield
        finally:
            self.run("modprobe -r nouveau")

    @contextlib.contextmanager
    def secure_boot(self) -> Iterator[None]:
        variable = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
        self.run(
            "mount -t tmpfs tmpfs /sys/firmware && mkdir -p /sys/firmware/efi/efivars && "
            f"printf '\\006\\000\\000\\000\\001' > {variable}"
        )
        try:
            yield
        finally:
            self.run("umount /sys/firmware")

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        self.run("systemd-run --quiet --unit=glm-engine sleep infinity")
        try:
            yield
        finally:
            self.run("systemctl stop glm-engine")

    @contextlib.contextmanager
    def full_disk(self, path: str) -> Iterator[None]:
        """A file system on which nothing more fits."""
        self.run(f"mkdir -p {path} && mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs {path}")
        try:
            yield
        finally:
            self.run(f"umount {path} && rmdir --ignore-fail-on-non-empty {path}")

    @contextlib.contextmanager
    def fabric_manager(self, version: str, back: str) -> Iterator[None]:
        """One of another version, as after an upgrade of this package alone."""
        install = (
            f"cd /tmp && curl -sfO {REPOSITORY}/nvidia-fabricmanager-570_%s-1_amd64.deb && "
            "dpkg -i nvidia-fabricmanager-570_*.deb && rm nvidia-fabricmanager-570_*.deb"
        )
        self.run(install % version)
        try:
            yield
        finally:
            self.run(install % back)

    @contextlib.contextmanager
    def lock(self, seconds: int) -> Iterator[None]:
        """dpkg's lock, held by a program of the name of unattended upgrades for so long at most."""
        Path(self.play.scratch / "hold").write_text(HOLD_LOCK)
        docker("cp", str(self.play.scratch / "hold"), f"glm-{self.name}:/usr/local/bin/unattended-upgrade")
        self.run(
            "systemd-run --quiet --collect --unit=locker "
            f"/usr/bin/python3 /usr/local/bin/unattended-upgrade {seconds}; sleep 1"
        )
        try:
            yield
        finally:
            self.run("systemctl stop locker 2>/dev/null; rm -f /usr/local/bin/unattended-upgrade")


def said(run: Run, *words: str) -> list[str]:
    """The lines of what failed tasks say that have all of these words."""
    lines = [line for message in run.messages for line in message.splitlines()]
    return [line for line in lines if all(word in line for word in words)]


def said_once(run: Run, *words: str) -> str:
    found = said(run, *words)
    assert len(found) == 1, f"{len(found)} lines with {words}: {run.messages}\n{run.errors}"
    return found[0]
