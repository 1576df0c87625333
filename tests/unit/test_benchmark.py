"""Role benchmark: the figures' common names, the unit's program, and the client's command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import benchmark as plugin
from exposure import MOST, exposure
from loading import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles" / "benchmark" / "files" / "benchmark_run.py"
CLIENT = yaml.safe_load((ROOT / "engines" / "vllm" / "benchmark.yml").read_text(encoding="utf-8"))
ROLE = yaml.safe_load((ROOT / "roles" / "benchmark" / "vars" / "main.yml").read_text(encoding="utf-8"))
FULL = ROLE["__benchmark_workloads"]["full"]
REFERENCE = ROLE["__benchmark_tables"]
FIXTURES = ROOT / "tests" / "fixtures" / "benchmark"
# guide.json: the guide's second table in the form of the client's result. vllm.json: a result of vLLM 0.32 on a CPU.
RAW = json.loads((FIXTURES / "guide.json").read_text(encoding="utf-8"))
MEASURED = json.loads((FIXTURES / "vllm.json").read_text(encoding="utf-8"))

# What `docker exec` does, without a container: it runs the command here.
DOCKER = """#!/bin/sh
shift
while [ "${1#--}" != "$1" ]; do shift 2; done
shift
exec "$@"
"""
# A client that draws its bars as tqdm does, and writes what it was told to write.
BARS = r"""
printf 'Warming up with 2 requests...\n'
printf '\r  0%%|   | 0/2 [00:00<?, ?it/s]\r100%%|##| 2/2 [00:01<00:00, 2.0it/s]\n' >&2
for n in 1 2 3 4; do printf '\r 25%%|#  | %s/4 [00:01<00:01, 2.0it/s]' "$n" >&2; done
printf '\n============ Serving Benchmark Result ============\n'
"""


def result(workload: dict[str, Any] = FULL, **changes: Any) -> dict[str, Any]:
    return plugin.benchmark_result({**RAW, **changes}, CLIENT, {**workload, "seed": 7}, REFERENCE)


def test_the_guides_figures_come_out_as_the_guides() -> None:
    figures, guide = result(), REFERENCE["tables"][1]
    for name in ("output_tok_s", "total_tok_s", "per_user_tok_s"):
        assert figures[name] == pytest.approx(guide[name], abs=0.01)
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        assert {"mean": figures[name]["mean"], "p99": figures[name]["p99"]} == pytest.approx(guide[name], abs=0.01)
    assert REFERENCE["tables"][0]["output_tok_s"] / FULL["max_concurrency"] == pytest.approx(45.44, abs=0.005)


def test_the_names_are_the_contracts() -> None:
    figures = result()
    assert list(figures) == [
        "workload", "client", "duration_s", "completed", "failed", "output_tok_s", "total_tok_s", "per_user_tok_s",
        "ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "reference",
    ]  # fmt: skip
    assert figures["workload"] == {**FULL, "seed": 7}
    assert all(list(figures[name]) == ["mean", "p50", "p90", "p99"] for name in CLIENT["latencies"])
    assert None not in [value for name in CLIENT["latencies"] for value in figures[name].values()]


def test_a_result_of_the_real_client_is_read_in_full() -> None:
    workload = {"input_len": 256, "output_len": 64, "num_prompts": 16, "max_concurrency": 4}
    figures = plugin.benchmark_result(MEASURED, CLIENT, {**workload, "seed": 7}, REFERENCE)
    assert plugin.benchmark_finding(figures) == ""
    assert figures["output_tok_s"] == pytest.approx(1339.391)
    assert figures["per_user_tok_s"] == pytest.approx(334.848)
    assert figures["ttft_ms"] == pytest.approx({"mean": 31.792, "p50": 31.333, "p90": 39.198, "p99": 39.395})
    assert all(value > 0 for name in CLIENT["latencies"] for value in figures[name].values())
    assert figures["reference"] == []


def test_the_reference_is_of_the_same_workload_only() -> None:
    assert [table["engine"] for table in result()["reference"]] == ["sglang", "vllm"]
    assert all("by order" in table["name"] for table in result()["reference"])
    assert result({**FULL, "num_prompts": 256}, completed=256)["reference"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"completed": 510, "failed": 2}, "510 of 512 requests were answered and 2 failed"),
        ({"completed": 500, "failed": 0}, "500 of 512 requests"),
        ({"completed": 0, "failed": None, "output_throughput": 0.0}, "0 of 512 requests were answered and 512 failed"),
        ({"output_throughput": None}, "reported no output tokens"),
    ],
)
def test_a_failed_request_is_a_failed_benchmark(changes: dict[str, Any], words: str) -> None:
    finding = plugin.benchmark_finding(result(**changes))
    assert words in finding if words else finding == ""
    assert "\n" not in finding


def test_figures_that_a_client_lacks_are_null() -> None:
    figures = plugin.benchmark_result({"completed": 512}, CLIENT, {**FULL, "seed": 7})
    assert figures["failed"] == 0
    assert figures["per_user_tok_s"] is None
    assert figures["ttft_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert figures["reference"] == []


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The unit's program, in a place where `docker exec` needs no container."""
    module = load_file(PROGRAM, "benchmark_run")
    monkeypatch.setattr(module, "RESULT", str(tmp_path / "in-container.json"))
    monkeypatch.setattr(module, "PID", str(tmp_path / "in-container.pid"))
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER, encoding="utf-8")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    handler = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, handler)


def plan(tmp_path: Path, script: str) -> dict[str, Any]:
    return {
        "container": "glm-engine",
        "client": "the client",
        "arguments": ["sh", "-c", script, "client", "{seed}", "{result}"],
        "workload": {"name": "quick", "input_len": 8, "output_len": 8, "num_prompts": 4, "max_concurrency": 2},
        "results": str(tmp_path / "results"),
        "keep": 2,
    }


