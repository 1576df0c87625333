#!/usr/bin/env python3
"""Builds the apt repositories out of packages.yml: build.py DESTINATION [REPOSITORY ...]   (without names: all)

Needs dpkg-deb, apt-ftparchive and gpg. The key that signs them is made on each build and stays in its GNUPGHOME;
DESTINATION/key.fingerprint names it. KERNEL is the release of the nodes' kernel, of this one where it is not set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
KERNEL = os.environ.get("KERNEL", "") or os.uname().release
IDENTITY = "glm-fleet testbed <testbed@localhost>"


def run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def fill(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def debian_version(package: str) -> str:
    """Upstream's version of what Debian has: 26.1.5+dfsg1-9 is 26.1.5."""
    full = run("apt-cache", "show", "--no-all-versions", package).split("\nVersion: ")[1].split("\n")[0]
    return full.split(":")[-1].split("+")[0].split("~")[0].split("-")[0]


def unpack_debian(packages: list[str], root: Path) -> None:
    """The files of Debian's own packages, without what belongs to their packaging."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # apt downloads as a user of its own
        run("apt-get", "download", "-q", *packages, cwd=Path(scratch))
        for archive in Path(scratch).glob("*.deb"):
            run("dpkg-deb", "-x", str(archive), str(root))
    for rubbish in ("usr/share/doc", "usr/share/man", "usr/share/lintian"):
        shutil.rmtree(root / rubbish, ignore_errors=True)


def copy_tree(source: Path, root: Path, values: dict[str, str]) -> None:
    for path in sorted(source.rglob("*")):
        target = root / fill(str(path.relative_to(source)), values)
        if path.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(fill(os.readlink(path), values))
        elif path.name.endswith(".so.1.c"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                run("tcc", "-c", "-o", f"{scratch}/library.o", str(path))
                # tcc itself would have the library ask for an executable stack, which a kernel may refuse.
                run("ld", "-shared", "-znoexecstack", "-o", str(target.with_suffix("")), f"{scratch}/library.o", "-lc")
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(fill(path.read_text(), values))
            target.chmod(0o755 if os.access(path, os.X_OK) else 0o644)


def packages_of(repository: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The packages of a repository; a list among them stands for what is in it."""
    for entry in repository["packages"]:
        yield from entry if isinstance(entry, list) else [entry]


def control_of(package: dict[str, Any], version: str, kernel: str) -> dict[str, str]:
    """The control fields of a package of the table; none where the package is not of the version's branch."""
    values = values_of(package, version, kernel)
    if values["BRANCH"] not in package.get("branches", [values["BRANCH"]]):
        return {}
    name = fill(package["name"], values)
    depends = [package["depends"], package.get("also_depends", {}).get(version, "")]
    control = {
        "Package": name,
        "Version": values["FULL"],
        "Architecture": "amd64",
        "Maintainer": IDENTITY,
        "Section": "testbed",
        "Priority": "optional",
        "Depends": fill(", ".join(part for part in depends if part), values),
        "Conflicts": package.get("conflicts", ""),
        "Replaces": package.get("conflicts", ""),
        "Provides": fill(package.get("provides", ""), values),
        "Description": f"stand-in for {name}, made by the glm-fleet testbed",
    }
    return {key: value for key, value in control.items() if value}


def values_of(package: dict[str, Any], version: str, kernel: str) -> dict[str, str]:
    """What is filled in for the @NAMES@ of the table and of the files."""
    full = package.get("epoch", "") + package.get("version", version)
    if "version" not in package:
        full += package.get("revision", "-1ubuntu1")
    version = package.get("version", version)
    return {"VERSION": version, "BRANCH": version.split(".")[0], "FULL": full, "KERNEL": kernel}


def build(package: dict[str, Any], version: str, pool: Path) -> None:
    control = control_of(package, version, KERNEL)
    if not control:
        return
    archive = pool / f"{control['Package']}_{control['Version'].split(':')[-1]}_amd64.deb"
    if archive.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        root.mkdir(mode=0o755)
        if "from" in package:
            unpack_debian(package["from"], root)
        if "source" in package:
            copy_tree(HERE / "files" / package["source"], root, values_of(package, version, KERNEL))
        (root / "DEBIAN").mkdir(exist_ok=True)
        (root / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in control.items()))
        # A kernel's release may have capitals, which no other package's name may.
        check = ["--nocheck"] if "@KERNEL@" in package["name"] else []
        run("dpkg-deb", *check, "--root-owner-group", "-Zzstd", "-z3", "--build", str(root), str(archive))


def sign(directory: Path, *options: str) -> None:
    release = run("apt-ftparchive", *options, "release", ".", cwd=directory)
    (directory / "Release").write_text(release)
    run("gpg", "--batch", "--yes", "--clearsign", "--output", "InRelease", "Release", cwd=directory)
    run("gpg", "--batch", "--yes", "--armor", "--detach-sign", "--output", "Release.gpg", "Release", cwd=directory)


def index(root: Path, pool: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / "Packages").write_text(run("apt-ftparchive", "packages", pool, cwd=root))
    run("gzip", "--keep", "--force", "-9n", "Packages", cwd=target)


def publish(repository: dict[str, Any], pool: Path, destination: Path) -> None:
    """The same packages under each path of a repository, as links to one file."""
    for path in repository["paths"]:
        root = destination / path
        flat = repository["layout"] == "flat"
        packages = root if flat else root / "pool"
        packages.mkdir(parents=True, exist_ok=True)
        for archive in pool.glob("*.deb"):
            os.link(archive, packages / archive.name)
        if flat:
            index(root, ".", root)
            sign(root, "-o", "APT::FTPArchive::Release::Origin=glm-fleet-testbed")
            continue
        for suite in repository["suites"][path]:
            dist = root / "dists" / suite
            index(root, "pool", dist / "stable/binary-amd64")
            option = "APT::FTPArchive::Release::"
            settings = {"Origin": "Docker", "Suite": suite, "Codename": suite, "Components": "stable"}
            settings["Architectures"] = "amd64"
            sign(dist, *(part for key, value in settings.items() for part in ("-o", f"{option}{key}={value}")))


def key_exists() -> bool:
    done = subprocess.run(["gpg", "--list-secret-keys", IDENTITY], capture_output=True, check=False)
    return done.returncode == 0


def main() -> None:
    destination = Path(sys.argv[1])
    if not key_exists():
        run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", IDENTITY, "rsa3072", "sign", "never")
    public = run("gpg", "--armor", "--export", IDENTITY)
    listing = run("gpg", "--with-colons", "--fingerprint", IDENTITY)
    table = yaml.safe_load((HERE / "packages.yml").read_text())
    for repository in table["repositories"]:
        if repository["name"] not in (sys.argv[2:] or [repository["name"]]):
            continue
        pool = destination / ".pool" / repository["name"]
        pool.mkdir(parents=True, exist_ok=True)
        for listed in repository["versions"]:
            version = debian_version("docker.io") if listed == "@DEBIAN@" else listed
            for package in packages_of(repository):
                build(package, version, pool)
        publish(repository, pool, destination)
        for key in repository["keys"]:
            (destination / key).parent.mkdir(parents=True, exist_ok=True)
            (destination / key).write_text(public)
        print(f"{repository['name']}: {len(list(pool.glob('*.deb')))} packages")
    fingerprint = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))
    (destination / "key.fingerprint").write_text(f"{fingerprint}\n")


if __name__ == "__main__":
    main()
