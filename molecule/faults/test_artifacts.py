"""Artifacts: images and weights that cannot be had, or are not what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from conftest import NODES, Case
from machines import Mirror

NEXT_REVISION = "2" * 40
NO_SUCH_DIGEST = f"sha256:{'0' * 64}"
# The next revision has the same weights, which would be linked: elsewhere they are downloaded.
ELSEWHERE = {
    "model_weights_directory": "/var/lib/glm/elsewhere",
    "model_weights_attempts": 1,
    "glm_model_revision": NEXT_REVISION,
}


def hub(**faults: Any) -> Callable[[Mirror], AbstractContextManager[None]]:
    return lambda mirror: mirror.hub(**faults)


# How the mirror is broken, the settings of the run, and the one line.
REFUSED: dict[str, tuple[Callable[[Mirror], AbstractContextManager[None]], dict[str, Any], str]] = {
    "the registry is down": (
        lambda mirror: mirror.no_registry(),
        {"glm_image": "vllm/vllm-openai:other"},
        r"^(registry|image): ",
    ),
    "the tag has moved": (
        hub(),
        {"glm_image": f"vllm/vllm-openai:light@{NO_SUCH_DIGEST}"},
        r"^image: .*not sha256:0{64}",
    ),
    "no such digest": (hub(), {"glm_image": f"vllm/vllm-openai@{NO_SUCH_DIGEST}"}, r"^image: .*404"),
    "the wrong revision": (hub(), {"glm_model_revision": "3" * 40}, r"^weights: .*has no revision 3{40}"),
    "the hub answers 401": (hub(api=401), {"glm_model_revision": NEXT_REVISION}, r"^weights: .*401"),
    "the hub answers 429": (hub(api=429), {"glm_model_revision": NEXT_REVISION}, r"^weights: .*429"),
    "the hub answers 503": (hub(api=503), {"glm_model_revision": NEXT_REVISION}, r"^weights: .*503"),
}
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a shard is truncated": ({"truncate": "model-00003-*"}, r"model-00003-\S+: expected \d+ bytes, found \d+"),
    "one byte is flipped": ({"flip": "model-00003-*"}, r"model-00003-\S+: expected sha256 [0-9a-f]{64}, found sha256"),
    "the hub dies in the middle": ({"file": 503}, r"files could not be downloaded.*answers 503"),
}
VITAL = ("the registry is down", "one byte is flipped", "the hub answers 429")


def vital(names: Any) -> list[Any]:
    return [pytest.param(name, id=name, marks=[pytest.mark.vital] * (name in VITAL)) for name in names]


@pytest.mark.parametrize("name", vital(REFUSED))
def test_it_is_refused(name: str, case: Case) -> None:
    fault, settings, line = REFUSED[name]
    with fault(case.mirror):
        run = case.play(**case.next(**settings))
    case.refused(run, line)


@pytest.mark.parametrize("name", vital(UNFIT))
def test_unfit_weights_never_serve(name: str, case: Case, release: str) -> None:
    faults, line = UNFIT[name]
    engines = [case.fleet.engine(node) for node in NODES]
    try:
        with case.mirror.hub(**faults):
            run = case.play(seconds=240, **case.next(**ELSEWHERE))
        case.rolled_back(run, line, release)
        case.what = case.what.replace(
            "rolled back, rollout halted", "ended before the first wave, no engine was touched"
        )
        assert [case.fleet.engine(node) for node in NODES] == engines
        assert (
            NEXT_REVISION
            not in case.node().run(f"ls {ELSEWHERE['model_weights_directory']}/* 2>/dev/null; true").split()
        )
    finally:
        for node in NODES:
            case.node(node).run("rm -rf /var/lib/glm/elsewhere; systemctl reset-failed glm-weights", check=False)


@pytest.mark.fault("a file is missing, one too many beside it")
def test_weights_on_disk_are_mended(case: Case, release: str) -> None:
    """In the directory that the engine has open: it goes on with what it has read."""
    directory = case.node().run("ls -d /var/lib/glm/models/*/1111111111111111111111111111111111111111").strip()
    case.node().run(f"rm {directory}/tokenizer_config.json; echo x > {directory}/stray.safetensors")
    run = case.play(seconds=400, **case.next())
    case.converged(run, "the missing file was fetched again before its turn")
    assert case.node().run(f"ls {directory}/tokenizer_config.json").strip()


@pytest.mark.vital
@pytest.mark.fault("the disk is full before the pull")
def test_a_full_disk_is_refused(case: Case) -> None:
    node = case.node()
    with node.small_disk("/srv/small", "64m"):
        run = case.play(**case.next(glm_data_dir="/srv/small"))
    case.refused(run, r"^disk_space: the file system at /srv/small is too full")


@pytest.mark.fault("the disk fills up in the copy")
def test_a_disk_that_fills_up_ends_the_copy(case: Case, release: str) -> None:
    """Room enough as it is judged; then something else takes it."""
    node = case.node()
    with node.small_disk("/srv/elsewhere", "5g"):
        settings = {**ELSEWHERE, "model_weights_directory": "/srv/elsewhere", "glm_disk_reserve_gib": 0}
        node.run("fallocate -l 4995M /srv/elsewhere/filler; true")
        with case.mirror.hub(bytes_per_second=2_000_000):
            run = case.play(seconds=240, **case.next(**settings), preflight_model_directory="/var/lib/glm/models")
        case.rolled_back(run, r"(No space left|too full|could not be)", release)
        case.what = case.what.replace(
            "rolled back, rollout halted", "ended before the first wave, no engine was touched"
        )
    case.node(NODES[1]).run("rm -rf /srv/elsewhere")
    node.run("systemctl reset-failed glm-weights", check=False)
