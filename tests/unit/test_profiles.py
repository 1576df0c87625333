"""Engines and profiles: each file has the shape that the roles read."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import release

ENGINES = Path(__file__).resolve().parents[2] / "engines"
FILES = sorted(ENGINES.glob("*.yml"))
PROFILES = sorted(ENGINES.glob("*/profiles/*.yml"))
SETTINGS = {
    "model": "/models/zai-org/GLM-5.2-FP8",
    "served_model_names": ["glm-5.2-fp8"],
    "host": "127.0.0.1",
    "port": 8001,
    "shutdown_timeout": 120,
}


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return data


def test_the_engines_know_the_same_things() -> None:
    assert len({tuple(sorted(load(path))) for path in FILES}) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_engine(path: Path) -> None:
    engine = load(path)
    assert engine["name"] == path.stem
    assert (ENGINES / path.stem / "profiles" / "reference.yml").is_file()
    assert {flag for flag in engine["flags"].values() if flag} <= set(engine["reserved"])
    assert all(isinstance(value, str) for value in engine["env"].values())
    for item in engine["log"]["phases"]:
        assert set(re.compile(item["pattern"]).groupindex) == set(re.findall(r"{(\w+)}", item["phase"]))
    for pattern in engine["log"]["noise"]:
        re.compile(pattern)
    for loader in engine["loaders"]:
        settings = {**SETTINGS, "weights_loader": loader}
        assert release.engine_problems(engine, load(ENGINES / path.stem / "profiles/reference.yml"), settings) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_engine_has_a_profile_for_agents(path: Path) -> None:
    engine, profile = load(path), load(ENGINES / path.stem / "profiles/agentic.yml")
    assert (release.tokens(profile["flags"][engine["context"]["flag"]]) or 0) >= 131_072


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kv_cache_in_the_memory_of_a_b200_node(path: Path) -> None:
    engine = load(path)
    profile = load(ENGINES / path.stem / "profiles/agentic.yml")
    flag = engine["host_cache"]["flag"]
    assert release.host_cache_findings(engine, profile, {}, 2900 * 1024**3, 8) == []
    settings = {"extra_args": {flag: 1024 if engine["host_cache"]["of"] == "node" else 128}}
    assert release.host_cache_findings(engine, profile, settings, 2900 * 1024**3, 8) == []
    [finding] = release.host_cache_findings(engine, profile, settings, 1000 * 1024**3, 8)
    assert f"set {flag}: {500 if engine['host_cache']['of'] == 'node' else 62} in" in finding["line"]


def test_sglangs_kv_cache_in_the_nodes_memory_needs_a_size() -> None:
    """Without one it is a multiple of the GPUs' own, which a run cannot judge."""
    engine, profile = load(ENGINES / "sglang.yml"), load(ENGINES / "sglang/profiles/agentic.yml")
    settings = {"extra_args": {"--enable-hierarchical-cache": True, "--hicache-ratio": 4}}
    [finding] = release.host_cache_findings(engine, profile, settings, 2900 * 1024**3, 8)
    assert "set --hicache-size: 181 in glm_engine_extra_args" in finding["line"]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_profile(path: Path) -> None:
    engine, profile = load(ENGINES / f"{path.parts[-3]}.yml"), load(path)
    assert set(profile) - {"differences"} == {"description", "source", "measured", "flags", "env"}
    assert release.engine_problems(engine, profile, SETTINGS) == []


def test_the_reference_is_the_guides_command() -> None:
    flags = release.engine_flags(load(ENGINES / "vllm.yml"), load(ENGINES / "vllm/profiles/reference.yml"), SETTINGS)
    assert " ".join(flags) == (
        "/models/zai-org/GLM-5.2-FP8 --served-model-name glm-5.2-fp8 --host 127.0.0.1 --port 8001 "
        "--shutdown-timeout 120 --tensor-parallel-size 8 --trust-remote-code --kv-cache-dtype fp8 "
        "--tool-call-parser glm47 --reasoning-parser glm45 --enable-auto-tool-choice "
        "--enable-prompt-tokens-details --disable-access-log-for-endpoints /health,/metrics"
    )


def test_the_reference_of_sglang_is_the_guides_command() -> None:
    flags = release.engine_flags(
        load(ENGINES / "sglang.yml"), load(ENGINES / "sglang/profiles/reference.yml"), SETTINGS
    )
    assert " ".join(flags) == (
        "--model-path /models/zai-org/GLM-5.2-FP8 --served-model-name glm-5.2-fp8 --host 127.0.0.1 --port 8001 "
        "--tp 8 --trust-remote-code --mem-fraction-static 0.85 --tool-call-parser glm47 --reasoning-parser glm45 "
        "--enable-cache-report --enable-metrics"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_flag_that_the_deployment_needs_is_kept(path: Path) -> None:
    engine = load(path)
    reference = load(ENGINES / path.stem / "profiles/reference.yml")
    for flag, reason in engine["required_flags"].items():
        without = {**SETTINGS, "extra_args": {flag: False}}
        line = f"glm_engine_extra_args: {path.stem} needs {flag}: {reason}: set it to true"
        assert release.engine_problems(engine, reference, without) == [line]
        bare = {**reference, "flags": {name: value for name, value in reference["flags"].items() if name != flag}}
        assert release.engine_problems(engine, bare, SETTINGS) == [line.replace("glm_engine_extra_args", "the profile")]


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        (
            "vllm",
            "num_requests_running num_requests_waiting generation_tokens_total prompt_tokens_total kv_cache_usage_perc "
            "prefix_cache_hits_total",
        ),
        ("sglang", "http_requests_active realtime_tokens_total"),
    ],
)
def test_metrics_that_an_engine_shows_from_its_start_on(engine: str, names: str) -> None:
    """SGLang's counter of cached tokens comes with the first hit."""
    assert release.shown_metrics(load(ENGINES / f"{engine}.yml")) == [f"{engine}:{name}" for name in names.split()]


def test_sglang_keeps_its_metrics() -> None:
    assert "--enable-metrics" in load(ENGINES / "sglang.yml")["required_flags"]
