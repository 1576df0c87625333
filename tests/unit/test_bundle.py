"""A bundle: what belongs into it, that it is signed, and how it comes to the mirror."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.action import bundle as action
from ansible_collections.glm.fleet.plugins.filter import bundle as settings
from ansible_collections.glm.fleet.plugins.filter.site_mirror import bundle_findings, bundle_name, mirror_problems
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.store import Store
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.transfer import DirectoryOpener, Wanted
from ansible_collections.glm.fleet.plugins.modules import bundle_info, hub_manifest
from ansible_collections.glm.fleet.plugins.plugin_utils import apt_closure
from ansible_collections.glm.fleet.plugins.plugin_utils.bundle import (
    Bundle,
    Problem,
    Repository,
    Signer,
    Wish,
    home_of,
)
from loading import ROOT, load_file

mirror_import = load_file(ROOT / "roles/site_mirror/files/mirror-import", "mirror_import")
DRIVER = yaml.safe_load((ROOT / "drivers/570.yml").read_text())
SETTINGS = {
    "acme": False,
    "apt_sources": {},
    "kernels": ["6.8.0-60-generic"],
    "driver": True,
    "driver_version": "",
    "driver_apt_url": "https://nvidia.test/repos",
    "driver_key_fingerprint": "",
    "cuda_toolkit": True,
    "dcgm": False,
    "docker_source": "docker",
    "docker_apt_url": "https://docker.test/linux",
    "toolkit_apt_url": "https://toolkit.test/stable/deb",
    "toolkit_version": "1.20.0",
}
OFFER = {
    "id": "0123456789ab",
    "architecture": "x86_64",
    "distributions": ["ubuntu2404"],
    "driver_branch": 570,
    "docker_source": "docker",
}
FACTS = {"distribution": "Ubuntu", "distribution_version": "24.04", "architecture": "x86_64"}
WANTED = {"url": "http://mirror:8080", "driver": True, "driver_branch": 570, "docker_source": "docker"}


# --- what belongs into it ------------------------------------------------------------------------------------


def packages(tmp_path: Path, name: str = "ubuntu2404", **more: Any) -> dict[str, Any]:
    source = tmp_path / "sources"
    source.write_text("deb http://archive.test noble main\n")
    wanted = {**SETTINGS, "apt_sources": {name: str(source)}, **more}
    return settings.bundle_packages([name], wanted, DRIVER)[0]


def test_the_driver_and_its_headers_are_pinned_as_on_a_node(tmp_path: Path) -> None:
    made = packages(tmp_path)
    assert made["pinning"] == f"nvidia-driver-pinning-{DRIVER['version']}"
    assert f"nvidia-open-570={DRIVER['version']}*" in made["names"]
    assert made["somewhere"] == ["linux-headers-6.8.0-60-generic"]
    assert made["optional"] == ["linux-headers-6.8.0-60-generic", "linux-modules-extra-6.8.0-60-generic"]
    assert DRIVER["cuda_toolkit"]["package"] in made["names"]
    assert DRIVER["dcgm"]["package"] not in made["names"]


def test_without_the_driver_nothing_of_it(tmp_path: Path) -> None:
    made = packages(tmp_path, driver=False)
    assert not [name for name in made["names"] if "nvidia-driver" in name or name.startswith("linux-")]
    assert not [each for each in made["repositories"] if "nvidia.test" in each["uri"]]


def test_the_repositories_have_the_paths_that_the_nodes_are_given(tmp_path: Path) -> None:
    """As the defaults of the settings have them behind glm_mirror_url."""
    defaults = (ROOT / "roles/glm/defaults/main.yml").read_text()
    for part in ("/apt/nvidia", "/apt/docker", "/apt/toolkit/stable/deb"):
        assert f"glm_mirror_url ~ '{part}'" in defaults
    made = packages(tmp_path, "debian13")["repositories"]
    assert {each["path"]: each["key_path"] for each in made} == {
        "apt/toolkit/stable/deb/amd64": "apt/toolkit/gpgkey",
        "apt/nvidia/debian13/x86_64": "apt/nvidia/debian13/x86_64/8793F200.pub",
        "apt/docker/debian": "apt/docker/debian/gpg",
        "apt/system/debian13": "apt/system/debian13/key.asc",
    }
    # NVIDIA's CUDA repository has the toolkit too, and of two sources apt takes the first.
    assert made[0]["path"].startswith("apt/toolkit")
    assert "/apt/system/{{ egress_distribution }}/" in (ROOT / "templates/glm-mirror.sources.j2").read_text()


def test_what_the_roles_install_is_in_the_bundle(tmp_path: Path) -> None:
    """Every package that a task names, but for certbot: it asks a public authority."""
    named: set[str] = set()
    for path in ROOT.glob("roles/*/tasks/*.yml"):
        for names in re.findall(r"builtin\.apt:\n\s+name: ([^\n{]+)$", path.read_text(), re.M):
            named |= {name.strip() for name in names.strip("[]").split(",")}
    assert "haproxy" in named
    both = packages(tmp_path)["names"] + packages(tmp_path, docker_source="distribution")["names"]
    assert named - {"certbot"} <= {name.partition("=")[0] for name in both}
    runtime = yaml.safe_load((ROOT / "roles/container_runtime/vars/main.yml").read_text())
    assert set(runtime["__container_runtime_docker_packages"]["docker"]) <= set(both)
    assert set(runtime["__container_runtime_toolkit_packages"]) == set(settings.TOOLKIT)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"directory": ""}, "glm_bundle_dir is empty"),
        ({"distributions": []}, "glm_bundle_distributions is empty"),
        ({"distributions": ["ubuntu2604"]}, "ubuntu2604 is not known: take from ubuntu2204, ubuntu2404, debian12"),
        ({"apt_sources": {}}, "glm_bundle_apt_sources has no ubuntu2404: set it to a file"),
        ({"apt_sources": {"ubuntu2404": "/nowhere"}}, "there is no file /nowhere"),
        ({"kernels": []}, "glm_bundle_kernels is empty"),
        ({"directory": "bundle"}, "glm_bundle_dir: 'bundle' is no absolute path"),
    ],
)
def test_settings_that_no_bundle_can_be_made_of(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    sources = tmp_path / "sources.list"
    sources.write_text(f"deb [signed-by={sources}] http://archive.test noble main\n")
    right: dict[str, Any] = {
        "directory": "/b",
        "distributions": ["ubuntu2404"],
        "apt_sources": {"ubuntu2404": str(sources)},
        "driver": True,
        "kernels": ["6.8"],
    }
    assert settings.bundle_problems(**right) == []
    (line,) = settings.bundle_problems(**{**right, **wrong})
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deb http://archive.test noble main", "http://archive.test noble: it has no Signed-By: bring the keyring"),
        ("deb [signed-by=/no/ring.gpg] http://archive.test noble main", "/no/ring.gpg is not on this machine"),
        ("Types: deb\nURIs: http://archive.test\nSuites: noble\nSigned-By: /no/ring.gpg", "/no/ring.gpg is not on"),
        ("Types: deb\nURIs: http://a.test\nSuites: x\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .", ""),
    ],
)
def test_a_source_whose_key_is_not_here_is_named(tmp_path: Path, text: str, said: str) -> None:
    """The system's own keys are of another distribution."""
    path = tmp_path / "sources"
    path.write_text(text + "\n")
    found = settings.bundle_problems("/b", ["ubuntu2404"], {"ubuntu2404": str(path)}, driver=False, kernels=[])
    assert len(found) == bool(said)
    assert said in "".join(found)


