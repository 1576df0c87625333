"""apt's sources, read as apt itself reads them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.filter.apt import apt_source
from ansible_collections.glm.fleet.plugins.module_utils.apt_sources import apt_sources, key_conflicts, repository

# As NVIDIA's and Docker's guides have written them.
TOOLKIT_LIST = (
    "deb [signed-by=/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg] "
    "https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n"
    "#deb [signed-by=/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg] "
    "https://nvidia.github.io/libnvidia-container/experimental/deb/$(ARCH) /\n"
)
DOCKER_LIST = (
    "deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.gpg] https://download.docker.com/linux/ubuntu   noble stable\n"
)
DOCKER_SOURCES = """\
Types: deb
URIs: https://download.docker.com/linux/ubuntu
Suites: noble
Components: stable
Architectures: amd64
Signed-By: /etc/apt/keyrings/docker.asc
"""
CUDA_LIST = (
    "deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] "
    "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/ /\n"
)
TOOLKIT = "https://nvidia.github.io/libnvidia-container/stable/deb/amd64"
DOCKER = "https://download.docker.com/linux/ubuntu"


@pytest.fixture(name="apt")
def fixture_apt(tmp_path: Path) -> Path:
    for folder in ("etc/apt/sources.list.d", "var/lib/apt/lists/partial", "var/lib/dpkg", "var/cache/apt/archives"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").touch()
    return tmp_path / "etc/apt"


def write(apt: Path, **files: str) -> None:
    """By name, with an underscore for the dot."""
    for name, text in files.items():
        (apt / "sources.list.d" / name.replace("_", ".")).write_text(text)


def named(apt: Path, uri: str, suite: str) -> str:
    seen = [{"path": one.path, "repository": one.repository} for one in apt_sources(str(apt), "x86_64")]
    return Path(apt_source(seen, uri, suite)).name


def test_the_guides_sources_name_the_repositories_of_this_project(apt: Path) -> None:
    write(apt, toolkit_list=TOOLKIT_LIST, docker_list=DOCKER_LIST, cuda_list=CUDA_LIST)
    assert named(apt, TOOLKIT, "/") == "toolkit.list"
    assert named(apt, DOCKER, "noble") == "docker.list"
    assert named(apt, DOCKER, "jammy") == ""
    assert named(apt, "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64", "/") == "cuda.list"
    assert named(apt, f"{TOOLKIT}/", "./") == "", "apt takes it for another one"
    write(apt, docker_list="", docker_sources=DOCKER_SOURCES)
    assert named(apt, f"{DOCKER}/", "noble") == "docker.sources"


def test_sources_that_are_not_in_use(apt: Path) -> None:
    write(
        apt,
        docker_list=f"# {DOCKER_LIST}",
        docker_sources=f"Enabled: no\n{DOCKER_SOURCES}",
        docker_list_disabled=DOCKER_LIST,
        docker_list_save=DOCKER_LIST,
    )
    (apt / "sources.list.d" / "with space.list").write_text(DOCKER_LIST)
    assert apt_sources(str(apt)) == []
    write(apt, docker_sources=f"Enabled: yes\n{DOCKER_SOURCES}")
    assert len(apt_sources(str(apt))) == 1


STANZAS = """\
# of the site
Types: deb deb-src
URIs: http://one.example/ubuntu/
 http://two.example/ubuntu
Suites: noble noble-updates
Components: main universe
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 Zm9v
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://three.example/$(ARCH)/
Suites: ./
"""


def test_several_of_all_in_one_stanza(apt: Path) -> None:
    (apt / "sources.list").write_text("deb-src http://archive.example/ubuntu noble main # of the archive\n")
    write(apt, all_sources=STANZAS)
    found = apt_sources(str(apt), "aarch64")
    assert [(one.kind, one.words) for one in found][:2] == [
        ("deb-src", "http://archive.example/ubuntu noble main"),
        ("deb", "http://one.example/ubuntu/ noble main universe"),
    ]
    assert len(found) == 1 + 2 * 2 * 2 + 1
    assert found[1].signed_by.startswith("-----BEGIN PGP PUBLIC KEY BLOCK----- . Zm9v")
    assert found[-1].repository == "three.example/arm64/./"


@pytest.mark.parametrize(
    ("uri", "suite", "name"),
    [
        ("https://x.example/deb", "noble", "x.example/deb/dists/noble"),
        ("http://user:word@x.example/deb/", "noble", "x.example/deb/dists/noble"),
        ("https://x.example/deb", "/", "x.example/deb/"),
        ("https://x.example/", "deb/", "x.example/deb/"),
        ("file:/srv/apt", "./", "/srv/apt/./"),
        ("mirror+file:///srv/list", "noble", "/srv/list/dists/noble"),
    ],
)
def test_a_repository_is_where_its_release_file_lies(uri: str, suite: str, name: str) -> None:
    assert repository(uri, suite) == name


A, B = "[signed-by=/usr/share/keyrings/a.gpg]", "[signed-by=/usr/share/keyrings/b.gpg]"


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (f"deb {A} https://x.example/deb/$(ARCH) /", f"deb {B} https://x.example/deb/amd64/ /", True),
        (f"deb {A} http://x.example/deb noble main", f"deb {B} https://x.example/deb noble other", True),
        (f"deb-src {A} https://x.example/deb noble main", f"deb {B} https://x.example/deb noble main", True),
        (f"deb {A} https://x.example/deb noble main", "deb https://x.example/deb noble main", True),
        (f"deb {A} https://x.example/ deb/", f"deb {B} https://x.example/deb /", True),
        ("deb https://x.example/deb noble main", f"deb {A} https://x.example/deb noble main", False),
        (f"deb {A} https://x.example/deb noble main", f"deb {A} https://x.example/deb noble main", False),
        (f"deb {A} https://x.example/deb noble main", f"deb {B} https://x.example/deb jammy main", False),
        (f"deb {A} https://x.example/deb ./", f"deb {B} https://x.example/deb /", False),
        (f"deb {A} https://x.example/deb noble main", f"# deb {B} https://x.example/deb noble main", False),
    ],
)
def test_two_keys_for_one_repository_as_apt_judges_it(apt: Path, first: str, second: str, refused: bool) -> None:
    write(apt, first_list=f"{first}\n", second_list=f"{second}\n")
    found = key_conflicts(apt_sources(str(apt), "x86_64"))
    assert [[Path(one.path).name for one in pair] for pair in found] == [["first.list", "second.list"]] * refused
    command = ["apt-get", "indextargets", "-o", f"Dir={apt.parents[1]}", "-o", "APT::Architecture=amd64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ("Conflicting values set for option Signed-By" in done.stderr) is refused, done.stderr
