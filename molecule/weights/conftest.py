"""Nodes that share a download, and the hub and the registry that count what they are asked for."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from fleet import Fleet, provided
from machines import Mirror
from testbed import ROOT, Play, Run, crowd

INVENTORY = ROOT / "molecule/weights/inventory"
ADDRESSES = {f"weights-{number}": f"198.18.79.1{number}" for number in (1, 2, 3, 4)}
FIRST, NEW = ("weights-1", "weights-2", "weights-3"), "weights-4"
IMAGE_DIRECTORY = "/var/lib/glm/image-blobs"
IMAGES = ["vllm/vllm-openai:light"]
MODEL = f"/var/lib/glm/models/zai-org--GLM-5.2-FP8/{'1' * 40}"


class Image(NamedTuple):
    """By digests. The registry has the layers as Docker counts them, uncompressed."""

    names: list[str]
    configuration: str
    layers: list[str]


class Sharing(Fleet):
    """The nodes, of which none serves here: what brings the weights is the same."""

    mirror = Mirror("glm-weights-mirror")

    def prepare(self, *nodes: str, seconds: int = 600, **settings: Any) -> Run:
        limit = ("--limit", ":".join(nodes)) if nodes else ()
        return self.play(*limit, playbook="playbooks/prepare.yml", seconds=seconds, **settings)

    def forget(self, *nodes: str) -> None:
        """The nodes have no weights any more."""
        for node in nodes:
            self.run(node, "rm -rf /var/lib/glm/models/*/* /var/lib/glm/models/*/.glm-offer")

    def forget_image(self, *nodes: str) -> None:
        """The nodes have no image any more, and nothing of one."""
        for node in nodes:
            self.run(node, f"docker image rm --force $(docker images --quiet); rm -rf {IMAGE_DIRECTORY}/*")

    def image(self, node: str) -> Image:
        """What Docker has, the one image of all."""
        shown = "docker image inspect $(docker images --quiet --no-trunc)"
        (found,) = json.loads(self.run(node, shown))
        return Image(found["RepoDigests"], found["Id"], found["RootFS"]["Layers"])

    def layers_since(self, before: Counter[str]) -> Counter[str]:
        """What the registry gave of the image. The configuration is left out: the first node reads it at each run."""
        asked = self.mirror.blobs() - before
        return Counter({blob: times for blob, times in asked.items() if blob != self.image(FIRST[0]).configuration})

    def flip(self, node: str, path: str) -> None:
        """One byte of a file; once more, and it is as it was."""
        program = f"f = open('{path}', 'r+b'); f.seek(1000); b = f.read(1); f.seek(1000); f.write(bytes([b[0] ^ 255]))"
        self.run(node, f'python3 -c "{program}"')

    def asked_since(self, before: Counter[str]) -> Counter[str]:
        return self.mirror.downloads() - before

    def journal(self, node: str, lines: int = 60, unit: str = "glm-weights") -> str:
        return self.run(node, f"journalctl --unit={unit} --output=cat --no-pager --lines={lines}")

    def complete(self, node: str) -> bool:
        return self.run(node, f"test -e {MODEL}/.glm-manifest.json && echo yes", check=False).strip() == "yes"

    def files(self, node: str) -> set[str]:
        """All that a node has of the model, each with its hash."""
        return set(self.run(node, f"cd {MODEL} && find . -type f ! -name '.glm-*' -exec sha256sum {{}} +").splitlines())

    def wait(self, what: Callable[[], Any], seconds: float) -> None:
        left = seconds
        while not what():
            began = time.monotonic()
            time.sleep(0.5)
            left -= (time.monotonic() - began) / crowd()
            assert left > 0, [self.journal(node) for node in ADDRESSES]


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    play = Play(tmp_path_factory.mktemp("weights"), INVENTORY)
    with provided(Sharing(play, tuple(ADDRESSES), {}), "WEIGHTS_KEEP", IMAGES) as fleet:
        assert isinstance(fleet, Sharing)
        yield fleet


@pytest.fixture(scope="session")
def prepared(fleet: Sharing) -> tuple[Run, Counter[str]]:
    """Three bare nodes that brought the weights together, and what the hub was asked for."""
    run = fleet.prepare(*FIRST, seconds=1200)
    assert run.code == 0, run.messages
    return run, fleet.mirror.downloads()
