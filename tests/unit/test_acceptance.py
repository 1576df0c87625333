"""A new node is measured, and compared with the fleet."""

from __future__ import annotations

import copy
import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter.acceptance import acceptance_checks, accepted_results
from loading import ROOT, load_file
from test_haproxy_template import template

accept_node = load_file(ROOT / "roles/acceptance/files/accept-node", "accept_node")
gpu_check = load_file(ROOT / "roles/acceptance/files/gpu-check", "gpu_check")
# Written by gpu-check on the real H200s of two machines.
FIXTURES = ROOT / "tests/fixtures/acceptance"
H200, OTHER = (json.loads((FIXTURES / name).read_text()) for name in ("h200.json", "h200-other.json"))


def node(**more: Any) -> dict[str, Any]:
    """A good node of eight GPUs like that one."""
    gpus = [{**H200["gpus"][0], "index": index} for index in range(8)]
    return copy.deepcopy(
        {
            "gpus": {"gpus": gpus, "problems": [], "all_reduce": {"gpus": 8, "bus_gb_s": 480.0}},
            "dcgm": {"failed": [], "passed": 40},
            "disk": {"write_gb_s": 3.0, "read_gb_s": 6.0},
            "network": {"download_gb_s": 1.0},
            **more,
        }
    )


def bad(result: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, str]:
    checks = acceptance_checks(result, others, {"gpu_count": 8})
    return {check["name"]: check["detail"] for check in checks if not check["ok"]}


def test_a_node_like_the_others_is_accepted() -> None:
    assert bad(node(), [node(), node(), node()]) == {}
    # One H200 alone, as it was measured.
    alone = {"gpus": H200, "dcgm": None, "disk": {"write_gb_s": 1, "read_gb_s": 1}, "network": {"download_gb_s": 1}}
    assert [check for check in acceptance_checks(alone, [], {"gpu_count": 1}) if not check["ok"]] == []


def test_two_real_gpus_of_one_kind_pass_as_one_node() -> None:
    gpus = [{**machine["gpus"][0], "index": index} for index, machine in enumerate((H200, OTHER) * 4)]
    assert gpus[0]["results"] == gpus[1]["results"]
    assert bad(node(gpus={"gpus": gpus, "problems": [], "all_reduce": {"bus_gb_s": 480.0}}), []) == {}


def test_a_slow_gpu_is_named_within_its_own_node() -> None:
    slow = node()
    slow["gpus"]["gpus"][3]["bf16_tflops"] *= 0.9
    assert bad(slow, []) == {"bf16, TFLOP/s": "GPU 3 has 593.55, and the median of the node is 659.5"}


def test_a_node_whose_gpus_are_all_slow_is_named_by_the_fleet() -> None:
    slow = node()
    for gpu in slow["gpus"]["gpus"]:
        gpu["memory_gb_s"] = 3800
    assert bad(slow, []) == {}
    (detail,) = bad(slow, [node()]).values()
    assert detail.startswith("GPU 0 has 3800, and the median of the fleet is 4260.4; GPU 1 has 3800")


@pytest.mark.parametrize(
    ("wrong", "name", "said"),
    [
        ({"disk": {"write_gb_s": 2.0, "read_gb_s": 6.0}}, "disk, write GB/s", "2, and the median of the fleet is 3"),
        ({"disk": {"problem": "No space left on device"}}, "disk", "No space left on device"),
        ({"network": {"download_gb_s": 0.0}}, "network", "nothing was measured"),
        ({"network": {"problem": "timed out"}}, "network", "timed out"),
        ({"dcgm": {"failed": ["pcie on GPU 2: slow"], "passed": 39}}, "DCGM diagnostics", "pcie on GPU 2: slow"),
        ({"dcgm": {"failed": [], "passed": 0}}, "DCGM diagnostics", "no test passed"),
        ({"dcgm": {"problem": "Permission denied"}}, "DCGM diagnostics", "Permission denied"),
        ({"gpus": {"problems": ["GPU 1 computes"]}}, "results", "GPU 1 computes"),
        (
            {"gpus": {"problem": "No such file or directory: 'docker'"}},
            "results",
            "No such file or directory: 'docker'",
        ),
    ],
)
def test_what_deviates_is_named(wrong: dict[str, Any], name: str, said: str) -> None:
    assert bad(node(**wrong), [node(), node(), node()]) == {name: said}


