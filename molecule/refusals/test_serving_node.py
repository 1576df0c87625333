"""Faults on a node that serves: each is refused, or ends with the release that served before, verified by asking it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lambda_server
import pytest
import yaml
from node import INVENTORY, MIRROR, Node
from testbed import ROOT, Play, differences, docker

QUESTION = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text())["sum"]
NEXT_REVISION = "2" * 40
# The next revision has the same weights, which would be linked: elsewhere they are downloaded.
ELSEWHERE = "/var/lib/glm/elsewhere"
NO_SUCH_DIGEST = f"sha256:{'0' * 64}"
ROUND_TRIPS = 30

# The fault at the hub, and what glm-weights.service says of it.
UNFIT_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "shard truncated": (
        {"truncate": "model-00003-*"},
        r"model-00003-of-\d+\.safetensors: expected \d+ bytes, found \d+, twice, from http://198\.18\.66\.2:8081: "
        "nothing was put into service; check that hub or mirror, then run it again to fetch only what is bad",
    ),
    "byte flipped in a shard": (
        {"flip": "model-00003-*"},
        r"model-00003-of-\d+\.safetensors: expected sha256 [0-9a-f]{64}, found sha256 [0-9a-f]{64}, twice, from "
        r"http://198\.18\.66\.2:8081: nothing was put into service; check that hub or mirror, .*",
    ),
    "files refused with 401": (
        {"file": 401},
        r"the hub at http://198\.18\.66\.2:8081 answers 401 for .* of zai-org/GLM-5\.2-FP8: set glm_hf_token_file, or "
        "check glm_model",
    ),
    "files refused with 429": (
        {"file": 429},
        r"zai-org/GLM-5\.2-FP8: (\d+) of \1 files could not be downloaded, first README\.md: the hub at "
        r"http://198\.18\.66\.2:8081 answers 429 \(too many requests\); run it again to go on from here",
    ),
    "files refused with 503": (
        {"file": 503},
        r"zai-org/GLM-5\.2-FP8: (\d+) of \1 files could not be downloaded, first README\.md: the hub at "
        r"http://198\.18\.66\.2:8081 answers 503; run it again to go on from here",
    ),
}
# The settings of the release, and why it fails.
UNFIT_RELEASES: dict[str, tuple[dict[str, Any], str]] = {
    "engine exits at once": (
        {"glm_engine_extra_env": {"LIGHT_FAULT": "exit-at-once"}},
        r"glm-engine\.service: engine exited with code 1 after \d+ s: RuntimeError: Engine core initialization failed "
        r".*journalctl -u glm-engine.*",
    ),
    "engine never ready": (
        {"glm_engine_extra_env": {"LIGHT_FAULT": "never-ready"}, "glm_engine_start_timeout": 20},
        r"glm-engine\.service: engine not ready after 20 s, last phase: loading weights.*: raise "
        "glm_engine_start_timeout or see journalctl -u glm-engine.*",
    ),
    "engine answers garbage": (
        {"glm_engine_extra_env": {"LIGHT_FAULT": "garbage"}},
        r"(?:.*; )?sum: [^;]*answered 'lkj 0 ~~ zzz', wanted '42'.*",
    ),
    # Only a long prompt, and only a stream, shows these two.
    "engine answers long prompts with garbage": (
        {"glm_engine_extra_env": {"LIGHT_FAULT": "long-garbage"}},
        r"find_fact: \d+ tokens: answered 'lkj 0 ~~ zzz', wanted '\d{4}'; second_turn: .*; long_answer: .*",
    ),
    "engine loses the calls of tools in streams": (
        {"glm_engine_extra_env": {"LIGHT_FAULT": "no-streamed-tools"}},
        r"tool_call_stream: 0 tool calls, .*; messages_tool_stream: 0 tool calls, .*",
    ),
}


@pytest.fixture(scope="module")
def release(node: Node, play: Play) -> str:
    """The id of the release that the node serves."""
    first = play(seconds=600)
    assert first.code == 0, first.messages
    return node.release()


def assert_serves(node: Node, release: str) -> None:
    assert node.release() == release
    assert node.state()["phase"] == "serving"
    assert node.state()["release"] == release
    status, answer = node.ask("/v1/chat/completions", question=QUESTION["prompt"])
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == QUESTION["expect"]


@pytest.fixture
def untouched(node: Node, release: str) -> Iterator[None]:
    """Before and after the test the same container serves the same release."""
    assert_serves(node, release)
    engine = node.engine()
    yield
    assert node.engine() == engine
    assert_serves(node, release)


@pytest.mark.parametrize("name", UNFIT_WEIGHTS)
def test_unfit_weights_are_not_put_into_service(name: str, node: Node, play: Play, untouched: None) -> None:
    faults, says = UNFIT_WEIGHTS[name]
    try:
        with node.hub(**faults):
            run = play(
                glm_model_revision=NEXT_REVISION,
                glm_weights_dir=ELSEWHERE,
                model_weights_attempts=1,
                seconds=180,
            )
        assert run.code != 0
        assert len(run.messages) == 1
        line = rf"glm-weights\.service: {says} \(.*journalctl -u glm-weights\.service\)"
        assert re.fullmatch(line, run.messages[0]), run.messages[0]
        held = node.run(f"ls {ELSEWHERE}/*").split()
        assert NEXT_REVISION not in held
    finally:
        node.run(f"rm -rf {ELSEWHERE}; systemctl reset-failed glm-weights", check=False)


def test_image_with_another_digest(node: Node, play: Play, untouched: None) -> None:
    before = node.snapshot()
    run = play(glm_image=f"vllm/vllm-openai:light@{NO_SUCH_DIGEST}")
    assert run.code != 0
    assert run.findings() == ["image"]
    assert "not sha256:000" in run.line("image: ")
    assert differences(before, node.snapshot()) == []


def test_the_only_node_is_not_switched_without_a_word(node: Node, play: Play, untouched: None) -> None:
    run = play(glm_accept_downtime=False, glm_engine_extra_env={"LIGHT_RELEASE": "next"})
    assert run.code != 0
    assert run.line("Nothing was changed: wave 0 stops refusal-1 and leaves 0 of 1 serving nodes (wanted at least 1): ")
    assert run.recap("changed") == 0


@pytest.mark.parametrize("name", UNFIT_RELEASES)
def test_the_release_before_serves_again(name: str, node: Node, play: Play, release: str) -> None:
    settings, says = UNFIT_RELEASES[name]
    assert_serves(node, release)
    run = play(seconds=240, **settings)
    assert run.code != 0
    assert len(run.messages[-1].splitlines()) == 1
    line = rf"refusal-1: release [0-9a-f]{{12}} failed: {says}; release {release} serves again"
    assert re.fullmatch(line, run.messages[-1]), run.messages
    assert re.search(says, node.state()["reason"])
    assert_serves(node, release)


# path, key (None: the right one), status, type of the error
REQUESTS = {
    "wrong key": ("/v1/models", "sk-wrong", 401, "authentication_error"),
    "no key": ("/v1/models", "", 401, "authentication_error"),
    "unlisted path": ("/metrics", None, 403, "permission_error"),
    "way around the list": ("/v1/../metrics", None, 403, "permission_error"),
    "the engine's own path": ("/tokenize", None, 403, "permission_error"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_edge_refuses(name: str, node: Node, release: str) -> None:
    path, key, status, kind = REQUESTS[name]
    answered, body = node.ask(path, key=key)
    assert (answered, body["error"]["type"]) == (status, kind)
    assert node.ask("/v1/models")[0] == 200


def test_it_converges_and_then_changes_nothing(node: Node, play: Play, release: str) -> None:
    again = play(seconds=300)
    assert again.code == 0, again.messages
    second = play(seconds=300)
    assert second.code == 0, second.messages
    assert second.recap("changed") == 0
    assert 0 < second.trips["refusal-1"]["round_trips"] <= ROUND_TRIPS
    assert_serves(node, release)


def test_the_first_client_meets_a_warm_engine(node: Node, play: Play, release: str) -> None:
    """After a restart without any playbook: what a request is the first to need is compiled before it comes."""
    cold = 4.0
    assert play(glm_engine_extra_env={"LIGHT_COLD_SECONDS": str(cold)}, seconds=300).code == 0
    journal = "journalctl --unit glm-engine --lines 20 --output cat"
    assert "engine-launch: warming up: a prompt of 3,000 words: 4." in node.run(journal)
    node.run("systemctl restart --no-block glm-engine")
    deadline = time.monotonic() + 120
    while node.ask("/health")[0] == 200:  # the old one is there for a moment
        assert time.monotonic() < deadline
    while node.ask("/health")[0] != 200:
        assert time.monotonic() < deadline, node.run(journal)
        time.sleep(0.1)
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        assert node.ask("/v1/chat/completions", question=QUESTION["prompt"])[0] == 200
        seconds.append(time.monotonic() - began)
    assert seconds[0] < cold / 2, seconds
    back = play(seconds=300)
    assert back.code == 0, back.messages
    assert_serves(node, release)


@pytest.fixture
def account(tmp_path: Path) -> Iterator[tuple[lambda_server.Lambda, dict[str, Any]]]:
    """One at Lambda Cloud that has the node, and the settings of release.yml."""
    key = tmp_path / "lambda-api-key"
    key.write_text(lambda_server.TOKEN)
    key.chmod(0o600)
    with lambda_server.running() as account:
        account.add("other")
        account.add("refusal-1", ip="198.18.66.10")
        yield (
            account,
            {
                "playbook": "playbooks/release.yml",
                "glm_lambda_api_url": account.url,
                "glm_lambda_api_key_file": str(key),
                "glm_give_back": ["refusal-1"],
                "seconds": 400,
            },
        )


def test_only_a_drained_node_is_given_back(
    node: Node, play: Play, untouched: None, account: tuple[lambda_server.Lambda, dict[str, Any]]
) -> None:
    cloud, settings = account
    known_hosts = INVENTORY / "keys/known_hosts"
    known = known_hosts.read_text()
    refused = play(**settings)
    assert refused.code != 0
    assert refused.line(
        "refusal-1: its engine runs (phase serving): take it out of service first (playbooks/drain.yml "
    )
    cloud.instances[1]["ip"] = "198.51.100.9"  # the host of that name is another machine
    elsewhere = play(**settings)
    assert "refusal-1 is 198.18.66.10 in the inventory, and 198.51.100.9 at Lambda" in elsewhere.output
    cloud.instances[1]["ip"] = "198.18.66.10"
    assert cloud.count("POST", "instance-operations/terminate") == 0
    try:
        assert play(playbook="playbooks/drain.yml", seconds=400).code == 0
        assert play("--check", **settings).recap("changed") == 1
        assert len(cloud.instances) == 2
        done = play(**settings)
        assert (done.code, done.recap("changed")) == (0, 1), done.messages
        assert [entry["name"] for entry in cloud.instances] == ["other"]
        assert known_hosts.read_text() == ""
    finally:
        known_hosts.write_text(known)  # the machine is still there
        back = play(playbook="playbooks/undrain.yml", seconds=400)
    assert back.code == 0, back.messages


def driver_settings() -> dict[str, Any]:
    """The mirror's driver, another version than the one that is loaded."""
    address = "http://198.18.66.2:8080"
    return {
        "playbook": "playbooks/driver.yml",
        "seconds": 700,  # with a reboot
        "glm_nvidia_apt_url": f"{address}/compute/cuda/repos",
        "glm_nvidia_apt_key_fingerprint": docker("exec", MIRROR, "cat", "/srv/apt/key.fingerprint").strip(),
        "glm_driver_mode": "upgrade",
        "glm_driver_version": "570.195.03",
        "glm_allow_reboot": True,
        "nvidia_driver_post_reboot_delay": 1,
    }


