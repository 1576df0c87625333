"""Action plugin: make the bundle of a release on the controller."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.exchange import as_wanted
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.registry import BlobOpener
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.systemd import human
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.transfer import UrlOpener, Wanted
from ansible_collections.glm.fleet.plugins.plugin_utils.bundle import Bundle, Problem, Repository, Signer, Wish
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from ansible_collections.glm.fleet.plugins.plugin_utils.journal import show

SPEC = {
    "directory": {"type": "path", "required": True},
    "base": {"type": "path", "default": ""},
    "key_directory": {"type": "path", "required": True},
    "key_file": {"type": "path", "required": True},
    "packages": {"type": "list", "elements": "dict", "required": True},
    "image": {"type": "dict", "required": True},
    "model": {"type": "dict", "required": True},
    "revision": {"type": "str", "required": True},
    "hub": {"type": "str", "required": True},
    "hub_token": {"type": "str", "default": "", "no_log": True},
    "project": {"type": "path", "required": True},
    "description": {"type": "dict", "required": True},
    "environment": {"type": "dict", "default": {}},
}
NAME = "bundle"
DOCKER_HUB = "docker.io"  # as image_digest names it


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=SPEC)
        os.environ.update({name: str(value) for name, value in args["environment"].items()})
        signer = Signer(Path(args["key_directory"]))
        bundle = Bundle(Path(args["directory"]), signer, lambda text: show(NAME, text), args["environment"])
        try:
            return {**result, **make(bundle, args, check=bool(self._task.check_mode))}
        except Problem as problem:
            found = failure("bundle", str(problem), nothing_changed=True)
            return {**result, "failed": True, "msg": str(problem), "failure": found}
        except OSError as problem:
            line = f"{problem.filename or args['directory']}: {problem.strerror}: what was fetched is kept"
            return {**result, "failed": True, "msg": line, "failure": failure("bundle", line, nothing_changed=True)}
        finally:
            bundle.stop.set()
            bundle.end()


def make(bundle: Bundle, args: Mapping[str, Any], *, check: bool) -> dict[str, Any]:
    project, key_file = Path(args["project"]), Path(args["key_file"])
    check_project(bundle.directory, project)
    bundle.begin(args["base"], key_file, check=check)
    for each in args["packages"]:
        repositories = [Repository(**repository) for repository in each["repositories"]]
        bundle.plan_packages(
            each["distribution"], repositories, each["names"], optional=each["optional"], pinning=each["pinning"]
        )
    unknown = sorted(name for each in args["packages"] for name in each["somewhere"] if not bundle.optional.get(name))
    if unknown:
        raise Problem(
            f"glm_bundle_kernels: no source of glm_bundle_apt_sources has {', '.join(dict.fromkeys(unknown))}"
        )
    bundle.plan_files(image_wishes(args["image"]))
    bundle.plan_files(model_wishes(args["model"], args["hub"], args["hub_token"]))
    needed = bundle.insist_on_room()
    show(NAME, f"{human(needed)} to fetch into {bundle.directory}")
    if check:
        return {"changed": needed > 0, "bundle": {"needed_bytes": needed}}
    add_project(bundle, project)
    bundle.fetch()
    bundle.add_repositories()
    for manifest in args["image"]["manifests"]:
        bundle.add(f"images/{manifest['digest'].replace(':', '/')}", manifest["content"].encode())
    for path, answer in hub_answers(args["model"], args["revision"]):
        bundle.add(path, json.dumps(answer).encode())
    made = bundle.finish(args["description"])
    key_file.write_bytes(bundle.public)
    return {"changed": True, "bundle": {**made, "key_file": args["key_file"]}}


def image_wishes(image: Mapping[str, Any]) -> Iterator[Wish]:
    """By digest, as in a directory of the OCI's image layout."""
    if image["registry"] != DOCKER_HUB:
        raise Problem(
            f"glm_image: Docker asks a mirror for Docker Hub's images alone, and {image['repository']} is of "
            f"{image['registry']}: set it to an image of Docker Hub"
        )
    opener = BlobOpener(image["api"], image["path"])
    for blob in image["blobs"]:
        algorithm, _, digest = blob["digest"].partition(":")
        wanted = Wanted(blob["digest"], blob["size"], algorithm, digest)
        yield Wish(f"images/{algorithm}/{digest}", wanted, opener, blob["digest"])


def model_wishes(manifest: Mapping[str, Any], hub: str, token: str) -> Iterator[Wish]:
    """Under the hub's own paths."""
    base = f"{manifest['repo']}/resolve/{manifest['revision']}"
    opener = UrlOpener(f"{hub.rstrip('/')}/{base}", token=token)
    for item in manifest["files"]:
        yield Wish(f"{base}/{item['path']}", as_wanted(item), opener, item["path"])


def hub_answers(manifest: Mapping[str, Any], revision: str) -> Iterator[tuple[str, Any]]:
    """What hub_manifest asks for, as the hub answers it; `revision` is as the user names it."""
    base = f"api/models/{manifest['repo']}"
    for name in dict.fromkeys((manifest["revision"], revision)):
        yield f"{base}/revision/{name}", {"id": manifest["repo"], "sha": manifest["revision"]}
    yield (
        f"{base}/tree/{manifest['revision']}",
        [
            {
                "type": "file",
                "path": item["path"],
                "size": item["size"],
                **({"lfs": {"oid": item["sha256"], "size": item["size"]}} if item["sha256"] else {}),
                **({"oid": item["git_sha1"]} if item["git_sha1"] else {}),
            }
            for item in manifest["files"]
        ],
    )


def check_project(directory: Path, project: Path) -> None:
    if not (project / "galaxy.yml").is_file():
        raise Problem(f"{project} has no galaxy.yml: make the bundle from a clone of this project")
    if importlib.util.find_spec("pip") is None:
        raise Problem(f"{sys.executable} has no pip, which fetches the controller's packages: install it there")
    if directory.resolve().is_relative_to(project.resolve()):
        raise Problem(f"glm_bundle_dir: {directory} is within this project, which is in the bundle: set it elsewhere")


def add_project(bundle: Bundle, project: Path) -> None:
    """What the site's controller needs: this collection, and the Python packages that requirements.txt pins."""
    place = bundle.directory / "incoming/project"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    requirements = str(project / "requirements.txt")
    programs = {
        "pip download": [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps",
                         "--requirement", requirements, "--dest", str(place)],
        "ansible-galaxy collection build": [sys.executable, "-m", "ansible", "galaxy", "collection", "build", "--force",
                                            "--output-path", str(place), str(project)],
    }  # fmt: skip
    for name, command in programs.items():
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise Problem(f"{name} failed: {said[-1] if said else done.returncode}")
    for path in sorted(place.iterdir()):
        if path.name.endswith(".tar.gz") and path.name.startswith("glm-fleet-"):
            with tarfile.open(path) as packed:
                secrets = [name for name in packed.getnames() if "keys" in Path(name).parts]
            if secrets:
                raise Problem(f"the collection would hold {secrets[0]}: see build_ignore of galaxy.yml")
        bundle.add_file(f"controller/{path.name}", path)
