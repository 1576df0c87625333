#!/usr/bin/python
"""List the files of one revision of a model, with their sizes and hashes, from a Hugging Face hub."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hub_manifest
short_description: List the files of a model revision with sizes and hashes
description:
  - Asks a Hugging Face hub (or a mirror with the same API) which files a revision of a model has.
  - A branch or tag is resolved to its commit, so that the whole fleet gets the same files.
  - Reads only; runs the same in check mode.
options:
  endpoint:
    description: Address of the hub.
    type: str
    default: https://huggingface.co
  repo:
    description: Model repository, C(organisation/name).
    type: str
    required: true
  revision:
    description: Commit, tag or branch.
    type: str
    required: true
  ca:
    description: Certificates of a private authority, as PEM, to be trusted beside the system's.
    type: str
    default: ""
  token:
    description: Access token; empty for none.
    type: str
    default: ''
  suffixes:
    description:
      - More suffixes of files that the revision may have, such as C(.py). Those that hold weights, settings, texts or
        pictures are known; any other file may hold code that an engine would run.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait for each answer.
    type: int
    default: 20
  retries:
    description: How often a request is repeated after 429, 5xx or a failed connection.
    type: int
    default: 2
  fail_on_error:
    description: If false, a failure is returned as RV(error) and the task succeeds.
    type: bool
    default: true
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: List the checkpoint's files
  glm.fleet.hub_manifest:
    repo: zai-org/GLM-5.2-FP8
    revision: 31cba24fb749908a485082bdeed6eb1ac6cffc2f
"""