def test_each_gpu_has_to_be_measured() -> None:
    few = node()
    del few["gpus"]["gpus"][7]
    assert bad(few, [])["results"] == "7 of 8 GPUs were measured"
    few["gpus"] = {"problems": []}
    assert bad(few, [])["results"] == "0 of 8 GPUs were measured"


def test_only_nodes_of_the_same_kind_are_compared() -> None:
    """Neither another GPU nor another number of them is a measure."""
    slow = node(disk={"write_gb_s": 1.0, "read_gb_s": 1.0})
    slow["gpus"]["all_reduce"]["bus_gb_s"] = 100.0
    faster, fewer = node(), node()
    for gpu in faster["gpus"]["gpus"]:
        gpu.update(name="NVIDIA B200", bf16_tflops=1500.0)
    del fewer["gpus"]["gpus"][4:]
    assert bad(slow, [faster, fewer] * 3) == {}
    assert len(bad(slow, [node()] * 3)) == 3


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"download_gb_s": 0.01}, "0.01 GB/s from the hub"),
        ({"not_measured": "the hub asks for a token"}, "not measured: the hub asks for a token"),
    ],
)
def test_a_slow_or_closed_hub_is_not_the_nodes_fault(network: dict[str, Any], said: str) -> None:
    checks = acceptance_checks(node(network=network), [node()] * 3, {"gpu_count": 8})
    assert {"name": "network", "ok": True, "detail": said} in checks


def test_slow_links_are_named() -> None:
    slow = node()
    slow["gpus"]["all_reduce"]["bus_gb_s"] = 400.0
    assert bad(slow, [node()] * 3) == {"all-reduce, bus GB/s": "400, and the median of the fleet is 480"}
    assert bad(slow, [node()] * 2) == {}  # two are no fleet
    slow["gpus"]["all_reduce"] = {}
    assert bad(slow, []) == {"all-reduce, bus GB/s": "nothing was measured"}


def test_those_that_were_refused_are_no_measure(tmp_path: Path) -> None:
    for name, ok in (("a", True), ("b", False), ("c", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"ok": ok, "result": {"of": name}}))
    (tmp_path / "broken.json").write_text("{")
    assert accepted_results(str(tmp_path), "c", {"c": {"of": "c"}, "d": {"of": "d"}, "e": {}}) == [
        {"of": "d"},
        {"of": "a"},
    ]
    assert accepted_results(str(tmp_path / "none"), "a", {}) == []


def test_the_first_node_that_is_judged_has_a_directory_for_its_result(tmp_path: Path) -> None:
    results = tmp_path / "results/lab/acceptance"
    measured = {**node(), "seconds": {"gpus": 1.0}}
    play = {
        "hosts": "all", "gather_facts": False,
        "vars": {"ansible_python_interpreter": sys.executable, "acceptance_results": str(results),
                 "acceptance_result": measured},
        "tasks": [{"ansible.builtin.include_role": {"name": "glm.fleet.acceptance", "tasks_from": "judge"}}],
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), str(tmp_path / "play.yml"), "-i", "a,b"]
    done = subprocess.run([*command, "-c", "local"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in results.iterdir()) == ["a.json", "b.json"]


def test_what_the_unit_may_write_is_made_and_is_where_the_program_writes() -> None:
    """systemd starts no unit whose ReadWritePaths= are not there."""
    install = yaml.safe_load((ROOT / "roles/acceptance/tasks/measure.yml").read_text())[0]["glm.fleet.file_set"]
    assert install["directories"] == [{"path": "{{ __acceptance_directory }}"}]
    names = yaml.safe_load((ROOT / "roles/acceptance/vars/main.yml").read_text())
    assert names["__acceptance_result"].startswith("{{ __acceptance_directory }}/")
    values = {
        **yaml.safe_load((ROOT / "roles/acceptance/defaults/main.yml").read_text()),
        **names,
        "__acceptance_directory": "/srv/glm/acceptance",
    }
    assert "\nReadWritePaths=/srv/glm/acceptance\n" in template("glm-acceptance.service.j2", **values)
    assert json.loads(template("acceptance.json.j2", **values))["directory"] == "/srv/glm/acceptance"


# --- on the node ---------------------------------------------------------------------------------------------


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    try:
        found = accept_node.disk({"directory": str(tmp_path), "disk_bytes": 32 << 20})
    except OSError as problem:  # a file system without O_DIRECT
        pytest.fail(str(problem))
    assert found["write_gb_s"] > 0
    assert found["read_gb_s"] > 0
    assert not list(tmp_path.iterdir())


def test_the_way_to_the_hub_is_measured() -> None:
    size = 8 << 20

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(size - first))
            self.end_headers()
            self.wfile.write(bytes(size - first))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/model"
        found = accept_node.network({"url": url, "network_bytes": size, "network_seconds": 20})
        server.shutdown()
    assert found["download_gb_s"] > 0


