#!/usr/bin/python
"""Resolve a container image to its digest, and read what it says about itself, without pulling it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_digest
short_description: Resolve a container image to its digest
description:
  - Asks the image's registry for the manifest and the configuration. Nothing is pulled.
  - The digest is that of the index where the image has one, which is what C(docker pull NAME@DIGEST) takes.
  - A reference with a tag and a digest is refused where the tag has moved to another digest.
  - Reads only; runs the same in check mode.
options:
  ref:
    description: C(NAME), C(NAME:TAG), C(NAME@sha256:...) or C(NAME:TAG@sha256:...), as for C(docker pull).
    type: str
    required: true
  mirror:
    description: Address of a mirror of Docker Hub that is asked in its place. Empty for none.
    type: str
    default: ''
  ca:
    description: Certificates of a private authority, as PEM, to be trusted beside the system's.
    type: str
    default: ""
  platform:
    description: Which image of an index to read.
    type: str
    default: linux/amd64
  timeout:
    description: Seconds to wait for each answer.
    type: int
    default: 20
  retries:
    description: How often a request is repeated after 5xx or a failed connection.
    type: int
    default: 2
  fail_on_error:
    description: If false, a failure is returned as RV(error) and the task succeeds.
    type: bool
    default: true
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Resolve the engine's image
  glm.fleet.image_digest:
    ref: vllm/vllm-openai:glm52-cu129
  register: engine
"""

RETURN = r"""
image:
  description: The image; empty after an error.
  returned: always
  type: dict
  contains:
    ref: {description: The reference as given., type: str}
    registry: {description: The registry., type: str, sample: docker.io}
    repository: {description: The name without tag and digest., type: str, sample: vllm/vllm-openai}
    path: {description: The repository's name in the registry., type: str, sample: vllm/vllm-openai}
    api: {description: 'Address of the registry, or of its mirror.', type: str, sample: "https://registry-1.docker.io"}
    tag: {description: 'The tag, empty if only a digest was given.', type: str}
    digest: {description: Digest of the index or manifest., type: str}
    pull_ref: {description: What to pull., type: str, sample: "vllm/vllm-openai@sha256:..."}
    config_env: {description: Environment of the image., type: dict}
    labels: {description: Labels of the image., type: dict}
    cuda: {description: 'CUDA release inside of the image, or null.', type: str, sample: "12.9"}
    size_bytes: {description: Bytes to download., type: int}
    entrypoint: {description: Entry point of the image., type: list, elements: str}
    manifests:
      description: 'The index, where there is one, and the manifest of the platform, as the registry sent them.'
      type: list
      elements: dict
      contains:
        digest: {description: Digest of the content., type: str}
        media_type: {description: Its Content-Type., type: str}
        content: {description: 'The text, byte by byte.', type: str}
    blobs:
      description: 'The configuration and the layers, each once.'
      type: list
      elements: dict
      contains:
        digest: {description: Digest of the blob., type: str}
        size: {description: Its bytes., type: int}
error:
  description: One line on what went wrong and what to do; empty if nothing did.
  returned: always
  type: str
"""

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.glm.fleet.plugins.module_utils.authority import ca_path