RETURN = r"""
manifest:
  description: The revision's files; empty after an error.
  returned: always
  type: dict
  contains:
    repo: {description: Repository., type: str}
    revision: {description: 'Commit, 40 hex digits.', type: str}
    files: {description: "Each with path, size, sha256 (large files) or git_sha1 (the others).", type: list}
    total_bytes: {description: Sum of the sizes., type: int}
    context_length: {description: Tokens that the model takes by its config.json; null if that does not say., type: int}
    sha256: {description: Hash of the sorted listing; the same wherever the files are the same., type: str}
error:
  description: One line that says what is wrong and what to do; empty if all is well.
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
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.glm.fleet.plugins.module_utils.authority import ca_path

# What cannot hold code, by its suffix; a file without one is a text such as LICENSE.
HARMLESS = {
    *("", ".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".yaml", ".yml"),
    *(".txt", ".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"),
}
# A longer Retry-After is reported instead of waited for: the user decides.
LONGEST_WAIT = 30
ANONYMOUS_HINT = "set glm_hf_token_file to a file with a token that may read it, or check the name in glm_model"


class HubError(Exception):
    """A failure in one line, for the user."""


class Hub:
    """The two calls of the hub's HTTP API that a manifest needs."""

    def __init__(
        self,
        endpoint: str,
        token: str = "",
        timeout: float = 20,
        retries: int = 2,
        ca_path: str | None = None,
        *,
        suffixes: Iterable[str] = (),
    ) -> None:
        self.suffixes = suffixes
        self.endpoint = endpoint.rstrip("/")
        self.token = token
        self.timeout = timeout
        self.retries = retries
        self.ca_path = ca_path

    def get(self, url: str) -> tuple[Any, str]:
        """The JSON at url and the address of the next page ('' on the last one)."""
        for attempt in range(self.retries + 1):
            try:
                return self._get_once(url)
            except urllib.error.HTTPError as exc:
                # 408 and 425 are rare, and as temporary as 429.
                if exc.code < 500 and exc.code not in (408, 425, 429):
                    raise
                wait = retry_after(exc)
                if attempt == self.retries or wait > LONGEST_WAIT:
                    raise
                time.sleep(wait or 2**attempt)
            except (OSError, http.client.HTTPException):
                if attempt == self.retries:
                    raise
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    def _get_once(self, url: str) -> tuple[Any, str]:
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        with open_url(
            url,
            headers=headers,
            unredirected_headers=["Authorization"],  # a redirect to another host must not carry the token
            use_netrc=False,
            ca_path=self.ca_path,
            timeout=self.timeout,
            http_agent="glm-fleet",
        ) as response:
            body = json.load(response)
            link = re.search(r'<([^>]+)>;\s*rel="?next"?', response.headers.get("Link", ""))
            following = urllib.parse.urljoin(url, link.group(1)) if link else ""
        # The token goes to the hub alone.
        if following and urllib.parse.urlsplit(following).netloc != urllib.parse.urlsplit(url).netloc:
            raise HubError(
                f"the hub at {self.endpoint} sends its file list on to another host ({following}): "
                "set glm_hf_endpoint to a hub that does not"
            )
        return body, following

    def revision_url(self, repo: str, revision: str) -> str:
        return f"{self.endpoint}/api/models/{repo}/revision/{urllib.parse.quote(revision, safe='')}"

    def manifest(self, repo: str, revision: str) -> dict[str, Any]:
        """The files of a revision."""
        if not self.endpoint.startswith(("http://", "https://")):
            raise HubError(f"glm_hf_endpoint: {self.endpoint} is no http address, such as https://huggingface.co")
        try:
            commit = str(self.get(self.revision_url(repo, revision))[0]["sha"])
            if not re.fullmatch(r"[0-9a-f]{40}", commit):
                raise HubError(
                    f"the hub at {self.endpoint} names no commit for revision {revision} of {repo}: "
                    "check glm_hf_endpoint"
                )
            page = f"{self.endpoint}/api/models/{repo}/tree/{commit}?recursive=true&expand=false"
            entries: list[dict[str, Any]] = []
            while page:
                items, page = self.get(page)
                entries += items
            manifest = build_manifest(repo, commit, entries, self.suffixes)
            return {**manifest, "context_length": self.context_length(repo, commit)}
        except urllib.error.HTTPError as exc:
            raise HubError(self.explain(exc, repo, revision)) from exc
        except (KeyError, TypeError, ValueError) as exc:
            raise HubError(
                f"{self.endpoint} does not answer like a Hugging Face hub ({exc!r}): check glm_hf_endpoint"
            ) from exc
        except (OSError, http.client.HTTPException) as exc:
            reason = getattr(exc, "reason", None) or exc
            raise HubError(
                f"the hub at {self.endpoint} cannot be reached ({reason}): check the network, or set"
                " glm_hf_endpoint to a mirror"
            ) from exc

    def context_length(self, repo: str, commit: str) -> int | None:
        """None where the hub does not show it: the engine finds out by itself then."""
        try:
            config = self.get(f"{self.endpoint}/{repo}/resolve/{commit}/config.json")[0]
            text = config.get("text_config") or config  # within it where the model reads more than text
            return int(text["max_position_embeddings"])
        except (HubError, OSError, http.client.HTTPException, LookupError, TypeError, ValueError, AttributeError):
            return None

    def explain(self, exc: urllib.error.HTTPError, repo: str, revision: str) -> str:
        """What an HTTP error of the hub means for the user."""
        said = f"the hub at {self.endpoint} answers {exc.code}"
        if exc.code in (401, 403):
            hint = "the token in glm_hf_token_file may not read it, or check glm_model"
            return f"{said} for {repo}: {hint if self.token else ANONYMOUS_HINT}"
        if exc.code == 404 and self.has_repo(exc, repo):
            return f"{said}: {repo} has no revision {revision}: set glm_model_revision to a commit of the model"
        if exc.code == 404:
            return f"{said}: there is no model {repo}, or it is private: {ANONYMOUS_HINT}"
        if exc.code == 429:
            wait = retry_after(exc)
            when = f"in {wait} s" if wait else "in a few minutes"
            return f"{said} (too many requests): try again {when}, or set glm_hf_token_file for a higher limit"
        what = f"{said} ({exc.reason}) for revision {revision} of {repo}"
        return f"{what}: {'try again later, or set' if exc.code >= 500 else 'check'} glm_hf_endpoint"

    def has_repo(self, exc: urllib.error.HTTPError, repo: str) -> bool:
        """Whether a 404 is about the revision: by the hub's error code, else by asking for the repository."""
        code = exc.headers.get("X-Error-Code", "")
        if code:
            return code == "RevisionNotFound"
        try:
            self.get(f"{self.endpoint}/api/models/{repo}")
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True


