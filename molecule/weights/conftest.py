"""Nodes that share a download, and the hub that counts what it is asked for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fleet import Fleet, provided
from machines import Mirror
from testbed import ROOT, Play, Run, crowd

INVENTORY = ROOT / "molecule/weights/inventory"
ADDRESSES = {f"weights-{number}": f"198.18.79.1{number}" for number in (1, 2, 3, 4)}
FIRST, NEW = ("weights-1", "weights-2", "weights-3"), "weights-4"
IMAGES = ["vllm/vllm-openai:light"]
MODEL = f"/var/lib/glm/models/zai-org--GLM-5.2-FP8/{'1' * 40}"


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

    def asked_since(self, before: Counter[str]) -> Counter[str]:
        return self.mirror.downloads() - before

    def journal(self, node: str, lines: int = 60) -> str:
        return self.run(node, f"journalctl --unit=glm-weights --output=cat --no-pager --lines={lines}")

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