# --- apt -----------------------------------------------------------------------------------------------------


def test_what_apt_would_download_is_read() -> None:
    text = (
        "'http://a.test/pool/g%2b/g++_1.2_amd64.deb' g++_1%3a1.2_amd64.deb 12 SHA256:" + "a" * 64 + "\n"
        "Reading package lists...\n'http://a.test/x.deb' x_1_all.deb 3 MD5Sum:0\n"
    )
    assert list(apt_closure.parse(text)) == [
        ("http://a.test/pool/g%2b/g++_1.2_amd64.deb", "g++_1%3a1.2_amd64.deb", 12),
        ("http://a.test/x.deb", "x_1_all.deb", 3),
    ]


def test_what_apt_cannot_do_is_one_line() -> None:
    text = (
        "Some packages could not be installed.\n x : Depends: y (= 2) but 1 is to be installed\nE: Unable to correct\n"
    )
    assert apt_closure.reason(text) == "x : Depends: y (= 2) but 1 is to be installed; Unable to correct"
    assert apt_closure.reason("E: Unable to locate package z\n") == "Unable to locate package z"


def test_a_package_goes_to_the_repository_that_it_came_from() -> None:
    def repository(uri: str) -> Repository:
        return Repository(uri, "p", "/", "", "k", "", "", "")

    both = [repository("http://a.test/repo/x86_64/"), repository("")]
    assert home_of(apt_closure.Package("http://a.test/repo/x86_64/./x.deb", "x", 1), both) is both[0]
    assert home_of(apt_closure.Package("http://a.test/repo/x86_64-other/x.deb", "x", 1), both) is both[1]


