"""What is wrong with a bare node, with the registry or with the hub: every finding in one run, and nothing changed."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from node import MIRROR, Node
from testbed import SHARED, Play, Run, differences, docker

NO_SUCH_DIGEST = f"sha256:{'0' * 64}"
CUDA13 = "vllm/vllm-openai:light-cu130"
MACHINE = {
    "count": 7,
    "all": {"name": "NVIDIA H200"},
    "gpus": {"3": {"fabric_state": "In Progress", "fabric_status": "N/A"}},
}

# What each run must list, in full: a finding more is as wrong as one less.
UNFIT = {
    "edge_port": r"port 8000 is taken \(found python3 \(pid \d+, squatter\.service\), wanted it free\): "
    "stop that process, or set glm_port to a free port",
    "gpu_count": r"the number of GPUs is wrong \(found 7, wanted 8\): reset or reboot the node and see "
    r"`lspci -d 10de:` for the missing one, or set glm_gpu_count",
    "gpu_model": r"the GPUs are of another model \(found NVIDIA H200, wanted B200\): set glm_gpu_model, .*",
    "fabric": r"the NVLink fabric is not ready \(found In Progress/N/A on GPU 3 \(0000:61:00\.0\), wanted "
    r"Completed/Success\): see `systemctl status nvidia-fabricmanager` .*",
    "driver_version": r"the driver is too old for the GPU \(found 570\.211\.01, wanted 570\.900\.00 or later\): "
    "set glm_driver_mode: upgrade",
    "driver_branch": r"the loaded driver is of another branch \(found 570\.211\.01, wanted 580\.159\.04 or another of "
    r"branch 580\): set glm_driver_branch: 570 to keep it, or glm_driver_mode: upgrade to replace it",
    "image_cuda": r"the image's CUDA is too new for the driver \(found CUDA 13\.0 in the image, wanted at most 12\.8 "
    r"for driver 570\.211\.01\): set glm_image to a build for CUDA 12, .*",
    "disk_space": r"the file system at /srv/small is too full \(found 0\.1 GiB free, wanted 4\.0 GiB: .*\): "
    "free space there, or set glm_data_dir to a path on a larger disk",
    "weights": r"the hub at http://198\.18\.66\.2:8081 answers 401 for zai-org/GLM-5\.2-FP8: set glm_hf_token_file .*",
}
UPGRADED = {
    "reboot": r"a reboot is needed and not allowed \(found 570\.211\.01 loaded, while 570\.195\.03 is installed\): "
    r"set glm_allow_reboot: true, or install the packages of 570\.211\.01 again",
    "registry": r"the node does not reach http://198\.18\.66\.2:5000/v2/ \(found .*refused.*, wanted an answer\): "
    "open the way from the node, or set glm_registry_mirror to a mirror that it reaches",
    "weights": r"the hub at http://198\.18\.66\.2:8081 answers 429 \(too many requests\): try again in 2 s, or set "
    "glm_hf_token_file for a higher limit",
}
PINNED = {
    "image": r"vllm/vllm-openai:light is sha256:[0-9a-f]{64} by now, not sha256:0{64} as pinned: "
    r"write vllm/vllm-openai@sha256:0{64} to stay with that one, or pin the new one",
    "weights": r"the hub at http://198\.18\.66\.2:8081 answers 404: zai-org/GLM-5\.2-FP8 has no revision 3{40}: "
    "set glm_model_revision to a commit of the model",
}
GONE = {
    "image": r"registry mirror http://198\.18\.66\.2:5000 has no vllm/vllm-openai@sha256:0{64} \(404\): "
    "set glm_image to one that it has",
    "weights": r"the hub at http://198\.18\.66\.2:8081 answers 503 \(Service Unavailable\) for revision 1{40} of "
    r"zai-org/GLM-5\.2-FP8: try again later, or set glm_hf_endpoint",
    "host_cache": r"glm_engine_extra_args wants more KV cache in the node's memory than half of it \(found "
    r"--kv-offloading-size 100000 GiB, wanted at most \d+ GiB in all\): set --kv-offloading-size: \d+ in "
    "glm_engine_extra_args, or false to keep none there",
}
WANTED = {"unfit machine": UNFIT, "driver upgraded": UPGRADED, "pinned": PINNED, "gone": GONE}


FINDINGS = [(scenario, name) for scenario, findings in WANTED.items() for name in findings]


@dataclass
class Refusal:
    """A run, and what the node looked like around it."""

    run: Run
    before: list[str]
    after: list[str]


@pytest.fixture(scope="module")
def cuda13(node: Node) -> str:
    """In the registry: the light engine's image, labelled as one for CUDA 13."""
    docker("build", "--quiet", "--tag", CUDA13, "-", stdin="FROM vllm/vllm-openai:light\nENV CUDA_VERSION=13.0.1\n")
    subprocess.run([str(SHARED / "push-images"), MIRROR, CUDA13], check=True, timeout=300)
    return CUDA13


def break_it(scenario: str, node: Node, faults: ExitStack) -> dict[str, Any]:
    """Breaks what the scenario says until `faults` ends; returns the settings of the run."""
    if scenario == "unfit machine":
        faults.enter_context(node.listener(8000))
        faults.enter_context(node.small_disk("/srv/small", "64m"))
        faults.enter_context(node.hub(api=401))
        faults.enter_context(node.machine(**MACHINE))
        return {
            "glm_image": CUDA13,
            "glm_driver_branch": 580,
            "glm_data_dir": "/srv/small",
            "preflight_min_driver_version": "570.900.00",
        }
    if scenario == "driver upgraded":
        faults.enter_context(node.other_library("570.195.03"))
        faults.enter_context(node.no_registry())
        faults.enter_context(node.hub(api=429))
        return {}
    if scenario == "pinned":
        return {"glm_image": f"vllm/vllm-openai:light@{NO_SUCH_DIGEST}", "glm_model_revision": "3" * 40}
    faults.enter_context(node.hub(api=503))
    return {
        "glm_image": f"vllm/vllm-openai@{NO_SUCH_DIGEST}",
        "glm_engine_extra_args": {"--kv-offloading-size": 100_000},
    }


@pytest.fixture(scope="module")
def refuse(node: Node, play: Play, cuda13: str) -> Callable[[str], Refusal]:
    """Runs a scenario, once for all the tests about it."""

    @functools.cache
    def run(scenario: str) -> Refusal:
        with ExitStack() as faults:
            settings = break_it(scenario, node, faults)
            before = node.snapshot()
            return Refusal(play(seconds=120, **settings), before, node.snapshot())

    return run


@pytest.mark.parametrize("scenario", WANTED)
def test_all_findings_and_no_other(scenario: str, refuse: Callable[[str], Refusal]) -> None:
    run = refuse(scenario).run
    assert run.code != 0
    assert sorted(run.findings()) == sorted(WANTED[scenario])


@pytest.mark.parametrize(("scenario", "name"), FINDINGS)
def test_finding(scenario: str, name: str, refuse: Callable[[str], Refusal]) -> None:
    line = refuse(scenario).run.line(f"{name}: ")
    assert re.fullmatch(f"{name}: {WANTED[scenario][name]}", line), line


@pytest.mark.parametrize("scenario", WANTED)
def test_nothing_changed(scenario: str, refuse: Callable[[str], Refusal]) -> None:
    refusal = refuse(scenario)
    assert "docker: absent" in refusal.before
    assert differences(refusal.before, refusal.after) == []
    assert refusal.run.recap("changed") == 0
