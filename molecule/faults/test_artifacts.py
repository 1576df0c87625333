"""Artifacts: images and weights that cannot be had, or are not what was asked for."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
from conftest import NODES, Case, cases
from machines import Machine, Mirror
from testbed import SHARED, docker

NEXT_REVISION = "2" * 40
NO_SUCH_DIGEST = f"sha256:{'0' * 64}"
# The next revision has the same weights, which would be linked: elsewhere they are downloaded.
ELSEWHERE = {
    "glm_weights_dir": "/var/lib/glm/elsewhere",
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
    try:
        with case.mirror.hub(**faults):
            run = case.play(seconds=240, **case.next(**ELSEWHERE))
        case.unprepared(run, line, release)
        there = case.node().run(f"ls {ELSEWHERE['glm_weights_dir']}/* 2>/dev/null; true").split()
        assert NEXT_REVISION not in there
    finally:
        for node in NODES:
            case.node(node).run("rm -rf /var/lib/glm/elsewhere; systemctl reset-failed glm-weights", check=False)


FLIP = "import sys; f = open(sys.argv[1], 'r+b'); byte = f.read(1)[0]; f.seek(0); f.write(bytes([byte ^ 1]))"
# What happens in the directory that the engine has open: it goes on with what it has read.
ON_DISK: dict[str, tuple[str, dict[str, Any], str]] = {
    "a file on disk is missing": ("rm tokenizer_config.json", {}, "fetched again"),
    "a file on disk that the revision does not list": (
        "cp config.json model-00009-of-00009.safetensors",
        {},
        "removed",
    ),
    "a byte on disk is flipped": (
        f'python3 -c "{FLIP}" tokenizer_config.json',
        {"model_weights_verify": True},
        "found by its hash with model_weights_verify, fetched again",
    ),
}


@pytest.mark.parametrize("name", cases(ON_DISK, VITAL))
def test_weights_on_disk_are_mended(name: str, case: Case, release: str) -> None:
    act, settings, how = ON_DISK[name]
    directory = f"/var/lib/glm/models/zai-org--GLM-5.2-FP8/{'1' * 40}"
    look = f"cd {directory} && find . -type f ! -name .glm-manifest.json -exec sha256sum {{}} + | sort"
    before = case.node().run(look)
    case.node().run(f"cd {directory} && {act}")
    assert case.node().run(look) != before
    run = case.play(seconds=400, **case.next(), **settings)
    case.converged(run, f"{how} as the node was prepared, before its turn")
    assert case.node().run(look) == before


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
    fill = "dd if=/dev/zero of=/srv/elsewhere/filler bs=1M status=none"
    with ExitStack() as faults:
        for name in NODES:
            faults.enter_context(case.node(name).small_disk("/srv/elsewhere", "1100m"))
        faults.enter_context(case.mirror.hub(bytes_per_second=20_000))
        acting = as_it_copies(case, lambda node: node.run(fill, check=False))
        run = case.play(seconds=240, **case.next(**{**ELSEWHERE, "glm_weights_dir": "/srv/elsewhere"}))
        for thread in acting:
            thread.join()
    for name in NODES:
        case.node(name).run("systemctl reset-failed glm-weights", check=False)
    case.unprepared(run, r"no space left while", release)


@pytest.mark.fault("the hub, from which every node is seeded, dies in a copy")
def test_a_hub_that_dies(case: Case, release: str) -> None:
    hub = ("exec", case.mirror.container, "sh", "-c")
    # Killed: a stop alone lets it send what it has begun, which may be all of the files.
    death = "systemctl kill --signal=KILL glm-hub; systemctl stop glm-hub"
    with case.mirror.hub(bytes_per_second=20_000):
        acting = as_it_copies(case, lambda _: docker(*hub, death))
        try:
            run = case.play(seconds=400, **case.next(**ELSEWHERE))
        finally:
            for thread in acting:
                thread.join()
            docker(*hub, "systemctl start glm-hub")
    for node in NODES:
        case.node(node).run("rm -rf /var/lib/glm/elsewhere; systemctl reset-failed glm-weights", check=False)
    case.unprepared(run, r"(could not be downloaded|cannot be reached|does not answer)", release)


@contextmanager
def pushed(case: Case, name: str, line: str) -> Iterator[str]:
    """The light engine's image with one layer more, in the mirror's registry."""
    docker("build", "--quiet", "--tag", name, "-", stdin=f"FROM vllm/vllm-openai:light\n{line}\n")
    subprocess.run([str(SHARED / "push-images"), case.mirror.container, name], check=True, timeout=300)
    try:
        yield name
    finally:
        docker("image", "rm", name)


@pytest.mark.fault("the disk fills up in the pull")
def test_a_disk_that_is_full_in_the_pull(case: Case, release: str) -> None:
    """Where Docker keeps a layer until it is whole."""
    line = "RUN head -c 48M /dev/urandom > /layer"
    with pushed(case, "vllm/vllm-openai:large", line) as image, case.node().small_disk("/var/lib/docker/tmp", "8m"):
        run = case.play(seconds=300, **case.next(glm_image=image))
    case.unprepared(run, r"the disk of Docker's directory \S+ is full", release)


@pytest.fixture
def tampered(case: Case) -> Iterator[str]:
    """An image of the mirror whose registry hands out another manifest than the one that has the digest."""
    storage = "/var/lib/docker-registry/docker/registry/v2"
    container = case.mirror.container
    with pushed(case, "vllm/vllm-openai:liar", "LABEL of=liars") as image:
        link = f"{storage}/repositories/vllm/vllm-openai/_manifests/tags/liar/current/link"
        digest = docker("exec", container, "cat", link).strip()
        blob = f"{storage}/blobs/sha256/{digest[7:9]}/{digest[7:]}/data"
        docker("exec", container, "sh", "-c", f"cp {blob} {blob}.good && printf ' ' >> {blob}")
        try:
            yield image
        finally:
            docker("exec", container, "mv", f"{blob}.good", blob)


@pytest.mark.vital
@pytest.mark.fault("a registry that lies")
def test_an_image_that_is_not_what_its_digest_says(case: Case, tampered: str, release: str) -> None:
    run = case.play(seconds=300, **case.next(glm_image=tampered))
    if run.recap("changed"):
        case.unprepared(run, r"(digest|verification|manifest)", release)
    else:
        case.refused(run, r"^image: ")