# --- made, signed, brought to the mirror ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def signer() -> Iterator[Signer]:
    # GnuPG's sockets have to have short paths.
    with tempfile.TemporaryDirectory(prefix="glm-") as directory:
        made = Signer(Path(directory) / "gnupg")
        made.prepare()
        yield made
        made.end()


def wish(source: Path, path: str, name: str, digest: str = "") -> Wish:
    content = (source / name).read_bytes()
    sha256 = digest or hashlib.sha256(content).hexdigest()
    return Wish(path, Wanted(name, len(content), "sha256", sha256), DirectoryOpener(source), name)


def make(tmp_path: Path, signer: Signer, names: dict[str, bytes], base: str = "") -> tuple[Bundle, dict[str, Any]]:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    bundle = Bundle(tmp_path / "bundle", signer, lambda _text: None, {})
    bundle.store.part = 1000
    bundle.begin(base)
    for name, content in names.items():
        (source / name).write_bytes(content)
    bundle.plan_files(wish(source, f"files/{name}", name) for name in names)
    bundle.insist_on_room()
    bundle.fetch()
    return bundle, bundle.finish({"created": "now", **OFFER})


def test_a_second_bundle_fetches_what_is_new_and_drops_the_rest(tmp_path: Path, signer: Signer) -> None:
    make(tmp_path, signer, {"a": b"a" * 2500, "b": b"b"})
    stays = {path: path.stat().st_mtime_ns for path in (tmp_path / "bundle/blobs").glob("*/*")}
    assert len(stays) == 4
    bundle, made = make(tmp_path, signer, {"a": b"a" * 2500, "c": b"c"})
    assert made["removed_bytes"] == 1
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "bundle/blobs").glob("*/*")}
    assert len(now) == 4
    assert len(set(now.items()) & set(stays.items())) == 3
    assert not bundle.needed()


def test_what_the_site_has_is_left_out(tmp_path: Path, signer: Signer) -> None:
    make(tmp_path, signer, {"a": b"a" * 2500})
    base = tmp_path / "base.json"
    (tmp_path / "bundle").rename(tmp_path / "first")
    shutil.copy(tmp_path / "first/manifest.json", base)
    make(tmp_path, signer, {"a": b"a" * 2500, "c": b"c"}, str(base))
    assert len(list((tmp_path / "bundle/blobs").glob("*/*"))) == 1
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert [item["path"] for item in manifest["files"]] == ["files/a", "files/c"]
    with pytest.raises(Problem, match="is no manifest of a bundle"):
        make(tmp_path, signer, {}, __file__)