def loaded_driver(node: Node) -> str:
    return node.run("sed -n 's/^NVRM.*x86_64  *//p' /proc/driver/nvidia/version").split()[0]


def test_a_driver_that_cannot_be_had_leaves_the_engine_alone(node: Node, play: Play, untouched: None) -> None:
    run = play(**{**driver_settings(), "glm_driver_version": "570.999.99"})
    assert run.code != 0
    assert "570.195.03" in run.line("refusal-1: driver_version: ")


def test_the_engine_serves_again_where_the_driver_fails(node: Node, play: Play, release: str) -> None:
    """Its packages are the old driver's again, so that a container starts."""
    node.run("mkdir -p /etc/nvidia-stand-in && echo 570.195.03 > /etc/nvidia-stand-in/dkms-fails")
    try:
        run = play(**driver_settings())
    finally:
        node.run("rm /etc/nvidia-stand-in/dkms-fails")
    assert run.code != 0
    assert "the old driver 570.211.01 is still loaded" in run.line("refusal-1: dkms: ")
    assert loaded_driver(node) == "570.211.01"
    assert "570.211.01" in node.run("docker exec glm-engine nvidia-smi")
    assert_serves(node, release)


def test_the_driver_is_replaced_and_the_same_release_serves(node: Node, play: Play, release: str) -> None:
    """Drained, rebooted, started and verified; a second run has nothing to do."""
    settings = driver_settings()
    run = play(**settings)
    assert run.code == 0, run.messages
    assert loaded_driver(node) == "570.195.03"
    assert_serves(node, release)
    drained, verified = (
        run.output.index(f"TASK [{name}]")
        for name in ("glm.fleet.rollout : Stop the engine", "glm.fleet.rollout : Verify what the node serves")
    )
    assert drained < run.output.index("Reboot, as long as") < verified
    again = play(**settings)
    assert (again.code, again.recap("changed")) == (0, 0)