DOCKER_HUB = "docker.io"
DOCKER_HUB_API = "https://registry-1.docker.io"
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
REFERENCE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._/:-]*?)(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
OTHER_MIRROR = "set glm_registry_mirror to another mirror"
LARGEST = 16 << 20  # of a manifest or a configuration


class Problem(Exception):
    """Why the image cannot be resolved, in one line."""


class Reference:
    """A reference, taken apart as Docker does it."""

    def __init__(self, ref: str) -> None:
        found = REFERENCE.fullmatch(ref)
        if not found:
            raise Problem(f"{ref!r} is no image reference: write NAME:TAG or NAME@sha256:DIGEST")
        name, self.digest = found["name"], found["digest"] or ""
        first, _slash, rest = name.partition("/")
        has_host = bool(rest) and ("." in first or ":" in first or first == "localhost")
        self.registry = first if has_host else DOCKER_HUB
        self.path = rest if has_host else name
        if self.registry == DOCKER_HUB and "/" not in self.path:
            self.path = f"library/{self.path}"
        self.repository = name
        self.tag = found["tag"] or ("" if self.digest else "latest")
        if ":" in self.path:
            raise Problem(f"{ref!r} is no image reference: write NAME:TAG or NAME@sha256:DIGEST")


class Manifest(NamedTuple):
    """A manifest or an index, as the registry sent it."""

    digest: str
    media_type: str
    content: str
    parsed: dict[str, Any]

    def as_dict(self) -> dict[str, str]:
        return {"digest": self.digest, "media_type": self.media_type, "content": self.content}


class Registry:
    """Read access to one repository over the registry's HTTP API."""

    def __init__(
        self, reference: Reference, mirror: str, timeout: int, retries: int, ca_path: str | None = None
    ) -> None:
        self.path, self.timeout, self.retries, self.ca_path = reference.path, timeout, retries, ca_path
        if reference.registry == DOCKER_HUB:
            self.base = (mirror or DOCKER_HUB_API).rstrip("/")
            if "://" not in self.base:
                self.base = f"https://{self.base}"
        else:
            self.base = f"https://{reference.registry}"
        self.name = f"registry mirror {self.base}" if mirror and reference.registry == DOCKER_HUB else f"{self.base}"
        self.token = ""

    def manifest(self, which: str) -> Manifest:
        """The manifest or index of a tag or digest."""
        body, headers = self._get(f"manifests/{which}", ", ".join(INDEX_TYPES + MANIFEST_TYPES))
        digest = sha256(body)
        claimed = which if which.startswith("sha256:") else headers.get("Docker-Content-Digest", digest)
        if claimed != digest:
            raise Problem(
                f"{self.name} sent a manifest of {self.path} with the digest {digest}, not {claimed}: "
                f"it is damaged or was tampered with: {OTHER_MIRROR}"
            )
        parsed = parse(body, self.name)
        kind = parsed.get("mediaType") or headers.get("Content-Type", "").partition(";")[0].strip()
        return Manifest(digest, kind, body.decode(), parsed)

    def blob(self, digest: str) -> dict[str, Any]:
        body, _headers = self._get(f"blobs/{digest}", "*/*")
        if sha256(body) != digest:
            raise Problem(
                f"{self.name} sent a configuration of {self.path} with another digest than {digest}: "
                f"it is damaged or was tampered with: {OTHER_MIRROR}"
            )
        return parse(body, self.name)

    def _get(self, what: str, accept: str) -> tuple[bytes, Any]:
        url = f"{self.base}/v2/{self.path}/{what}"
        try:
            return self._fetch(url, accept)
        except urllib.error.HTTPError as answer:
            challenge = answer.headers.get("WWW-Authenticate", "")
            if answer.code != 401 or not challenge.lower().startswith("bearer ") or self.token:
                raise Problem(self._explain(answer, what)) from None
        try:
            self.token = self._authorise(challenge)
            return self._fetch(url, accept)
        except urllib.error.HTTPError as answer:
            raise Problem(self._explain(answer, what)) from None

    def _authorise(self, challenge: str) -> str:
        """An anonymous token, as the registry's answer says where to get it."""
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = {"service": fields.get("service", ""), "scope": f"repository:{self.path}:pull"}
        body, _headers = self._fetch(f"{fields.get('realm', '')}?{urllib.parse.urlencode(query)}", "application/json")
        answer = parse(body, self.name)
        return str(answer.get("token") or answer.get("access_token") or "")

    def _fetch(self, url: str, accept: str) -> tuple[bytes, Any]:
        headers = {"Accept": accept}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                with open_url(
                    url,
                    headers=headers,
                    # Not to be sent on to the store that a blob's address redirects to: that one would refuse it.
                    unredirected_headers=["Authorization"],
                    use_netrc=False,
                    ca_path=self.ca_path,
                    timeout=self.timeout,
                    http_agent="glm-fleet",
                ) as answer:
                    return answer.read(LARGEST), answer.headers
            except urllib.error.HTTPError as answer:
                if answer.code < 500 or last:
                    raise
            except (OSError, http.client.HTTPException, ValueError) as problem:
                if last or isinstance(problem, ValueError):
                    reason = getattr(problem, "reason", problem)
                    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
                    raise Problem(
                        f"{self.name} cannot be reached ({text}): open the way from the node, or {OTHER_MIRROR}"
                    ) from None
            time.sleep(attempt + 1)
        raise AssertionError("unreachable")

    def _explain(self, answer: urllib.error.HTTPError, what: str) -> str:
        asked = what.partition("/")[2]
        image = f"{self.path}@{asked}" if asked.startswith("sha256:") else f"{self.path}:{asked}"
        if answer.code == 404:
            return f"{self.name} has no {image} (404): set glm_image to one that it has"
        if answer.code in (401, 403):
            return (
                f"{self.name} refuses {image} ({answer.code}): it does not exist there, or needs a "
                "login: set glm_image to one that it has, or glm_registry_mirror to a mirror that needs none"
            )
        if answer.code == 429:
            return f"{self.name} answers 429, too many requests: try later, or set glm_registry_mirror"
        return f"{self.name} answers {answer.code} for {image}: try later, or {OTHER_MIRROR}"


def sha256(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def parse(body: bytes, source: str) -> dict[str, Any]:
    try:
        data = json.loads(body.decode())
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise Problem(f"{source} does not answer as a registry does: check glm_registry_mirror and glm_image")
    return data


def select(index: dict[str, Any], platform: str, name: str) -> str:
    """Digest of the image for `platform`; a variant (arm64/v8) is not asked for."""
    offered: dict[str, str] = {}
    for entry in index.get("manifests", []):
        of = entry.get("platform", {})
        offered.setdefault(f"{of.get('os')}/{of.get('architecture')}", entry["digest"])
    if platform not in offered:
        raise Problem(
            f"{name} has no image for {platform}, only for "
            f"{', '.join(sorted(key for key in offered if 'unknown' not in key)) or 'nothing'}: "
            "set glm_image to one for it"
        )
    return offered[platform]


def cuda_release(env: dict[str, str], labels: dict[str, str]) -> str | None:
    text = env.get("CUDA_VERSION") or labels.get("com.nvidia.cuda.version") or ""
    found = re.match(r"\d+\.\d+", text)
    return found.group() if found else None


def resolve(
    ref: str, mirror: str, platform: str, timeout: int, retries: int, *, ca_path: str | None = None
) -> dict[str, Any]:
    reference = Reference(ref)
    registry = Registry(reference, mirror, timeout, retries, ca_path)
    top = registry.manifest(reference.tag or reference.digest)
    manifests, digest = [top], top.digest
    if reference.digest and digest != reference.digest:
        raise Problem(
            f"{reference.repository}:{reference.tag} is {digest} by now, not {reference.digest} as pinned: "
            f"write {reference.repository}@{reference.digest} to stay with that one, or pin the new one"
        )
    if "manifests" in top.parsed:
        manifests.append(registry.manifest(select(top.parsed, platform, ref)))
    manifest = manifests[-1].parsed
    strange = [each.media_type for each in manifests if each.media_type not in INDEX_TYPES + MANIFEST_TYPES]
    if strange or "config" not in manifest or "layers" not in manifest:
        kind = next(iter(strange), "") or manifest.get("mediaType", "schema 1")
        raise Problem(f"{ref} has a manifest of a kind that is not supported ({kind}): set glm_image to another build")
    config = registry.blob(manifest["config"]["digest"]).get("config") or {}
    env = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
    labels = config.get("Labels") or {}
    sizes = {str(blob["digest"]): int(blob["size"]) for blob in (manifest["config"], *manifest["layers"])}
    other = next((blob for blob in sizes if not re.fullmatch(r"sha256:[0-9a-f]{64}", blob)), None)
    if other:
        raise Problem(f"{ref} has a blob without a sha256 ({other}): set glm_image to another build")
    return {
        "ref": ref, "registry": reference.registry, "repository": reference.repository, "tag": reference.tag,
        "path": reference.path, "api": registry.base,
        "digest": digest, "pull_ref": f"{reference.repository}@{digest}", "config_env": env, "labels": labels,
        "cuda": cuda_release(env, labels), "entrypoint": config.get("Entrypoint") or [],
        "size_bytes": sum(layer["size"] for layer in manifest["layers"]),
        "manifests": [each.as_dict() for each in manifests],
        "blobs": [{"digest": blob, "size": size} for blob, size in sizes.items()],
    }  # fmt: skip


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "ref": {"type": "str", "required": True},
            "mirror": {"type": "str", "default": ""},
            "ca": {"type": "str", "default": ""},
            "platform": {"type": "str", "default": "linux/amd64"},
            "timeout": {"type": "int", "default": 20},
            "retries": {"type": "int", "default": 2},
            "fail_on_error": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    fail, certificates = module.params.pop("fail_on_error"), module.params.pop("ca")
    try:
        with ca_path(certificates) as path:
            image, error = resolve(**module.params, ca_path=path), ""
    except Problem as problem:
        image, error = {}, str(problem)
    if error and fail:
        module.fail_json(msg=error, error=error, image={})
    module.exit_json(changed=False, error=error, image=image)


if __name__ == "__main__":
    main()