def test_a_file_that_the_hub_hashes_by_git_is_left_out_too(tmp_path: Path, signer: Signer) -> None:
    make(tmp_path, signer, {"a": b"a"})
    base = tmp_path / "first.json"
    (tmp_path / "bundle/manifest.json").rename(base)
    shutil.rmtree(tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle", signer, lambda _text: None, {})
    bundle.begin(str(base))
    wanted = Wanted("a", 1, "git sha1", hashlib.sha1(b"blob 1\0a").hexdigest())
    bundle.plan_files([Wish("files/a", wanted, DirectoryOpener(tmp_path / "source"), "a")])
    bundle.fetch()
    assert bundle.files == json.loads(base.read_text())["files"]
    assert not list((tmp_path / "bundle").glob("blobs/*/*"))


def test_a_wrong_file_is_not_taken(tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ansible_collections.glm.fleet.plugins.plugin_utils.bundle.ATTEMPTS", 1)
    bundle, _ = make(tmp_path, signer, {})
    (tmp_path / "source/x").write_bytes(b"x")
    bundle.plan_files([wish(tmp_path / "source", "files/x", "x", "0" * 64)])
    with pytest.raises(Problem, match=r"files/x: expected sha256 0000.*; run it again to go on from here"):
        bundle.fetch()
    assert not bundle.store.has("0" * 64, 1)


def test_a_disk_that_is_too_small_is_named_first(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 5 << 20))
    with pytest.raises(Problem, match=r"glm_bundle_dir: 1.1 GB are needed in .*, and 5.2 MB are free: free some"):
        make(tmp_path, signer, {"a": b"a"})
    assert not list((tmp_path / "bundle").glob("blobs/*"))


def test_the_signature_counts_by_the_given_key_alone(tmp_path: Path, signer: Signer) -> None:
    bundle, _ = make(tmp_path, signer, {"a": b"a"})
    directory, key = tmp_path / "bundle", bundle.public.decode()
    manifest, sha256 = bundle_info.read(directory, key)
    assert sha256 == hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    assert bundle_info.problems(manifest, directory, tmp_path / "mirror") == []
    with tempfile.TemporaryDirectory(prefix="glm-") as other:
        stranger = Signer(Path(other) / "gnupg")
        foreign = stranger.prepare().decode()
        stranger.end()
    with pytest.raises(bundle_info.Problem, match="is not by the key in glm_mirror_key_file"):
        bundle_info.read(directory, foreign)
    with pytest.raises(bundle_info.Problem, match="holds no public key"):
        bundle_info.read(directory, "hello")
    with (directory / "manifest.json").open("a") as file:
        file.write(" ")
    with pytest.raises(bundle_info.Problem, match="is not by the key"):
        bundle_info.read(directory, key)
    (directory / "manifest.json.asc").unlink()
    with pytest.raises(bundle_info.Problem, match=r"manifest.json.asc is not there: set it to the bundle's directory"):
        bundle_info.read(directory, key)


def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs mirror-import over the bundle."""
    text = (tmp_path / "bundle/manifest.json").read_bytes()
    config = {
        "bundle": str(tmp_path / "bundle"),
        "directory": str(tmp_path / "mirror"),
        "keep": 1,
        "manifest_sha256": hashlib.sha256(text).hexdigest(),
    }
    (tmp_path / "mirror.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["mirror-import", str(tmp_path / "mirror.json")])
    monkeypatch.setattr(mirror_import.signal, "signal", lambda *_: None)
    monkeypatch.setattr(mirror_import, "Store", lambda path: Store(path, part=1000))
    code = mirror_import.main()
    return code, capsys.readouterr().err


def test_the_mirror_goes_over_to_a_bundle_at_once_and_keeps_what_they_share(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    current = tmp_path / "mirror/current"
    make(tmp_path, signer, {"a": b"a" * 2500, "b": b"b"})
    assert bring(tmp_path, monkeypatch, capsys)[0] == 0
    assert (current / "files/a").read_bytes() == b"a" * 2500
    first, inode = current.resolve(), (current / "files/a").stat().st_ino
    make(tmp_path, signer, {"a": b"a" * 2500, "c": b"c"})
    assert bring(tmp_path, monkeypatch, capsys)[0] == 0
    assert sorted(path.name for path in (current / "files").iterdir()) == ["a", "c"]
    assert (current / "files/a").stat().st_ino == inode
    assert not first.exists()
    assert json.loads((current / "bundle.json").read_text())["driver_branch"] == 570


def test_a_damaged_part_is_named_and_nothing_goes_over(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, signer, {"a": b"a" * 2500})
    part = next((tmp_path / "bundle/blobs").glob("*/*.001"))
    part.write_bytes(b"b" * 1000)
    code, said = bring(tmp_path, monkeypatch, capsys)
    assert code == 1
    assert "files/a of the bundle is damaged: bring " in said
    assert str(part) in said
    assert not (tmp_path / "mirror/current").exists()
    part.write_bytes(b"a" * 999)
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    store = Store(tmp_path / "bundle", part=1000)
    assert bundle_info.missing(manifest["files"], store, tmp_path / "mirror") == ([part], 2500)


def test_a_manifest_that_was_not_checked_is_not_taken(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, signer, {"a": b"a"})
    original = mirror_import.hashlib.sha256
    text = (tmp_path / "bundle/manifest.json").read_bytes()
    (tmp_path / "bundle/manifest.json").write_bytes(text + b" ")
    monkeypatch.setattr(sys, "argv", ["mirror-import", str(tmp_path / "mirror.json")])
    monkeypatch.setattr(mirror_import.signal, "signal", lambda *_: None)
    (tmp_path / "mirror.json").write_text(
        json.dumps({
            "bundle": str(tmp_path / "bundle"), "directory": str(tmp_path / "mirror"), "keep": 1,
            "manifest_sha256": original(text).hexdigest(),
        })
    )  # fmt: skip
    assert mirror_import.main() == 1
    assert "is another one by now: run mirror.yml again" in capsys.readouterr().err


def test_apt_takes_what_the_bundle_indexes(tmp_path: Path, signer: Signer) -> None:
    """A package of our own, through a repository of each layout, to apt itself with the bundle's key."""
    bundle, _ = make(tmp_path, signer, {})
    root = apt_closure.Root(tmp_path / "apt/made", "debian13", {})
    root.prepare({})
    archive = root.archives / "tried_1_amd64.deb"
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: tried\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@localhost>\nDescription: x\n"
    )
    subprocess.run(["dpkg-deb", "--build", tree, archive], check=True, capture_output=True)
    package = apt_closure.Package("http://a.test/tried_1_amd64.deb", archive.name, archive.stat().st_size)
    flat = Repository("", "apt/flat", "/", "", "apt/flat/key.asc", "", "", "")
    dists = Repository("", "apt/dists", "noble", "stable", "apt/dists/gpg", "", "", "")
    for repository in (flat, dists):
        bundle.closures = [(root, [repository], ["tried"], [package])]
        bundle.add_repositories()
    site = tmp_path / "site"
    for item in bundle.files:
        place = site / item["path"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"".join(bundle.store.read(item["sha256"], item["size"])))
    for suite, path in (("/", "flat"), ("noble\nComponents: stable", "dists")):
        reader = apt_closure.Root(tmp_path / f"apt/{path}", "debian13", {})
        key = "key.asc" if path == "flat" else "gpg"
        reader.prepare(
            {"x.sources": f"Types: deb\nURIs: file:{site}/apt/{path}/\nSuites: {suite}\n"
                          f"Signed-By: {site}/apt/{path}/{key}\n"}
        )  # fmt: skip
        reader.update()
        assert [each.name for each in reader.closure(["tried"])] == ["tried_1_amd64.deb"]
    with pytest.raises(apt_closure.Problem, match="debian13: Unable to locate package absent"):
        reader.closure(["absent"])


