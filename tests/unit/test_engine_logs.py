"""What engine-launch, the watchdog and the benchmark read in what real engines on a GPU have written."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import benchmark
from test_engine_launch import engine_launch

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/engines"
LOADED, COMPILED = ["loading weights", "weights loaded"], ["compiling", "profiling memory"]
SERVING = ["allocating the KV cache", "capturing CUDA graphs", "warming up", "starting the HTTP server"]
SERVED = [*LOADED, *COMPILED, *SERVING]
MTP = [*LOADED, *LOADED, *COMPILED, *COMPILED, *SERVING]  # the drafting layer comes after the model
PHASES = {
    "vllm-cuda/reference-cold": SERVED,
    "vllm-cuda/reference": SERVED,
    "vllm-cuda/recipe-cold": MTP,
    "vllm-cuda/recipe-warm": MTP,
    "vllm-cuda/throughput": MTP,
    "vllm-cuda/deep-gemm-warmup": [*LOADED, *COMPILED, "allocating the KV cache", "compiling kernels"],
    "vllm-cuda/fp8_e4m3-on-hopper": ["loading weights"],
}


def read(name: str) -> tuple[Any, list[str]]:
    """engine-launch's log after it has read a recorded one, and the phases it came through, less their percents."""
    engine = yaml.safe_load((ROOT / f"engines/{name.split('-', maxsplit=1)[0]}.yml").read_text(encoding="utf-8"))
    release = SimpleNamespace(
        phases=[(re.compile(item["pattern"]), item["phase"]) for item in engine["log"]["phases"]],
        noise=[re.compile(pattern) for pattern in engine["log"]["noise"]],
        kills_itself=engine["log"]["kills_itself"],
    )
    log, phases = engine_launch.Log(release), [""]
    for line in (FIXTURES / f"{name}.log").read_text(encoding="utf-8").splitlines():
        plain = engine_launch.ANSI.sub("", line.partition("\t")[2])
        if plain.startswith("glm: error: "):  # engine-launch's own last word
            continue
        phase = re.sub(r", \d+ %$", "", log.phase_of(plain) or phases[-1])
        if plain.strip():
            log.lines.append(plain)
        if phase != phases[-1]:
            phases.append(phase)
    return log, phases[1:]


@pytest.mark.parametrize("name", PHASES)
def test_the_phases_of_a_real_start_are_seen_in_order(name: str) -> None:
    assert read(name)[1] == PHASES[name]


@pytest.mark.parametrize(("name", "loads"), [("reference-cold", 1), ("reference-killed", 1), ("low-latency", 2)])
def test_the_phases_of_sglang_are_seen(name: str, loads: int) -> None:
    graphs = ["allocating the KV cache", "capturing CUDA graphs"]
    phases = read(f"sglang-cuda/{name}")[1]
    assert phases[: 2 * loads + 2] == [*LOADED * loads, *graphs]
    assert phases[-1] == "warming up"
    assert phases.count("loading weights") == loads  # the drafting layer comes after the model
    assert set(phases) == {*LOADED, *graphs, "warming up"}


SGLANG_ENDS = {
    "fails-memory": (True, "ValueError: Loaded weights leave no GPU memory for the KV cache"),
    "fails-weights": (True, "safetensors._safetensors_rust.SafetensorError: Error while deserializing header"),
    "fails-killed": (False, "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9)"),
    "reference-killed": (True, "Subprocess scheduler_0 (pid=2248) crashed with exit code -9"),
}


@pytest.mark.parametrize("name", SGLANG_ENDS)
def test_why_sglang_ended_is_told(name: str) -> None:
    itself, reason = SGLANG_ENDS[name]
    log = read(f"sglang-cuda/{name}")[0]
    assert log.killed_itself() == itself
    assert log.explanation().startswith(reason)


def test_a_missing_attention_backend_is_the_reason_of_the_end() -> None:
    assert (
        read("vllm-cuda/fp8_e4m3-on-hopper")[0]
        .explanation()
        .startswith("ValueError: No valid attention backend found for cuda")
    )


@pytest.mark.parametrize("name", ["recipe-cold", "recipe-warm", "throughput"])
def test_memory_that_ran_out_is_the_reason_of_the_end(name: str) -> None:
    explained = read(f"vllm-cuda/{name}")[0].explanation()
    assert explained.startswith("Exception in aoti_torch: CUDA out of memory. Tried to allocate 4.00 GiB")


@pytest.mark.parametrize("name", ["vllm-cuda/reference", "vllm-cuda/recipe", "sglang-cuda/reference"])
def test_a_real_engine_reports_every_metric_that_is_read(name: str) -> None:
    engine = name.split("-", maxsplit=1)[0]
    metrics = yaml.safe_load((ROOT / f"engines/{engine}.yml").read_text(encoding="utf-8"))["metrics"]
    names = (FIXTURES / f"{name}-metrics.txt").read_text(encoding="utf-8").splitlines()
    wanted = {metrics["running"].partition("{")[0], metrics["cached"], *metrics["progress"]}
    assert wanted | ({metrics["waiting"]} if "waiting" in metrics else set()) <= set(names)


@pytest.mark.parametrize(("engine", "output_tok_s"), [("vllm", 366.193), ("sglang", 7671.495)])
def test_a_real_benchmark_holds_every_figure(engine: str, output_tok_s: float) -> None:
    client = yaml.safe_load((ROOT / f"engines/{engine}/benchmark.yml").read_text(encoding="utf-8"))
    raw = json.loads((FIXTURES / f"{engine}-cuda/reference-bench.json").read_text(encoding="utf-8"))
    workload = {"input_len": 1024, "output_len": 128, "num_prompts": 64, "max_concurrency": 32, "seed": 1}
    result = benchmark.benchmark_result(raw, client, workload)
    assert (result["completed"], result["failed"], result["output_tok_s"]) == (64, 0, output_tok_s)
    assert all(
        value is not None for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms") for value in result[name].values()
    )
