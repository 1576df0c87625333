"""Which waves make sense, how many nodes they leave, and what a node's figures are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import rollout
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure_of

NODES = ["a", "b", "c", "d"]
WORKLOAD = {"input_len": 1, "output_len": 2, "num_prompts": 3, "max_concurrency": 4}
WANTED = {"engine": "vllm", "profile": "reference", "model": "m", "workload": WORKLOAD}


@pytest.mark.parametrize("waves", [[1], [1, "10%", "25%"], ["100%"], [3, 1]])
def test_waves_that_make_sense(waves: list[Any]) -> None:
    assert rollout.wave_problems(waves) == []


@pytest.mark.parametrize("wave", [0, -1, "0%", "101%", "half", "", 1.5, True, None])
def test_waves_that_make_none(wave: Any) -> None:
    (line,) = rollout.wave_problems([1, wave])
    assert line.startswith(f"glm_rollout_waves: {wave!r} is no wave: ")


@pytest.mark.parametrize("waves", [[], "1", None, 3])
def test_waves_are_a_list(waves: Any) -> None:
    assert rollout.wave_problems(waves) == ['glm_rollout_waves: wanted a list such as [1, "10%", "25%"]']


DEFAULTS = yaml.safe_load((Path(__file__).resolve().parents[2] / "roles/glm/defaults/main.yml").read_text())


def test_batches_are_ansibles() -> None:
    assert rollout.batches(NODES, [1, "50%"]) == [["a"], ["b", "c"], ["d"]]
    assert rollout.batches(NODES, [1, "10%"]) == [["a"], ["b"], ["c"], ["d"]]
    assert rollout.batches([], [1]) == []


def left(waves: list[Any], **changes: Any) -> str:
    fleet = {"serving": NODES, "stopped": NODES, "min_available": 1, "total": 4, "accept_downtime": False, **changes}
    return rollout.availability_violation(NODES, waves, fleet)


def test_enough_nodes_are_left() -> None:
    assert left([1, "25%"]) == ""
    assert left([3], min_available=1) == ""
    assert left([1], min_available="75%") == ""


def test_too_few_are_left() -> None:
    assert left([1, 3], min_available=2).startswith(
        "wave 1 stops b, c, d and leaves 1 of 4 serving nodes (wanted at least 2): set smaller glm_rollout_waves"
    )
    assert left([1], serving=["b"], min_available=2).startswith("wave 1 stops b and leaves 1 of 2 serving nodes")


def test_a_node_that_a_wave_has_brought_up_serves_in_the_next() -> None:
    """As after a run that was killed with a node out of rotation."""
    assert left([1, 3], serving=["b", "c", "d"]) == ""
    assert left([1, 3], serving=["b", "c", "d"], min_available=2).startswith("wave 1 stops b, c, d and leaves 1 of 4")


def test_what_is_not_stopped_or_does_not_serve_is_not_missed() -> None:
    assert left([4], stopped=[]) == ""
    assert left([4], serving=[]) == ""
    assert left([4], accept_downtime=True) == ""
    assert left([4], min_available=0) == ""
    assert left([4], min_available="0%") == ""


def test_a_share_that_must_be_left_is_rounded_up() -> None:
    assert left([2], min_available="51%").startswith(
        "wave 0 stops a, b and leaves 2 of 4 serving nodes (wanted at least 3)"
    )
    assert left([1], min_available="51%") == ""


def test_what_goes_for_good() -> None:
    assert left([4], for_good=True).startswith(
        "this stops a, b, c, d and leaves 0 of 4 serving nodes (wanted at least 1): name fewer nodes with --limit, or"
    )


def test_gateways_that_know_a_node() -> None:
    backends = {"g1": {"a": server("out")}, "g2": {}}
    assert rollout.offering(backends, "a") == ["g1"]
    assert rollout.offering(backends, "b") == []


def test_a_minimum_that_is_none() -> None:
    assert left([1], min_available="most") == (
        "glm_rollout_min_available: 'most' is neither a count nor a share such as 75%"
    )


def test_a_node_that_left_the_inventory_in_rotation() -> None:
    edges = {"gw": {"a": {"rotation": "in"}, "x": {"rotation": "in"}, "y": {"rotation": "out"}}}
    (line,) = rollout.unknown_backends(edges, NODES)
    assert line.startswith("gw offers the node x, which is not in the inventory: put it back, drain it")


def result(rate: float | None, **workload: int) -> dict[str, Any]:
    return {"output_tok_s": rate, "workload": {**WORKLOAD, "seed": 1, **workload}}


def entry(rate: float, **changes: Any) -> dict[str, Any]:
    return {"ok": True, "engine": "vllm", "profile": "reference", "model": "m", "benchmark": result(rate), **changes}


def test_the_baseline_is_the_median_of_this_runs_other_nodes() -> None:
    measured = {"a": result(100), "b": result(300), "c": result(200), "d": result(1)}
    assert rollout.fleet_baseline(measured, "", "d", WANTED) == 200


def test_the_first_node_is_compared_with_the_last_report() -> None:
    nodes = {
        "a": entry(100),
        "b": entry(120),
        "c": entry(500, ok=False),
        "d": entry(500, profile="recipe"),
        "e": entry(500, benchmark=None),
        "f": entry(500, benchmark=result(500, input_len=9)),
    }
    assert rollout.fleet_baseline({"a": {}}, json.dumps({"nodes": nodes}), "a", WANTED) == 110


@pytest.mark.parametrize("report", ["", "{", "{}"])
def test_there_may_be_none(report: str) -> None:
    assert rollout.fleet_baseline({"a": result(None)}, report, "b", WANTED) is None


SERVES = {
    "phase": "serving",
    "release": "0123456789ab",
    "engine": "vllm",
    "image_digest": "sha256:" + "d" * 64,
    "model_revision": "e" * 40,
    "driver": "570.211.01",
    "in_flight": 3,
    "stalls": {"restarts": 2, "time": "T", "reason": "no token"},
    "verified": {"time": "2026-07-01T10:00:00Z", "ok": True, "failed": []},
    "reason": None,
}


def server(rotation: str = "in", up: bool = True) -> dict[str, Any]:
    return {"rotation": rotation, "up": up, "sessions": 0}


def test_the_status_is_what_every_gateway_says() -> None:
    backends = {
        "gw1": {"a": server(), "b": server("out"), "c": server(up=False)},
        "gw2": {"a": server(), "b": server()},
    }
    hostvars: dict[str, dict[str, Any]] = {
        "a": {"rollout_status": {"status": SERVES}},
        "b": {"rollout_status": {"status": SERVES}},
        "c": {},
    }
    status = rollout.fleet_status(["a", "b", "c"], hostvars, ["gw1", "gw2"], backends)
    assert {name: seen["rotation"] for name, seen in status.items()} == {
        "a": "in",
        "b": "out, in",
        "c": "down, unknown",
    }
    assert status["c"]["phase"] == "not reached"


def test_the_status_without_gateways_is_the_nodes_own_edge() -> None:
    hostvars = {"a": {"rollout_status": {"status": {**SERVES, "edge": {"a": server("out")}}}}}
    assert rollout.fleet_status(["a"], hostvars, [], {})["a"] == {**SERVES, "rotation": "out"}


def test_the_table_has_a_line_a_node_and_the_reasons() -> None:
    wrong = {**SERVES, "reason": "release x failed", "verified": {"time": "T", "ok": False, "failed": ["sum"]}}
    table = rollout.status_table({"a": {**SERVES, "rotation": "in"}, "b": wrong, "c": {"phase": "not reached"}})
    head, a, b, c, reason = table.splitlines()
    assert head.split("  ")[0] == "node"
    assert a.split() == [
        *("a", "in", "serving", "0123456789ab", "vllm", "d" * 12, "e" * 12),
        *("570.211.01", "3", "2", "2026-07-01T10:00:00Z"),
    ]
    assert b.endswith("T FAILED sum")
    assert c.split()[:4] == ["c", "-", "not", "reached"]
    assert reason == "b: release x failed"


def test_a_gateways_servers() -> None:
    hostvars: dict[str, dict[str, Any]] = {
        "a": {"ansible_host": "1"},
        "b": {"ansible_host": "2", "glm_node_address": "10", "glm_port": "9000", "glm_tls_certificate_file": "x.pem"},
        "c": {"glm_acme_names": []},
    }
    # What a host does not set is the role's default, whatever the host that asks has set for itself.
    assert (
        yaml.safe_load(Path(__file__).resolve().parents[2].joinpath("roles/glm/defaults/main.yml").read_text())[
            "glm_port"
        ]
        == rollout.PORT
    )
    servers = rollout.edge_servers(["a", "b", "c"], hostvars)
    assert [(one["name"], one["address"], one["port"], one["tls"]) for one in servers] == [
        ("a", "1", 8000, False),
        ("b", "10", 9000, True),
        ("c", "c", 8000, False),
    ]


def test_an_edge_that_would_be_lost_at_once() -> None:
    known = {"gw": {"a": {"port": 8000, "tls": False}, "b": {"port": 8000, "tls": False}}}
    servers = [{"name": name, "port": 8000, "tls": True} for name in ("a", "b", "new")]
    (line,) = rollout.changed_backends(known, servers, ["a"])
    assert line.startswith("gw reaches a by port 8000 without TLS, and would by port 8000 with TLS before that node")
    assert rollout.changed_backends(known, [{"name": "a", "port": 8000, "tls": False}], ["a"]) == []


def test_what_a_run_stops() -> None:
    hostvars: dict[str, dict[str, Any]] = {
        "a": {"inference_service_plan": {"action": "switch"}},
        "b": {"inference_service_plan": {"action": "none"}},
        "c": {"rollout_interrupts": True},
        "d": {"rollout_interrupts": False},
        "e": {},
    }
    assert rollout.interrupted_nodes(list(hostvars), hostvars) == ["a", "c"]


def test_what_serves_now() -> None:
    def node(phase: str, active: str) -> dict[str, Any]:
        units = {"glm-engine.service": {"active": active}}
        return {"preflight_node": {"state": {"phase": phase}, "units": units}}

    hostvars = {"a": node("serving", "active"), "b": node("failed", "active"), "c": node("serving", "failed"), "d": {}}
    assert rollout.serving_nodes(["a", "b", "c"], hostvars, {}) == ["a"]
    assert rollout.serving_nodes(["d"], hostvars, {}) == ["d"], "left out by --limit: it goes on as it is"


def test_what_every_gateway_offers_serves_now() -> None:
    edges = {
        "g1": {"a": server(), "b": server("out"), "c": server(), "d": server(up=False)},
        "g2": {"a": server(), "b": server(), "d": server()},
    }
    assert rollout.serving_nodes(["a", "b", "c", "d"], {}, edges) == ["a"]


def test_what_a_failed_task_says() -> None:
    known = {"id": "x", "host": "a", "text": "t", "fix": "f", "unit": "", "nothing_changed": True}
    assert failure_of({"failure": known, "msg": "a: t: f"}) == known
    assert rollout.failure_line({"failure": known}) == "t: f"
    assert rollout.failure_line({"msg": "a\nb"}) == "a; b"
    gone = {"module_stdout": "", "module_stderr": "Shared connection to 192.0.2.1 closed.\r\n", "rc": 255}
    assert rollout.failure_line(gone).endswith("(exit status 255): the node went down, or killed it")
    down = {
        **gone,
        "module_stderr": "FileNotFoundError: No such file: '/tmp/ansible_x_payload_1/ansible_x_payload.zip'",
    }
    assert rollout.failure_line(down).endswith("the node went down, or killed it")
    full = {"module_stdout": "", "module_stderr": "Traceback\nOSError: No space left on device\n", "rc": 1}
    assert rollout.failure_line(full).endswith("(exit status 1): OSError: No space left on device")
    assert (
        rollout.failure_line({"msg": "One or more items failed", "results": [{"failed": True, "msg": "x"}, {}]}) == "x"
    )
    assert rollout.failure_line({"results": [{"failed": False, "msg": "x"}]}) == "see above"
    unparsed = {"msg": "Module result deserialization failed: No start", "module_stdout": "", "rc": 143}
    assert rollout.failure_line(unparsed).startswith("the step ended without an answer (exit status 143)")
    assert rollout.failure_line({**unparsed, "module_stdout": "Segmentation fault"}) == unparsed["msg"]
