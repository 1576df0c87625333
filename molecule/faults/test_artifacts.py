"""Artifacts: images and weights that cannot be had, or are not what was asked for."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
from conftest import NODES, Case, cases
from machines import Machine, Mirror
from testbed import SHARED, docker

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
        r"^registry: the node does not reach",
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
    "the hub refuses files with 503": ({"file": 503}, r"files could not be downloaded.*answers 503"),
}
VITAL = ("the hub answers 429",)


@pytest.mark.parametrize("name", cases(REFUSED, VITAL))
def test_it_is_refused(name: str, case: Case) -> None:
    fault, settings, line = REFUSED[name]
    with fault(case.mirror):
        run = case.play(**case.next(**settings))
    case.refused(run, line)


@pytest.mark.parametrize("name", cases(UNFIT, VITAL))
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


@pytest.mark.fault("a file on disk is missing")
def test_weights_on_disk_are_mended(case: Case, release: str) -> None:
    """In the directory that the engine has open: it goes on with what it has read."""
    directory = case.node().run("ls -d /var/lib/glm/models/*/1111111111111111111111111111111111111111").strip()
    case.node().run(f"rm {directory}/tokenizer_config.json")
    run = case.play(seconds=400, **case.next(), model_weights_verify=True)
    case.converged(run, "with model_weights_verify it was found and fetched again before the node's turn")
    assert case.node().run(f"ls {directory}/tokenizer_config.json").strip()


@pytest.mark.fault("the disk is full before the pull")
def test_a_full_disk_is_refused(case: Case) -> None:
    node = case.node()
    with node.small_disk("/srv/small", "64m"):
        run = case.play(**case.next(glm_data_dir="/srv/small"))
    case.refused(run, r"^disk_space: the file system at /srv/small is too full")


def as_it_copies(case: Case, act: Callable[[Machine], object]) -> list[threading.Thread]:
    """Does it to each node a moment after its copy has begun."""

    def later(node: Machine) -> None:
        time.sleep(3)
        act(node)

    return [case.during_the_copy(name, later) for name in NODES]


@pytest.mark.fault("the disk fills up in the copy")
def test_a_disk_that_fills_up_ends_the_copy(case: Case, release: str) -> None:
    """Room enough as the copy begins; then something else takes it."""
    engines = [case.fleet.engine(node) for node in NODES]
    fill = "dd if=/dev/zero of=/srv/elsewhere/filler bs=1M status=none"
    with ExitStack() as faults:
        for name in NODES:
            faults.enter_context(case.node(name).small_disk("/srv/elsewhere", "1100m"))
        faults.enter_context(case.mirror.hub(bytes_per_second=20_000))
        acting = as_it_copies(case, lambda node: node.run(fill, check=False))
        run = case.play(seconds=240, **case.next(**{**ELSEWHERE, "model_weights_directory": "/srv/elsewhere"}))
        for thread in acting:
            thread.join()
    for name in NODES:
        case.node(name).run("systemctl reset-failed glm-weights", check=False)
    case.unprepared(run, r"no space left while", release)
    assert [case.fleet.engine(node) for node in NODES] == engines


@pytest.mark.fault("the hub dies in the middle of a copy")
def test_a_hub_that_dies(case: Case, release: str) -> None:
    hub = ("docker", "exec", case.mirror.container, "systemctl")
    with case.mirror.hub(bytes_per_second=20_000):
        acting = as_it_copies(case, lambda _: subprocess.run([*hub, "stop", "glm-hub"], check=True))
        try:
            run = case.play(seconds=400, **case.next(**ELSEWHERE))
        finally:
            for thread in acting:
                thread.join()
            subprocess.run([*hub, "start", "glm-hub"], check=True)
    for node in NODES:
        case.node(node).run("rm -rf /var/lib/glm/elsewhere; systemctl reset-failed glm-weights", check=False)
    case.unprepared(run, r"(could not be downloaded|cannot be reached|does not answer)", release)


LIAR = "vllm/vllm-openai:liar"


@pytest.fixture
def tampered(case: Case) -> Iterator[str]:
    """An image of the mirror whose registry hands out another manifest than the one that has the digest."""
    docker("build", "--quiet", "--tag", LIAR, "-", stdin="FROM vllm/vllm-openai:light\nLABEL of=liars\n")
    container = case.mirror.container
    subprocess.run([str(SHARED / "push-images"), container, LIAR], check=True, timeout=300)
    link = "/var/lib/docker-registry/docker/registry/v2/repositories/vllm/vllm-openai/_manifests/tags/liar/current/link"
    digest = docker("exec", container, "cat", link).strip()
    blob = f"/var/lib/docker-registry/docker/registry/v2/blobs/sha256/{digest[7:9]}/{digest[7:]}/data"
    docker("exec", container, "sh", "-c", f"cp {blob} {blob}.good && printf ' ' >> {blob}")
    try:
        yield LIAR
    finally:
        docker("exec", container, "mv", f"{blob}.good", blob)
        docker("image", "rm", LIAR)


@pytest.mark.vital
@pytest.mark.fault("a registry that lies")
def test_an_image_that_is_not_what_its_digest_says(case: Case, tampered: str, release: str) -> None:
    run = case.play(seconds=300, **case.next(glm_image=tampered))
    if run.recap("changed"):
        case.unprepared(run, r"(digest|verification|manifest)", release)
    else:
        case.refused(run, r"^image: ")
