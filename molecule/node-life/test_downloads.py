"""Downloads that stall: the bytes of an image's layer, and the hub's Xet. Both go on by themselves, within the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Life
from machines import Machine, Mirror

MIRROR = "glm-node-life-mirror"
IMAGE = "vllm/vllm-openai"
STALL = 10
STALLING = Path(__file__).with_name("stalling_registry.py")
# The registry itself, at another port.
BEHIND = "REGISTRY_HTTP_ADDR=127.0.0.1:5001 docker-registry serve /etc/docker/registry/config.yml"


@pytest.fixture
def idle(node: Life) -> Life:
    """The node without its engine, so that image and weights can be taken away."""
    node.run("systemctl stop glm-engine")
    return node


@pytest.fixture
def stalling() -> Iterator[Machine]:
    """The mirror, whose registry stalls in one layer, once."""
    mirror = Machine(MIRROR)
    mirror.run("cat > /root/stalling_registry.py", stdin=STALLING.read_text())
    mirror.run("systemctl stop docker-registry")
    mirror.run(f"systemd-run --quiet --collect --unit=behind --property=User=docker-registry env {BEHIND}")
    mirror.run("systemd-run --quiet --collect --unit=stalling python3 /root/stalling_registry.py")
    mirror.run("for _ in $(seq 100); do curl -sfo /dev/null 127.0.0.1:5000/v2/ && exit; sleep 0.1; done; exit 1")
    try:
        yield mirror
    finally:
        mirror.run("systemctl stop stalling behind; systemctl start docker-registry")


def test_a_layer_that_stalls_is_asked_for_again(idle: Life, stalling: Machine) -> None:
    idle.run(f"docker image rm --force $(docker image ls --quiet --no-trunc {IMAGE})")
    assert idle.run(f"docker image ls --quiet {IMAGE}") == ""
    began = time.monotonic()
    run = idle.fleet.play(seconds=400, engine_image_stall_timeout=STALL)
    assert run.code == 0, run.messages
    assert idle.serves()
    said = stalling.run("journalctl --unit=stalling --output=cat --no-pager").splitlines()
    (digest,) = [line.removeprefix("stalled ") for line in said if line.startswith("stalled ")]
    assert said.index(f"stalled {digest}") < said.index(f"sent {digest}")
    print(f"served {time.monotonic() - began:.0f} s after the run began")


def test_what_xet_does_not_bring_comes_by_plain_http(idle: Life) -> None:
    idle.run("rm -r /var/lib/glm/models/*")
    with Mirror(MIRROR).hub(xet="model-*"):
        run = idle.fleet.play(seconds=400, model_weights_stall_timeout=STALL)
    assert run.code == 0, run.messages
    assert idle.serves()
    said = idle.run("journalctl --unit=glm-weights --output=cat --no-pager --lines=50").splitlines()
    after = said[said.index(f"no byte for {STALL} s by Xet: going on by plain HTTP") :]
    assert any(line.startswith("complete: ") for line in after), said