def test_what_was_downloaded_before_is_in_the_next_bundle_too(tmp_path: Path) -> None:
    """apt leaves out of its plan what lies in its cache."""
    site = tmp_path / "site"
    site.mkdir()
    for name, depends in (("one", "two"), ("two", "")):
        tree = tmp_path / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@localhost>\nDescription: x\n"
            + (f"Depends: {depends}\n" if depends else "")
        )
        subprocess.run(["dpkg-deb", "--build", tree, site / f"{name}_1_amd64.deb"], check=True, capture_output=True)
    with (site / "Packages").open("wb") as index:
        subprocess.run(["apt-ftparchive", "packages", "."], cwd=site, stdout=index, check=True)
    root = apt_closure.Root(tmp_path / "apt with a blank", "debian13", {})
    root.prepare({"x.list": f"deb [trusted=yes] file:{site} ./\n"})
    root.update()
    first = root.closure(["one"])
    assert {package.name for package in first} == {"one_1_amd64.deb", "two_1_amd64.deb"}
    for package in first:
        shutil.copy(site / package.name, root.archives)
    assert root.closure(["one"]) == first
    assert root.known(["two", "three"]) == ["two"]


def test_one_content_under_two_names_is_fetched_once(tmp_path: Path, signer: Signer) -> None:
    _, made = make(tmp_path, signer, {"a": b"same", "b": b"same"})
    assert made["files"] == 2
    assert len(list((tmp_path / "bundle/blobs").glob("*/*"))) == 1