def test_a_run_leaves_its_record(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(program, "status", said.append)
    path = program.benchmark(plan(tmp_path, BARS + 'printf \'{"completed": 4, "seed": %s}\' "$1" >"$2"'))
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["raw"] == {"completed": 4, "seed": record["workload"]["seed"]}
    assert abs(record["workload"]["seed"] - time.time()) < 60
    assert (tmp_path / "results" / "latest.json").resolve() == path
    assert said[0] == "benchmark quick: starting the client"
    assert "benchmark quick: warming up, 2 of 2 requests" in said
    assert said[-1] == "benchmark quick: 4 of 4 requests"


def test_only_the_newest_records_stay(program: ModuleType, tmp_path: Path) -> None:
    for second in range(4):
        record = {"started": f"2026-07-01T10:00:0{second}Z", "workload": {"name": "quick"}}
        program.keep(record, tmp_path / "results", 2)
    kept = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert kept == ["2026-07-01T100002Z-quick.json", "2026-07-01T100003Z-quick.json", "latest.json"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo starting; echo 'ValueError: no such tokenizer' >&2; exit 3",
            "ended with 3: ValueError: no such tokenizer",
        ),
        ("exit 1", "ended with 1: it said nothing"),
        ("true", "left no result"),
        ("echo '[1]' >\"$2\"", "is not a JSON object"),
        ('printf \'{"trunc\' >"$2"', "left no result"),
    ],
)
def test_a_client_that_fails_is_told_in_one_line(program: ModuleType, tmp_path: Path, script: str, words: str) -> None:
    with pytest.raises(program.BenchmarkError, match=words) as error:
        program.benchmark(plan(tmp_path, script))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_an_old_result_in_the_container_is_not_taken_for_new(program: ModuleType, tmp_path: Path) -> None:
    Path(program.RESULT).write_text('{"completed": 4}', encoding="utf-8")
    with pytest.raises(program.BenchmarkError, match="left no result"):
        program.benchmark(plan(tmp_path, "true"))


def test_a_container_that_is_not_there(program: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bin" / "docker").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    with pytest.raises(program.BenchmarkError, match="glm-engine is not running: see systemctl status glm-engine"):
        program.benchmark(plan(tmp_path, "true"))


def test_a_container_that_ends_meanwhile(program: ModuleType, tmp_path: Path) -> None:
    docker = tmp_path / "bin" / "docker"
    script = f"printf '#!/bin/sh\nexit 1\n' >{docker}.new; chmod +x {docker}.new; mv {docker}.new {docker}; exit 137"
    with pytest.raises(program.BenchmarkError, match="ended during the benchmark: see journalctl -u glm-engine"):
        program.benchmark(plan(tmp_path, script))


def test_a_stop_ends_the_client_too(program: ModuleType, tmp_path: Path) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begin = time.monotonic()
    with pytest.raises(program.BenchmarkError, match="stopped before the end"):
        program.benchmark(plan(tmp_path, "exec sleep 30"))
    assert time.monotonic() - begin < 10
    client = int(Path(program.PID).read_text(encoding="utf-8"))
    with pytest.raises(ProcessLookupError):
        os.kill(client, 0)


def test_an_error_is_marked_for_the_journal(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan(tmp_path, "true")), encoding="utf-8")
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    docker.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "plan.json")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "glm: error: container glm-engine is not running: see systemctl status glm-engine\n"


def test_the_plan_and_the_unit_render(tmp_path: Path) -> None:
    """The role's own file list, rendered by Ansible, is JSON and a unit that systemd takes."""
    play = tmp_path / "play.yml"
    play.write_text(
        f"""
- hosts: localhost
  gather_facts: false
  become: false
  vars:
    benchmark_engine: vllm
    benchmark_served_model_name: glm-5.2-fp8
    benchmark_model_path: /model
  tasks:
    - ansible.builtin.include_vars: {{file: {ROOT}/roles/benchmark/defaults/main.yml}}
    - ansible.builtin.include_vars: {{file: {ROOT}/roles/benchmark/vars/main.yml}}
    - ansible.builtin.include_vars: {{file: {ROOT}/engines/vllm/benchmark.yml, name: __benchmark_client}}
    - ansible.builtin.copy:
        content: "{{{{ lookup('ansible.builtin.template', '{ROOT}/templates/' ~ item ~ '.j2') }}}}"
        dest: {tmp_path}/{{{{ item }}}}
        mode: "0644"
      loop: [benchmark.json, glm-benchmark.service]
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), str(play), "-e", "benchmark_workload=full"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rendered = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert rendered["workload"] == {"name": "full", **FULL}
    words = rendered["arguments"]
    assert words[:3] == ["vllm", "bench", "serve"]
    for word in ("--random-input-len=8192", "--random-output-len=2048", "--num-prompts=512", "--max-concurrency=32"):
        assert word in words  # the guide's
    for word in ("--seed={seed}", "--result-filename={result}", "--base-url=http://127.0.0.1:8001"):
        assert word in words
    unit = (tmp_path / "glm-benchmark.service").read_text(encoding="utf-8")
    assert "{{" not in unit
    # The program is not installed here; everything else of the unit is judged as it is.
    (tmp_path / "glm-benchmark.service").write_text(unit.replace("/opt/glm/bin/benchmark-run", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "glm-benchmark.service")]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    assert "glm-benchmark" not in verified.stderr
    assert exposure(tmp_path / "glm-benchmark.service") <= MOST