def retry_after(exc: urllib.error.HTTPError) -> int:
    """Seconds that the hub asks to wait; 0 if it does not say."""
    value = exc.headers.get("Retry-After", "")
    if not value:
        # The hub's own header, as in: ratelimit: "api";r=0;t=55
        limit = re.search(r"\bt=(\d+)", exc.headers.get("RateLimit", "") if exc.code == 429 else "")
        value = limit.group(1) if limit else ""
    return int(value) if value.isdigit() else 0


def build_manifest(
    repo: str, commit: str, entries: list[dict[str, Any]], suffixes: Iterable[str] = ()
) -> dict[str, Any]:
    """The hub's tree listing in this project's form."""
    files: list[dict[str, Any]] = []
    unchecked: list[str] = []
    for entry in entries:
        if entry["type"] != "file":
            continue
        path = str(entry["path"])
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise HubError(
                f"the hub lists a file outside of {repo}: {path!r}; nothing is downloaded from it: "
                "check glm_model and glm_hf_endpoint"
            )
        lfs = entry.get("lfs")
        # For a large file the git object is only the pointer: its own hash is the sha256.
        digest = str((lfs or entry).get("oid") or "").removeprefix("sha256:")
        if not re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", digest):
            unchecked.append(path)
        files.append(
            {
                "path": path,
                "size": int(lfs["size"] if lfs else entry["size"]),
                "sha256": digest if lfs else None,
                "git_sha1": None if lfs else digest,
            }
        )
    if unchecked:
        raise HubError(
            f"the hub lists {len(unchecked)} of {len(files)} files of {repo} without a hash to check them by, first "
            f"{unchecked[0]}: set glm_hf_endpoint to a hub or a mirror that lists them"
        )
    if not any(item["path"].endswith(".safetensors") for item in files):
        raise HubError(f"revision {commit} of {repo} has no .safetensors file: check glm_model and glm_model_revision")
    unknown = [item["path"] for item in files if not is_harmless(PurePosixPath(item["path"]), suffixes)]
    if unknown:
        named = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        wanted = json.dumps(sorted({PurePosixPath(path).suffix for path in unknown}))
        raise HubError(
            f"revision {commit} of {repo} has files that may hold code ({named}): look at them, and set "
            f"glm_model_suffixes: {wanted} to take them, or choose another glm_model_revision"
        )
    files.sort(key=lambda item: item["path"])
    canonical = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return {
        "repo": repo,
        "revision": commit,
        "files": files,
        "total_bytes": sum(item["size"] for item in files),
        "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
    }


def is_harmless(path: PurePosixPath, suffixes: Iterable[str]) -> bool:
    return path.suffix.lower() in HARMLESS or path.suffix in suffixes


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "repo": {"type": "str", "required": True},
            "revision": {"type": "str", "required": True},
            "ca": {"type": "str", "default": ""},
            "token": {"type": "str", "default": "", "no_log": True},
            "suffixes": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 20},
            "retries": {"type": "int", "default": 2},
            "fail_on_error": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    with ca_path(params["ca"]) as path:
        hub = Hub(
            params["endpoint"], params["token"], params["timeout"], params["retries"], path, suffixes=params["suffixes"]
        )
        try:
            manifest, error = hub.manifest(params["repo"], params["revision"]), ""
        except HubError as exc:
            manifest, error = {}, str(exc)
    if error and params["fail_on_error"]:
        module.fail_json(msg=error, manifest={}, error=error)
    module.exit_json(changed=False, manifest=manifest, error=error)


if __name__ == "__main__":
    main()