def test_what_lies_half_fetched_is_not_needed_again(tmp_path: Path, signer: Signer) -> None:
    bundle, _ = make(tmp_path, signer, {})
    (tmp_path / "source/x").write_bytes(b"x" * 900)
    wanted = wish(tmp_path / "source", "files/x", "x")
    (bundle.store.incoming / wanted.wanted.digest).write_bytes(b"x" * 899)
    bundle.plan_files([wanted])
    assert bundle.needed() == 1


def test_another_key_is_not_made_in_place_of_one_that_a_site_knows(tmp_path: Path, signer: Signer) -> None:
    key = tmp_path / "mirror.asc"
    key.write_text("of another directory")
    lost = Signer(tmp_path / "gnupg")
    try:
        bundle = Bundle(tmp_path / "bundle", lost, lambda _text: None, {})
        with pytest.raises(Problem, match="and its secret key is not in"):
            bundle.begin("", key)
        assert not lost.home.exists()
        bundle.begin("", None, check=True)
        assert not lost.home.exists()
    finally:
        lost.end()
    other = Bundle(tmp_path / "bundle", signer, lambda _text: None, {})
    with pytest.raises(Problem, match="is not of the key in"):
        other.begin("", key)


def test_distributions_share_a_repository(tmp_path: Path, signer: Signer) -> None:
    """The toolkit's is one for all: its index has what each of them takes."""
    bundle, _ = make(tmp_path, signer, {})
    shared = Repository("http://t.test", "apt/toolkit", "/", "", "apt/toolkit/gpgkey", "", "", "")
    for name in ("debian13", "ubuntu2404"):
        root = apt_closure.Root(tmp_path / name, name, {})
        root.prepare({})
        tree = tmp_path / f"tree-{name}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: for-{name}\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@localhost>\nDescription: x\n"
        )
        archive = root.archives / f"for-{name}_1_amd64.deb"
        subprocess.run(["dpkg-deb", "--build", tree, archive], check=True, capture_output=True)
        package = apt_closure.Package(f"http://t.test/{archive.name}", archive.name, archive.stat().st_size)
        bundle.closures.append((root, [shared], [], [package]))
    bundle.add_repositories()
    (index,) = [item for item in bundle.files if item["path"] == "apt/toolkit/Packages"]
    text = b"".join(bundle.store.read(index["sha256"], index["size"])).decode()
    assert "Package: for-debian13" in text
    assert "Package: for-ubuntu2404" in text


def test_no_key_of_an_inventory_is_in_the_collection(tmp_path: Path) -> None:
    """It goes to the site, and to whoever installs the collection."""
    project = tmp_path / "project"
    (project / "inventory/site/keys/mirror-gnupg").mkdir(parents=True)
    shutil.copy(ROOT / "galaxy.yml", project)
    (project / "README.md").write_text("x")
    (project / "LICENSE").write_text("x")
    for name in ("hosts.yml", "keys/api-keys.txt", "keys/mirror-gnupg/secret.key"):
        (project / "inventory/site" / name).write_text("secret")
    command = [
        sys.executable,
        "-m",
        "ansible",
        "galaxy",
        "collection",
        "build",
        "--output-path",
        str(tmp_path),
        str(project),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "glm-fleet-0.1.0.tar.gz") as packed:
        names = packed.getnames()
    assert "inventory/site/hosts.yml" in names
    assert not [name for name in names if "keys" in name]


