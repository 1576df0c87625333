"""Mistakes in the inventory: refused on the controller, before any node is contacted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from testbed import Play

HOSTS = {"node-a": {"ansible_host": "198.18.66.250"}, "node-b": {"ansible_host": "198.18.66.251"}}
SAME = {"node-a": {"ansible_host": "198.18.66.250"}, "node-b": {"ansible_host": "198.18.66.250"}}

# hosts, settings, the one line for each node
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "unknown engine": (
        HOSTS,
        {"glm_engine": "vlm"},
        ["glm_engine: there is no engine vlm: set one of sglang, vllm"],
    ),
    "unknown profile": (
        HOSTS,
        {"glm_profile": "fast"},
        ["glm_profile: vllm has no profile fast: set one of agentic, long-context, recipe, reference, throughput"],
    ),
    "profile of the other engine": (
        HOSTS,
        {"glm_engine": "sglang", "glm_profile": "recipe"},
        ["glm_profile: sglang has no profile recipe: set one of agentic, balanced, high-throughput, low-latency, "
         "reference"],
    ),
    "an expectation that no check reads": (
        HOSTS,
        {"glm_verify_expectations": {"sum": {"expects": "43"}}},
        ["glm_verify_expectations: sum has no expects: did you mean expect?"],
    ),
    "SGLang without its metrics": (
        HOSTS,
        {"glm_engine": "sglang", "glm_engine_extra_args": {"--enable-metrics": False}},
        ["glm_engine_extra_args: sglang needs --enable-metrics: the requests in flight are counted by it: "
         "set it to true"],
    ),
    "code that requests bring": (
        HOSTS,
        {"glm_engine": "sglang", "glm_engine_extra_args": {"--enable-custom-logit-processor": True}},
        ["glm_engine_extra_args: --enable-custom-logit-processor is refused: it runs the Python code that a request "
         "brings: remove it"],
    ),
    "adapters that requests load": (
        HOSTS,
        {"glm_engine_extra_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"}},
        ["glm_engine_extra_env: VLLM_ALLOW_RUNTIME_LORA_UPDATING is refused: a request may then load any adapter that "
         "the container can read: remove it"],
    ),
    "a window of an odd number of blocks": (
        HOSTS,
        {"glm_engine_extra_args": {"--max-model-len": 131_000}},
        ["glm_engine_extra_args: --max-model-len 131000 is an odd number of blocks of 64 tokens (2047), under which "
         "vllm before 0.27 dies: set 131072"],
    ),
    "a loader that the engine lacks": (
        HOSTS,
        {"glm_engine": "sglang", "glm_weights_loader": "multithread"},
        ["glm_weights_loader: sglang has no loader multithread: set one of default, fastsafetensors"],
    ),
    "misspelled setting": (
        HOSTS,
        {"glm_registry_miror": "http://mirror"},
        ["glm_registry_miror: there is no such setting: did you mean glm_registry_mirror?"],
    ),
    "variables of roles that the project sets": (
        HOSTS,
        {"inference_service_port": 9999, "inference_service_extra_args": {"--max-num-seqs": 7}, "verify_metrics": []},
        ["inference_service_extra_args: an inventory cannot set this: set glm_engine_extra_args instead",
         "inference_service_port: an inventory cannot set this: set glm_engine_port instead",
         "verify_metrics: an inventory cannot set this: the project sets it itself, remove it"],
    ),
    "nothing like a setting": (
        HOSTS,
        {"glm_zzz": 1},
        ["glm_zzz: there is no such setting: remove it, or see the list of settings"],
    ),
    "two nodes with one address": (
        SAME,
        {},
        ["inventory: node-a and node-b have one address (found 198.18.66.250 port 22 2 times, wanted one node an "
         "address): give each its own ansible_host, or remove the extra name"],
    ),
    "nodes that would serve different things": (
        {"node-a": HOSTS["node-a"] | {"glm_model_revision": "1" * 40}, "node-b": HOSTS["node-b"]},
        {},
        ["glm_model_revision: differs between the nodes, but one value serves the whole fleet: set it once, in "
         "group_vars/all"],
    ),
    "equal ports": (
        HOSTS,
        {"glm_port": 8001},
        ["glm_port: 8001 is the engine port too: set glm_port or glm_engine_port to another port"],
    ),
    "the port after the engine's": (
        HOSTS,
        {"glm_port": 8002},
        ["glm_port: 8002 is the port after glm_engine_port, which the engine needs too: set another one"],
    ),
    "all of these at once": (
        SAME,
        {"glm_engine": "vlm", "glm_benchmrk": "none", "glm_port": 9000, "glm_engine_port": 9000},
        ["glm_benchmrk: there is no such setting: did you mean glm_benchmark?",
         "glm_engine: there is no engine vlm: set one of",
         "glm_port: 9000 is the engine port too",
         "inventory: node-a and node-b have one address"],
    ),
    "reserved and doubled flags": (
        HOSTS,
        {"glm_engine_extra_args": {"--port": 9, "-tp": 4, "--tensor-parallel-size": 8, "max": 1}},
        ["glm_engine_extra_args: --port is not for here: set glm_engine_port",
         "glm_engine_extra_args: -tp and --tensor-parallel-size are the same flag: keep one of them",
         "glm_engine_extra_args: 'max' is not a flag: write it as --name"],
    ),
    "served names that are empty and doubled": (
        HOSTS,
        {"glm_served_model_name": ["glm-5.2-fp8", "", "glm-5.2-fp8"]},
        ["glm_served_model_name: '' is no name: remove it, or write a text",
         "glm_served_model_name: glm-5.2-fp8 is there twice: keep one of them"],
    ),
    "no served name": (
        HOSTS,
        {"glm_served_model_name": []},
        ["glm_served_model_name: there is no name: set one that clients ask for"],
    ),
    "environment that no file can hold": (
        HOSTS,
        {"glm_engine_extra_env": {"A-B": "1", "TWO": "a\nb"}},
        ["glm_engine_extra_env: 'A-B' is not a name of an environment variable",
         "glm_engine_extra_env: the value of TWO holds a line break, which an environment file cannot"],
    ),
    "value of another type": (
        HOSTS,
        {"glm_port": "eight"},
        ["argument 'glm_port' is of type str and we were unable to convert to int"],
    ),
    "value that is no choice": (
        HOSTS,
        {"glm_auth": "key"},
        ["value of glm_auth must be one of: keys, none, got: key"],
    ),
    "driver branch that is not known": (
        HOSTS,
        {"glm_driver_branch": 595},
        ["value of glm_driver_branch must be one of: 570, 580, got: 595"],
    ),
}  # fmt: skip


def test_gateways_by_name(play: Play, tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    gateways = {"gw-1": {"ansible_host": "198.18.66.252", "glm_port": 8003}, "gw-2": {"ansible_host": "gw-2.example"}}
    groups = {"nodes": {"hosts": HOSTS}, "gateways": {"hosts": gateways}}
    inventory.write_text(yaml.safe_dump({"all": {"children": groups}}, sort_keys=False))
    run = play(inventory=inventory, seconds=60)
    assert run.code != 0
    assert run.lines("glm_port: gw-1 needs port 8003 for the other gateways: set glm_port or glm_peers_port to another")
    assert run.lines("inventory: the other gateways know gw-2 by its address, and gw-2.example is a name: set glm_node")
    assert not set(run.trips) & {*HOSTS, *gateways}, f"a host was contacted: {run.trips}"


@pytest.mark.parametrize("name", CASES)
def test_inventory(name: str, play: Play, tmp_path: Path) -> None:
    hosts, settings, wanted = CASES[name]
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(
        yaml.safe_dump({"all": {"children": {"nodes": {"hosts": hosts, "vars": settings}}}}, sort_keys=False)
    )
    run = play(inventory=inventory, seconds=60)
    assert run.code != 0
    for line in wanted:
        # Each node says it once.
        assert len(run.lines(line)) == len(hosts), f"not once a node: {line}\n{run.output}"
    assert "[WARNING]" not in run.errors
    assert not set(run.trips) & set(hosts), f"a node was contacted: {run.trips}"
