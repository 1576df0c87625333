"""What the wrapper of the engine's test image makes of a command line meant for GPUs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "molecule/shared/engine/vllm"
_loader = importlib.machinery.SourceFileLoader("engine_wrapper", str(PROGRAM))
_spec = importlib.util.spec_from_loader("engine_wrapper", _loader)
assert _spec
wrapper = importlib.util.module_from_spec(_spec)
_loader.exec_module(wrapper)

ADDED = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "131072"]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("--tensor-parallel-size 8", "--tensor-parallel-size 1"),
        ("--tensor-parallel-size=8", "--tensor-parallel-size 1"),
        ("--kv-cache-dtype fp8_e4m3", "--kv-cache-dtype auto"),
        ("--kv-cache-dtype auto", "--kv-cache-dtype auto"),
        ("--gpu-memory-utilization 0.9 --port 8001", "--port 8001"),
        ("--speculative-config.method mtp --speculative-config.num_speculative_tokens 5 --max-num-seqs 32",
         "--max-num-seqs 32"),
        ('--speculative-config={"method":"mtp"} --host 127.0.0.1', "--host 127.0.0.1"),
        ("--enable-expert-parallel --trust-remote-code", "--trust-remote-code"),
        ("--served-model-name a b --reasoning-parser glm45", "--served-model-name a b --reasoning-parser glm45"),
    ],
)  # fmt: skip
def test_one_flag(given: str, left: str) -> None:
    words, _ = wrapper.translate(given.split())
    assert words == [*left.split(), *ADDED]


@pytest.mark.parametrize(
    ("length", "left"), [("131000", "131000"), ("8192", "8192"), ("1048576", "131072"), ("1M", "131072")]
)
def test_length(length: str, left: str) -> None:
    words, said = wrapper.translate(["--max-model-len", length])
    assert words[:2] == ["--max-model-len", left]
    assert words.count("--max-model-len") == 1
    assert any(line.startswith("--max-model-len") for line in said) == (length != left)


def test_what_is_given_is_not_added() -> None:
    words, said = wrapper.translate(["--dtype=float32", "--enforce-eager", "--max-model-len", "4096"])
    assert (words, said) == (["--dtype=float32", "--enforce-eager", "--max-model-len", "4096"], [])


def test_each_translation_is_told() -> None:
    _, said = wrapper.translate(["--tensor-parallel-size", "8", "--kv-cache-dtype", "fp8"])
    assert said[:2] == [
        "--tensor-parallel-size 8 -> 1: one CPU stands for the GPUs",
        "--kv-cache-dtype fp8 -> auto: no fp8 KV cache on a CPU",
    ]
    assert len(said) == 2 + 3
