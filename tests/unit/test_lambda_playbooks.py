"""launch.yml, release.yml and their commands, run for real against a server made from Lambda Cloud's description."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lambda_server
import pytest
from ansible_collections.glm.fleet.plugins.filter.instances import give_back_problems, instance_ids, why_not_idle
from lambda_server import JUPYTER, TOKEN, Lambda

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCH, TERMINATE = "instance-operations/launch", "instance-operations/terminate"
REGION = ("-e", "glm_launch_region=us-east-1")


@pytest.fixture
def account() -> Iterator[Lambda]:
    with lambda_server.running() as account:
        account.pace, account.launch_pace = 1.0, 12.0
        account.boots = account.ends = 0.5
        yield account


class Controller:
    """A user's inventory, and the commands over it."""

    def __init__(self, account: Lambda, directory: Path) -> None:
        self.inventory = directory / "lambda-cloud"
        shutil.copytree(ROOT / "inventory/lambda-cloud", self.inventory)
        self.url, self.home = account.url, directory
        keys = self.inventory / "keys"
        keys.mkdir(mode=0o700)
        (keys / "lambda-api-key").write_text(f"{TOKEN}\n")
        (keys / "lambda-api-key").chmod(0o600)

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False,
            env={**os.environ, "LAMBDA_API_URL": self.url, "LAMBDA_API_KEY": "", "HOME": str(self.home),
                 "COLUMNS": "200", "ANSIBLE_NOCOLOR": "1"},
        )  # fmt: skip
        left = [
            path.read_text() for path in self.home.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".txt")
        ]
        for secret in (TOKEN, JUPYTER, "PRIVATE KEY"):
            assert secret not in "".join([done.stdout, done.stderr, *left])
        return done

    def play(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [BIN / "ansible-playbook", f"playbooks/{name}.yml", "-i", self.inventory]
        return self._run(*command, "-e", f"glm_lambda_api_url={self.url}", *arguments)

    def glm_fleet(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = ["-i", str(self.inventory), "-e", f"glm_lambda_api_url={self.url}", "--runs", str(self.home / "runs")]
        return self._run(sys.executable, "-m", "glm_fleet", *arguments, *options)


@pytest.fixture
def controller(account: Lambda, tmp_path: Path) -> Controller:
    return Controller(account, tmp_path)


def recap(done: subprocess.CompletedProcess[str], name: str = "changed") -> int:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return sum(map(int, re.findall(rf"\b{name}=(\d+)", done.stdout.partition("PLAY RECAP")[2])))


def refusals(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode != 0
    return re.findall(r"^\[ERROR\]: Task failed: (?:Action failed: )?(.*)$", done.stdout + done.stderr, re.M)


def test_nodes_are_launched_after_a_yes_and_given_back_by_name(account: Lambda, controller: Controller) -> None:
    cost = "b200-1 (gpu_8x_b200_sxm6, us-east-1) cost 53.52 USD an hour, until they are given back"
    bare = refusals(controller.play("launch", *REGION))
    assert bare == [f"nothing was launched: {cost}, which nobody has accepted: -e glm_launch_accept_cost=53.52"]
    networks = ("-e", json.dumps({"glm_launch_networks": ["203.0.113.0/24"]}))
    look = controller.play("launch", *REGION, *networks, "--check", "--diff")
    assert recap(look) == 2 and "would be launched: b200-1" in look.stdout
    added = "+tcp 8000-8000 from 203.0.113.0/24: glm-fleet lambda-cloud: clients of port 8000"
    assert added in look.stdout and not account.instances and account.rules == lambda_server.DEFAULT_RULES
    accepted = ("-e", "glm_launch_accept_cost=53.52")
    assert recap(controller.play("launch", *REGION, *networks, *accepted)) == 2
    assert len(account.rules) == 3 and account.rules[:2] == lambda_server.DEFAULT_RULES
    assert recap(controller.play("launch", *REGION, *networks)) == 0  # nothing is missing, so nothing is asked
    assert account.count("POST", LAUNCH) == 1 and account.limited == 0
    # The inventory knows them at once, and ssh their host keys.
    listed = controller._run(BIN / "ansible-inventory", "-i", controller.inventory, "--graph")
    assert re.findall(r"--(b200-\d)$", listed.stdout, re.M) == ["b200-1", "b200-1"]
    assert "@lambda_launched" in listed.stdout

    unknown = refusals(controller.play("release", "-e", "glm_give_back=b200-9"))
    assert unknown == ["Lambda Cloud has no instance b200-9: did you mean b200-1?"]
    assert refusals(controller.play("release")) == [
        "no node is named: -e glm_give_back=NAME, or glm-fleet release NAME"
    ]
    # It cannot be asked (nothing is at its address), so it stays, unless that is allowed.
    account.add("other")
    assert controller.play("release", "-e", "glm_give_back=b200-1").returncode != 0
    assert account.count("POST", TERMINATE) == 0
    done = controller.play("release", "-e", "glm_give_back=b200-1", "-e", "glm_give_back_serving=true")
    assert recap(done) == 1 and "\nb200-1: terminating\n" in done.stdout
    assert [entry["name"] for entry in account.instances] == ["other"]


def test_what_cannot_be_launched_or_remembered_is_one_line(account: Lambda, controller: Controller) -> None:
    done = controller.play("launch", *REGION, "-e", "glm_launch_acept_cost=1")
    assert refusals(done) == ["glm_launch_acept_cost: there is no such setting: did you mean glm_launch_accept_cost?"]
    done = controller.play("launch", *REGION, "-e", "glm_launch_accept_cost=yes")
    assert refusals(done) == [
        "glm_launch_accept_cost: yes is no number of dollars an hour: -e glm_launch_accept_cost=53.52"
    ]
    done = controller.play("launch", *REGION, "-e", "glm_launch_accept_cost=60", "-e", "awx_job_id=1")
    assert refusals(done) == [
        "nothing was launched: the host keys of b200-1 would be lost with this job: launch from a controller whose "
        "files stay, or set glm_ephemeral_controller to false"
    ]
    assert account.count("POST", LAUNCH) == 0


def test_the_command_line(account: Lambda, controller: Controller) -> None:
    """There is no terminal: the cost must be named."""
    refused = controller.glm_fleet("launch", "--region", "us-east-1")
    said = "glm-fleet: b200-1 (gpu_8x_b200_sxm6, us-east-1) cost 53.52 USD an hour, which nobody has accepted: "
    assert (refused.returncode, refused.stderr) == (12, f"{said}--accept-cost 53.52\n")
    done = controller.glm_fleet("launch", "--region", "us-east-1", "--accept-cost", "53.52", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["name"] for entry in account.instances] == ["b200-1"]
    again = controller.glm_fleet("launch", "--region", "us-east-1")
    assert again.returncode == 0 and re.search(
        r"b200-1 +198\.18\.0\.1 +us-east-1 +gpu_8x_b200_sxm6 +known", again.stdout
    )
    unknown = controller.glm_fleet("release", "b200-7")
    assert unknown.returncode == 12
    assert "glm-fleet: Lambda Cloud has no instance b200-7: did you mean b200-1?" in unknown.stderr
    assert controller.glm_fleet("release", "b200-1", "--serving").returncode == 0
    assert not account.instances


# --- what is judged of a node ---

IDLE: dict[str, Any] = {"phase": "draining", "unit": "active", "in_flight": 0, "edge": {"n": {"rotation": "out"}}}
OFFERED = {"gw-1": {"n": {"rotation": "in", "sessions": 0}}}
DRAINED = {"gw-1": {"n": {"rotation": "out", "sessions": 0}}}


@pytest.mark.parametrize(
    ("status", "backends", "gateways", "reason"),
    [
        (IDLE, {}, [], ""),
        (IDLE, DRAINED, ["gw-1"], ""),
        ({**IDLE, "phase": None, "unit": "inactive", "in_flight": None, "edge": None}, {}, [], ""),  # never deployed
        ({**IDLE, "phase": "failed", "unit": "failed", "in_flight": None, "edge": None}, {}, [], ""),
        ({**IDLE, "phase": "serving"}, {}, [], "its engine runs (phase serving)"),
        ({**IDLE, "phase": None}, {}, [], "its engine runs (phase unknown)"),
        ({**IDLE, "edge": {"n": {"rotation": "in"}}}, {}, [], "its own edge offers it"),
        ({**IDLE, "in_flight": 2}, {}, [], "it has 2 requests in flight"),
        (IDLE, OFFERED, ["gw-1"], "gw-1 offers it"),
        (IDLE, {"gw-1": {"n": {"rotation": "out", "sessions": 3}}}, ["gw-1"], "it has 3 requests in flight"),
        (IDLE, {}, ["gw-1"], "gw-1 cannot be asked whether it offers the node"),
        ({**IDLE, "phase": "starting", "unit": "inactive"}, {}, [], "a rollout is at work on it (phase starting)"),
    ],
)
def test_why_a_node_is_not_idle(
    status: dict[str, Any], backends: dict[str, Any], gateways: list[str], reason: str
) -> None:
    assert why_not_idle(status, "n", backends, gateways) == reason


def test_a_host_must_be_the_instance() -> None:
    hostvars = {"a": {"ansible_host": "192.0.2.1", "lambda_id": "id-a"}, "b": {"ansible_host": "192.0.2.2"}}
    instances = [{"ip": "192.0.2.1"}, {"ip": "192.0.2.9"}, {}]
    assert give_back_problems(["a", "b", "c"], instances, hostvars) == [
        "b is 192.0.2.2 in the inventory, and 192.0.2.9 at Lambda",
        "c is no host of the inventory, so it cannot be asked whether it serves",
    ]
    assert instance_ids(["a", "b", "c"], hostvars) == ["id-a", "b", "c"]
