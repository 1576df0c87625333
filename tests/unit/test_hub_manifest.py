"""hub_manifest: the listing, and one clear line for each way in which a hub can refuse."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.modules.hub_manifest import Hub, HubError, build_manifest
from small_hub import REPO, REVISION, SHARDS, TOKEN, SmallHub, model, small_hub


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with small_hub() as server:
        yield server


def error(hub: SmallHub, repo: str = REPO, revision: str = REVISION, token: str = "") -> str:
    with pytest.raises(HubError) as caught:
        Hub(hub.endpoint, token, retries=0).manifest(repo, revision)
    message = str(caught.value)
    assert "\n" not in message
    assert hub.endpoint in message
    return message


def test_lists_sizes_and_hashes(hub: SmallHub) -> None:
    manifest = Hub(hub.endpoint + "/").manifest(REPO, REVISION)
    files = {item["path"]: item for item in manifest["files"]}
    content = model()
    assert set(files) == set(content)
    assert manifest["revision"] == REVISION
    assert manifest["total_bytes"] == sum(map(len, content.values()))
    shard = files[SHARDS[0]]
    assert shard["sha256"] == hashlib.sha256(content[SHARDS[0]]).hexdigest()
    assert shard["git_sha1"] is None
    # As `git hash-object` says.
    assert files["README.md"]["git_sha1"] == "fd616c00a5e7c32803eee94a65538d0216027602"
    assert files["README.md"]["sha256"] is None


def test_reads_the_context_length(hub: SmallHub) -> None:
    assert Hub(hub.endpoint).manifest(REPO, REVISION)["context_length"] == 1048576
    hub.served["config.json"] = b'{"text_config": {"max_position_embeddings": 4096}}'
    assert Hub(hub.endpoint).manifest(REPO, REVISION)["context_length"] == 4096


@pytest.mark.parametrize("config", [b"{}", b"[]", b"no json", b'{"max_position_embeddings": "many"}'])
def test_a_context_length_that_is_not_told_is_no_error(hub: SmallHub, config: bytes) -> None:
    hub.served["config.json"] = config
    assert Hub(hub.endpoint).manifest(REPO, REVISION)["context_length"] is None


def test_follows_pages(hub: SmallHub) -> None:
    whole = Hub(hub.endpoint).manifest(REPO, REVISION)
    hub.page_size = 2
    assert Hub(hub.endpoint).manifest(REPO, REVISION) == whole


def test_resolves_a_branch_to_its_commit(hub: SmallHub) -> None:
    assert Hub(hub.endpoint).manifest(REPO, "main")["revision"] == REVISION


def test_the_listing_hash_depends_on_the_files_alone(hub: SmallHub) -> None:
    hub.revisions["2" * 40] = model()
    hub.revisions["3" * 40] = {**model(), "README.md": b"another\n"}
    first, same, other = (Hub(hub.endpoint).manifest(REPO, digit * 40)["sha256"] for digit in "123")
    assert first == same != other


def test_unauthorized_says_what_to_set(hub: SmallHub) -> None:
    hub.need_token = True
    message = error(hub)
    assert "answers 401" in message
    assert "set glm_hf_token_file" in message
    assert Hub(hub.endpoint, TOKEN).manifest(REPO, REVISION)["files"]


def test_a_refused_token_is_not_shown(hub: SmallHub) -> None:
    hub.need_token = True
    message = error(hub, token="hf_wrong")
    assert "token in glm_hf_token_file may not read it" in message
    assert "hf_wrong" not in message


def test_missing_revision_is_named(hub: SmallHub) -> None:
    message = error(hub, revision="4" * 40)
    assert f"{REPO} has no revision {'4' * 40}" in message
    assert "glm_model_revision" in message


def test_missing_repository_is_named(hub: SmallHub) -> None:
    message = error(hub, repo="zai-org/GLM-9")
    assert "there is no model zai-org/GLM-9" in message
    assert "glm_model" in message


def test_too_many_requests_says_when(hub: SmallHub) -> None:
    hub.faults["/api/"] = (429, {"Retry-After": "120"}, 9)
    assert "try again in 120 s" in error(hub)


def test_a_short_retry_after_is_waited_for(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.faults["/api/"] = (429, {"Retry-After": "7"}, 1)
    assert Hub(hub.endpoint).manifest(REPO, REVISION)["files"]
    assert slept == [7]


def test_a_long_retry_after_is_not_waited_for(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.faults["/api/"] = (429, {"RateLimit": '"api";r=0;t=290'}, 9)
    with pytest.raises(HubError, match="try again in 290 s"):
        Hub(hub.endpoint).manifest(REPO, REVISION)
    assert slept == []


def test_server_errors_are_retried_then_told(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    hub.faults["/api/"] = (503, {}, 2)
    assert Hub(hub.endpoint).manifest(REPO, REVISION)["files"]
    hub.faults["/api/"] = (503, {}, 9)
    assert "answers 503" in error(hub)


def test_unreachable_hub() -> None:
    with small_hub() as server:
        endpoint = server.endpoint
    with pytest.raises(HubError, match=r"cannot be reached .*refused.*glm_hf_endpoint"):
        Hub(endpoint, retries=0).manifest(REPO, REVISION)


def test_something_else_than_a_hub(hub: SmallHub) -> None:
    hub.faults["/api/"] = (200, {}, 9)
    assert "does not answer like a Hugging Face hub" in error(hub)


def test_an_endpoint_that_is_no_address() -> None:
    with pytest.raises(HubError, match="glm_hf_endpoint"):
        Hub("file:///etc").manifest(REPO, REVISION)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "a/../../b"])
def test_a_path_outside_of_the_repository_is_refused(path: str) -> None:
    with pytest.raises(HubError, match="outside"):
        build_manifest(REPO, REVISION, [{"type": "file", "path": path, "size": 1, "oid": "0" * 40}])


def listing(*paths: str) -> list[dict[str, Any]]:
    return [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in ("model.safetensors", *paths)]


@pytest.mark.parametrize(
    "path", ["modeling_glm.py", "pytorch_model.bin", "x/weights.PT", "a.pkl", "lib.so", "b.tar.gz"]
)
def test_a_file_that_may_hold_code_is_refused_by_its_name(path: str) -> None:
    with pytest.raises(HubError, match=r"may hold code \(.*set glm_model_suffixes: \[\"\.") as refused:
        build_manifest(REPO, REVISION, listing(path, "config.json"))
    assert path in str(refused.value)
    suffix = "." + path.rpartition(".")[2]
    assert build_manifest(REPO, REVISION, listing(path), [suffix])["files"]


def test_what_a_checkpoint_has_is_known() -> None:
    paths = [".gitattributes", "LICENSE", "README.md", "chat_template.jinja", "tokenizer.model", "figures/a.png"]
    assert len(build_manifest(REPO, REVISION, listing(*paths))["files"]) == 7


@pytest.mark.parametrize(
    "wrong", [{"oid": None}, {"oid": "abc"}, {}, {"oid": "0" * 40, "lfs": {"size": 1}}, {"lfs": {"oid": "0" * 40}}]
)
def test_a_listing_without_hashes_is_refused(wrong: dict[str, Any]) -> None:
    entry = {"type": "file", "path": "model.safetensors", "size": 1, **wrong}
    if "lfs" in wrong:
        entry["lfs"] = {"size": 1, **wrong["lfs"]}
    good = {"type": "file", "path": "config.json", "size": 1, "oid": "0" * 40}
    with pytest.raises(HubError, match=r"lists 1 of 2 files of \S+ without a hash to check them by, first model\.safe"):
        build_manifest(REPO, REVISION, [good, entry])


def test_metadata_alone_is_refused() -> None:
    with pytest.raises(HubError, match=r"no \.safetensors file"):
        build_manifest(REPO, REVISION, [{"type": "file", "path": "config.json", "size": 1, "oid": "0" * 40}])


def test_the_token_stays_with_the_hub(hub: SmallHub) -> None:
    with small_hub() as other:
        hub.faults["/api/"] = (307, {"Location": f"{other.endpoint}/api/models/{REPO}/revision/{REVISION}"}, 1)
        Hub(hub.endpoint, TOKEN).manifest(REPO, REVISION)
        assert other.authorizations == []
        assert hub.authorizations
