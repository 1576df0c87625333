"""The light engine answers in the shapes of real vLLM, as molecule/shared/engine/record.py recorded them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("record", ROOT / "molecule/shared/engine/record.py")
assert _spec and _spec.loader
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)
IMAGE = "vllm/vllm-openai:light"
REAL = json.loads((ROOT / "tests/fixtures/vllm/answers.json").read_text())


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text("{}")
    # The engine listens in the container's own network; loopback alone reaches it.
    name = docker(
        "run", "-d", "--rm", "-p", "127.0.0.1::8000", "-v", f"{model}:/model:ro", "-e", "LIGHT_LOAD_SECONDS=0.1", IMAGE,
        "--model", "/model", "--served-model-name", "glm-5.2-fp8", "--tensor-parallel-size", "8",
    )  # fmt: skip
    try:
        url = f"http://{docker('port', name, '8000/tcp').splitlines()[0]}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(100):
            try:
                opener.open(f"{url}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url
    finally:
        docker("rm", "-f", name)


def shape(values: list[Any]) -> Any:
    """What values of one place have in common: keys of objects and whether each is ever set, types of the rest."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if all(isinstance(value, dict) for value in values):
        keys = {key for value in values for key in value}
        return {key: shape([value.get(key) for value in values]) for key in keys}
    if all(isinstance(value, list) for value in values):
        return [shape([item for value in values for item in value])]
    kinds = {"number" if isinstance(value, (int, float)) else type(value).__name__ for value in values}
    return "/".join(sorted(kinds))


def differences(real: Any, light: Any, place: str = "") -> list[str]:
    """What a client could stumble on: keys of one's own, keys that real vLLM fills and the light one lacks, types."""
    if real is None or light is None:
        return []
    if isinstance(real, dict) and isinstance(light, dict):
        found = [f"{place}.{key}: not in real answers" for key in light if key not in real]
        found += [f"{place}.{key}: missing" for key, value in real.items() if value is not None and key not in light]
        return found + [line for key in real.keys() & light.keys()
                        for line in differences(real[key], light[key], f"{place}.{key}")]  # fmt: skip
    if isinstance(real, list) and isinstance(light, list):
        return differences(real[0], light[0], f"{place}[]")
    return [] if real == light else [f"{place}: {light}, really {real}"]


def test_differences_are_seen() -> None:
    assert differences(shape([{"a": 1, "b": None}]), shape([{"a": "1"}])) == [".a: str, really number"]
    assert differences(shape([{"a": 1}]), shape([{"b": 1}])) == [".b: not in real answers", ".a: missing"]
    assert differences(shape([{"a": [{"b": 1}]}]), shape([{"a": [{}]}])) == [".a[].b: missing"]


@pytest.mark.parametrize("name", record.REQUESTS)
def test_same_shape(light: str, name: str) -> None:
    real, told = REAL["answers"][name], record.answer(light, name)
    assert (told["status"], told["type"], told.get("done")) == (real["status"], real["type"], real.get("done"))
    if "events" not in real:
        assert differences(shape([real["body"]]), shape([told["body"]])) == []
        return
    # An Anthropic stream is a sequence of kinds, an OpenAI one of one kind.
    kinds = list(dict.fromkeys(event.get("type") for event in real["events"]))
    assert list(dict.fromkeys(event.get("type") for event in told["events"])) == kinds
    for kind in kinds:
        both = [[event for event in events if event.get("type") == kind] for events in (real["events"], told["events"])]
        assert differences(shape(both[0]), shape(both[1]), str(kind or "")) == []


def test_metrics_have_real_names(light: str) -> None:
    assert set(record.metrics(light)) <= set(REAL["metrics"])