@pytest.mark.parametrize("code", [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN])
def test_a_hub_that_asks_for_a_token_is_not_measured(code: HTTPStatus) -> None:
    assert answered(code) == {"not_measured": "the hub asks for a token"}


def test_a_hub_without_the_file_is_a_problem() -> None:
    with pytest.raises(accept_node.urllib.error.HTTPError, match="Not Found"):
        answered(HTTPStatus.NOT_FOUND)


def answered(code: HTTPStatus) -> Any:
    """What is measured of a hub that says only that."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(code)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/model"
        try:
            return accept_node.network({"url": url, "network_bytes": 8, "network_seconds": 5})
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("docker", "said"),
    [
        ('echo noise; echo \'{"gpus": [], "problems": []}\'', None),
        ("echo 'docker: no such device' >&2; exit 125", "gpu-check ended with 125: docker: no such device"),
        ("test $1 = rm || sleep 20", "no answer from the GPUs within 1 s"),
    ],
)
def test_gpus_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docker: str, said: str) -> None:
    (tmp_path / "docker").write_text(f"#!/bin/sh\n{docker}\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = {
        "gpu_device": "nvidia.com/gpu=all",
        "program": "/x",
        "image": "i@sha256:0",
        "gpu_count": 8,
        "ulimits": {"memlock": -1},
        "seconds": 3,
        "gpu_timeout": 1,
    }
    found = accept_node.gpus(settings)
    assert found["problems"] == ([said] if said else [])


def test_dcgms_verdicts_are_read_of_old_and_new_releases() -> None:
    old = {
        "DCGM GPU Diagnostic": {
            "test_categories": [
                {"category": "Hardware", "tests": [
                    {"name": "GPU Memory", "results": [
                        {"gpu_ids": "0", "status": "Pass"},
                        {"gpu_ids": "1", "status": "Fail", "warnings": ["bad cell"], "info": "at 0x1"},
                    ]},
                ]},
            ]
        }
    }  # fmt: skip
    new = {
        "DCGM Diagnostic": {
            "test_categories": [
                {"category": "Integration", "tests": [
                    {"name": "pcie", "results": [
                        {"entity_id": 1, "status": "Fail", "warnings": [{"warning": "slow link", "error_id": 3}]},
                        {"entity_id": 2, "status": "Skip"},
                    ]},
                ]},
            ]
        }
    }  # fmt: skip
    assert accept_node.verdicts(json.dumps(old)) == {
        "failed": ["GPU Memory on GPU 1: bad cell; at 0x1"],
        "passed": 1,
    }
    assert accept_node.verdicts(json.dumps(new)) == {"failed": ["pcie on GPU 1: slow link"], "passed": 0}
    assert accept_node.verdicts("Error: no\n host engine") == {"failed": ["Error: no host engine"], "passed": 0}


def test_a_warning_of_dcgm_may_be_one_string() -> None:
    result = {"gpu_ids": "1", "status": "Fail", "warnings": "slow link", "info": ["at 0x1", "twice"]}
    report = {"DCGM Diagnostic": {"test_categories": [{"tests": [{"name": "pcie", "results": [result]}]}]}}
    assert accept_node.verdicts(json.dumps(report))["failed"] == ["pcie on GPU 1: slow link; at 0x1; twice"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "[]"),
        ('{"DCGM Diagnostic": []}', '{"DCGM Diagnostic": []}'),
        ('{"test_categories": null}', '{"test_categories": null}'),
        ('{"tests": "of a release to come"}', 'no test passed: {"tests": "of a release to come"}'),
    ],
)
def test_a_report_of_dcgm_that_is_not_understood_is_a_failure(text: str, said: str) -> None:
    assert accept_node.verdicts(text) == {"failed": [said], "passed": 0}


def test_what_was_measured_is_written_whatever_a_step_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "environment": {},
        "result": str(tmp_path / "acceptance.json"),
        "directory": str(tmp_path / "none"),
        "disk_bytes": 1,
        "url": "http://127.0.0.1:9/x",
        "network_bytes": 8,
        "network_seconds": 1,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(accept_node.signal, "signal", lambda *_: None)
    monkeypatch.setattr(accept_node.sys, "argv", ["accept-node", str(tmp_path / "settings.json")])
    monkeypatch.setattr(accept_node, "gpus", lambda _settings: H200)
    monkeypatch.setattr(accept_node, "diagnostics", lambda _settings: None)
    assert accept_node.main() == 0
    written = json.loads((tmp_path / "acceptance.json").read_text())
    assert "No such file" in written["disk"]["problem"]
    assert "refused" in written["network"]["problem"]
    assert set(written["seconds"]) == {"gpus", "dcgm", "disk", "network"}


def test_gpu_check_says_what_is_missing() -> None:
    """Without PyTorch it does not begin; its figures are of a real GPU."""
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "roles/acceptance/files/gpu-check", "1", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr
    assert (H200["problems"], len(H200["gpus"][0]["results"])) == ([], 2)


# --- in the container, without PyTorch


def end(code: int | None) -> None:
    """With that code, or not for a long time."""
    if code is None:
        time.sleep(120)
    os._exit(code or 0)


@pytest.mark.parametrize(
    ("codes", "seconds", "failed", "stuck"),
    [
        ([0, 0], 30, [], []),
        ([None, 3, None], 30, [1], [0, 2]),  # the others wait for the one that failed
        ([None, 0, None, None], 1, [], [0, 2, 3]),  # one second for all of them
    ],
)
def test_workers_have_one_deadline_and_end_with_the_first_that_fails(
    codes: list[int | None], seconds: float, failed: list[int], stuck: list[int]
) -> None:
    workers = [multiprocessing.get_context("fork").Process(target=end, args=(code,)) for code in codes]
    for worker in workers:
        worker.start()
    began = time.monotonic()
    assert gpu_check.finish(workers, seconds) == (failed, stuck)
    for worker in workers:
        worker.join(10)
    assert time.monotonic() - began < seconds + 10
    assert None not in [worker.exitcode for worker in workers]


def test_an_all_reduce_that_fails_names_the_gpu_and_keeps_the_other_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    torch = SimpleNamespace(
        __version__="2",
        cuda=SimpleNamespace(device_count=lambda: 3, empty_cache=lambda: None),
        multiprocessing=SimpleNamespace(get_context=lambda _kind: context),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(gpu_check, "check_gpu", lambda _torch, index, _seconds: {**H200["gpus"][0], "index": index})
    monkeypatch.setattr(gpu_check, "exchange", lambda rank, *_: end(7 if rank == 1 else None))
    assert gpu_check.main(3, 3) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == ["the all-reduce over 3 GPUs failed on GPU 1: see `journalctl -k -g NVRM`"]
    assert [gpu["bf16_tflops"] for gpu in found["gpus"]] == [659.5] * 3