def test_a_project_that_no_bundle_can_be_made_of(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"has no galaxy.yml: make the bundle from a clone"):
        action.check_project(tmp_path / "bundle", tmp_path)
    with pytest.raises(Problem, match="is within this project, which is in the bundle"):
        action.check_project(ROOT / "bundle", ROOT)


# --- what the mirror serves, and to whom ---------------------------------------------------------------------


def test_the_hubs_answers_give_the_manifest_that_they_were_made_of() -> None:
    files = [
        {"path": "model.safetensors", "size": 5, "sha256": "a" * 64, "git_sha1": None},
        {"path": "config.json", "size": 2, "sha256": None, "git_sha1": "b" * 40},
    ]
    manifest = {"repo": "a/b", "revision": "1" * 40, "files": sorted(files, key=lambda item: str(item["path"]))}
    answers = dict(action.hub_answers(manifest, "main"))
    assert answers[f"api/models/a/b/revision/{'1' * 40}"]["sha"] == "1" * 40
    assert answers["api/models/a/b/revision/main"]["sha"] == "1" * 40
    built = hub_manifest.build_manifest("a/b", "1" * 40, answers[f"api/models/a/b/tree/{'1' * 40}"])
    assert built["files"] == manifest["files"]


def test_an_image_of_another_registry_is_refused() -> None:
    image = {"registry": "ghcr.io", "repository": "ghcr.io/a/b", "blobs": []}
    with pytest.raises(
        Problem, match=r"Docker asks a mirror for Docker Hub's images alone, and ghcr.io/a/b is of ghcr"
    ):
        list(action.image_wishes(image))


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (FACTS, "ubuntu2404"),
        ({"distribution": "Debian", "distribution_version": "13.1", "distribution_major_version": "13"}, "debian13"),
    ],
)
def test_a_distribution_by_nvidias_names(facts: dict[str, Any], name: str) -> None:
    assert bundle_name(facts) == name


@pytest.mark.parametrize(
    ("offer", "facts", "wanted", "said"),
    [
        ({}, {}, {}, ""),
        ({}, {"distribution_version": "22.04"}, {}, "is for ubuntu2404, and this host is ubuntu2204: add it to"),
        ({}, {"architecture": "aarch64"}, {}, "is for x86_64, and this host is aarch64"),
        ({}, {}, {"driver_branch": 580}, "has driver branch 570, and glm_driver_branch is 580: set it to that of"),
        ({"driver_branch": None}, {}, {}, "has no driver, and glm_driver_branch is 570"),
        ({"driver_branch": None}, {}, {"driver": False}, ""),
        ({}, {}, {"docker_source": "distribution"}, "was made with glm_docker_source: docker, and it is distribution"),
    ],
)
def test_a_bundle_for_something_else(
    offer: dict[str, Any], facts: dict[str, Any], wanted: dict[str, Any], said: str
) -> None:
    found = bundle_findings({**OFFER, **offer}, {**FACTS, **facts}, {**WANTED, **wanted})
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_a_mirror_without_a_bundle() -> None:
    assert "http://mirror:8080 has no bundle: set it to" in bundle_findings({}, FACTS, WANTED)[0]


def test_settings_of_a_mirror(tmp_path: Path) -> None:
    key = tmp_path / "mirror.asc"
    assert mirror_problems("", str(key)) == []
    assert "there is no file" in mirror_problems("http://mirror:8080", str(key))[0]
    key.write_text("")
    assert mirror_problems("http://mirror:8080", str(key)) == []
    assert "is no address of a mirror" in mirror_problems("http://mirror:8080/apt", str(key))[0]
