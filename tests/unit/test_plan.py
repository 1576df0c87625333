"""What plan.yml prints for the reference profile: the published guide's command, and every difference is told."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As the guide has them.
GUIDE = {
    "sglang": """docker run -d --gpus all --ipc=host -p 8000:8000 -v ~/.cache/huggingface:/root/.cache/huggingface
        lmsysorg/sglang:latest
        python3 -m sglang.launch_server --model-path zai-org/GLM-5.2-FP8 --served-model-name glm-5.2-fp8 --tp 8
        --host 0.0.0.0 --port 8000 --trust-remote-code --mem-fraction-static 0.85 --tool-call-parser glm47
        --reasoning-parser glm45""",
    "vllm": """docker run -d --gpus all --ipc=host -p 8000:8000 -v ~/.cache/huggingface:/root/.cache/huggingface
        vllm/vllm-openai:glm52-cu129
        --model zai-org/GLM-5.2-FP8 --served-model-name glm-5.2-fp8 --tensor-parallel-size 8 --trust-remote-code
        --kv-cache-dtype fp8 --tool-call-parser glm47 --reasoning-parser glm45""",
}


def options(words: list[str]) -> set[str]:
    """Options with their values, each `--name value`; an image and a program between them are not."""
    following = [*words[1:], "-"]
    return {
        f"{word} {after}" if not after.startswith("-") else word
        for word, after in zip(words, following, strict=True)
        if word.startswith("-")
    }


def plan(**settings: str) -> list[str]:
    """The lines that plan.yml prints."""
    extra = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "playbooks/plan.yml", "-i", "inventory/lambda", *extra],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("engine", GUIDE)
def test_the_reference_is_the_guides_command_and_each_difference_is_told(engine: str) -> None:
    lines = plan(glm_engine=engine)
    differences = [line for line in lines if line.startswith("differs from the guide: ")]
    told = {word.strip(".,:;") for word in " ".join(differences).split()}
    begin = next(number for number, line in enumerate(lines) if line.startswith("exec docker run"))
    end = next(number for number in range(begin, len(lines)) if not lines[number].endswith("\\"))
    ours = shlex.split(" ".join(line.rstrip("\\") for line in lines[begin : end + 1]))
    theirs = shlex.split(GUIDE[engine])
    missing = options(theirs) - options(ours)
    # What Docker is told besides is not the guide's matter: the container is another one.
    added = options(ours[ours.index("--log-opt") :]) - options(theirs)
    silent = {option for option in missing | added if option.split()[0] not in told | {"--log-opt"}}
    assert silent == set()


@pytest.mark.parametrize(("allowed", "branch"), [("true", 570), ("true", 580), ("false", 570)])
def test_cuda_compatibility_is_set_in_the_image_too(allowed: str, branch: int) -> None:
    """But not in front of a driver that is new enough."""
    lines = plan(
        glm_allow_cuda_compat=allowed,
        glm_driver_branch=str(branch),
        glm_profile="agentic",
        glm_weights_loader="multithread",
    )
    assert ("VLLM_ENABLE_CUDA_COMPATIBILITY=1" in lines) == (allowed == "true" and branch == 570)
    assert "--kv-offloading-size 1024 \\" in lines
    assert """--model-loader-extra-config '{"enable_multithread_load": true}'""" in lines
