"""Launching and giving back, against a server made from the description of Lambda Cloud's API."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lambda_server
import pytest
import yaml
from ansible_collections.glm.fleet.plugins.action import lambda_firewall, lambda_instance
from ansible_collections.glm.fleet.plugins.action.lambda_instance import Fleet, fingerprint
from ansible_collections.glm.fleet.plugins.plugin_utils import lambda_cloud
from ansible_collections.glm.fleet.plugins.plugin_utils.lambda_cloud import Api, ApiError
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused
from lambda_server import DEFAULT_RULES, TOKEN, Fault, Lambda

SPEC: dict[str, dict[str, Any]] = lambda_instance.SPEC  # type: ignore[assignment]
LAUNCH, LIST, TERMINATE = "instance-operations/launch", "instances", "instance-operations/terminate"
B200 = "gpu_8x_b200_sxm6"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lambda]:
    monkeypatch.setattr(lambda_cloud, "PACE", 0)
    monkeypatch.setattr(lambda_cloud, "LAUNCH_PACE", 0)
    monkeypatch.setattr(Api, "next_request", 0)
    monkeypatch.setattr(Api, "next_launch", 0)
    with lambda_server.running() as account:
        yield account


class Run:
    """A run of the module, as its tasks call it."""

    def __init__(self, account: Lambda, directory: Path) -> None:
        self.account, self.directory, self.said = account, directory / "keys", list[str]()

    def fleet(self, **args: Any) -> Fleet:
        given: dict[str, Any] = {name: spec.get("default") for name, spec in SPEC.items()}
        given |= {"names": ["b200-1"], "type": B200, "regions": ["us-east-1"], "keys_directory": str(self.directory)}
        given |= {"max_cents_per_hour": 10**6, "poll": 0.05, "capacity_pause": 0.05, "lost_timeout": 60, "patience": 3}
        given |= {"tags": {"glm-role": "node"}, "image_family": "gpu-base-24-04", **args}
        return Fleet(Api(TOKEN, self.account.url, patience=given["patience"], timeout=5), given, self.said.append)

    def present(self, check: bool = False, **args: Any) -> dict[str, Any]:
        fleet = self.fleet(**args)
        with fleet.alone(check):
            return fleet.present(check)

    def absent(self, check: bool = False, **args: Any) -> dict[str, Any]:
        fleet = self.fleet(**args)
        with fleet.alone(check):
            return fleet.absent(check)

    def text(self, name: str) -> str:
        return (self.directory / name).read_text()


@pytest.fixture
def run(account: Lambda, tmp_path: Path) -> Run:
    return Run(account, tmp_path)


def test_two_nodes_are_launched_once_with_keys_that_the_controller_knows(run: Run, account: Lambda) -> None:
    account.boots = 0.3
    first = run.present(names=["b200-1", "b200-2"])
    assert (first["launch"], first["changed"], first["cents_per_hour"]) == (["b200-1", "b200-2"], True, 10704)
    assert [entry["host_key"] for entry in first["instances"]] == [True, True]
    for entry in first["instances"]:
        data = account.user_data[entry["id"]]
        planted = yaml.safe_load(data)["ssh_keys"]
        assert data.startswith("#cloud-config\n") and planted["ed25519_private"].startswith("-----BEGIN OPENSSH")
        kind, key, _ = planted["ed25519_public"].split()
        assert f"{entry['ip']} {kind} {key}" in run.text("known_hosts").splitlines()
    assert stat.S_IMODE((run.directory / "known_hosts").stat().st_mode) == 0o600
    # The private keys are the nodes' alone from then on.
    left = sorted(path.name for path in (run.directory / "hosts").iterdir())
    assert left == [".lock", "b200-1.pub", "b200-2.pub"]
    second = run.present(names=["b200-1", "b200-2"])
    assert (second["changed"], second["launch"], second["found"]) == (False, [], ["b200-1", "b200-2"])
    assert account.count("POST", LAUNCH) == 2
    assert lambda_server.JUPYTER not in str(first) + str(second)


def test_the_private_key_on_the_controller_is_for_its_owner_alone(run: Run, account: Lambda) -> None:
    account.boots = 3600
    with pytest.raises(ApiError, match="b200-1 did not become active within 0 s, and costs meanwhile"):
        run.present(wait_timeout=0)
    assert stat.S_IMODE((run.directory / "hosts" / "b200-1").stat().st_mode) == 0o600
    assert stat.S_IMODE((run.directory / "hosts").stat().st_mode) == 0o700


def test_check_mode_says_the_cost_and_does_nothing(run: Run, account: Lambda) -> None:
    plan = run.present(check=True, names=["b200-1", "b200-2"])
    assert (plan["cost"], plan["launch"], plan["changed"]) == ("107.04 USD", ["b200-1", "b200-2"], True)
    assert not account.instances and not run.directory.exists()


@pytest.mark.parametrize(("accepted", "says"), [(None, "nothing was accepted"), (5351, "53.51 USD were accepted")])
def test_nothing_is_launched_for_more_than_was_accepted(
    run: Run, account: Lambda, accepted: int | None, says: str
) -> None:
    with pytest.raises(Refused, match=rf"b200-1 would cost 53.52 USD an hour, and {says}: nothing is launched"):
        run.present(max_cents_per_hour=accepted)
    assert not account.instances
    run.present(max_cents_per_hour=5352)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(LAUNCH, "POST", done=True),
        Fault(LAUNCH, "POST", status=502, done=True),
        Fault(LAUNCH, "POST", code="global/internal-error", done=True),
        Fault(LAUNCH, "POST", status=200, done=True),
    ],
    ids=["cut", "502", "internal", "garbled"],
)
@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_a_lost_answer_launches_no_second_one(run: Run, account: Lambda, fault: Fault, hidden: float) -> None:
    account.faults, account.hidden = [Fault(**vars(fault))], hidden
    done = run.present()
    assert [entry["name"] for entry in account.instances] == ["b200-1"]
    assert done["instances"][0]["host_key"] and account.count("POST", LAUNCH) == 1
    assert not run.present()["changed"]


def test_an_order_that_may_have_been_lost_is_left_to_the_user(run: Run, account: Lambda) -> None:
    account.faults = [Fault(LAUNCH, "POST")]
    with pytest.raises(ApiError, match="b200-1: the answer to its launch was lost, and no instance of that name"):
        run.present(lost_timeout=0.3)
    assert account.count("POST", LAUNCH) == 1 and not account.instances
    run.present()
    assert len(account.instances) == 1


def test_a_run_that_was_killed_in_the_middle_of_an_order_looks_first(run: Run, account: Lambda) -> None:
    fleet = run.fleet()
    with fleet.alone(check=False):
        fleet._mark("b200-1").write_text(f"{time.time():.0f}\n")
        order = fleet._order("b200-1", "ops")
    account.hidden = 0.5  # it is not listed yet as the next run begins
    account.launch({**order, "region_name": "us-east-1"})
    run.present()
    assert len(account.instances) == 1 and account.count("POST", LAUNCH) == 0


def test_capacity_is_asked_for_again_in_all_regions_that_are_allowed(run: Run, account: Lambda) -> None:
    account.faults = [Fault(LAUNCH, "POST", code=lambda_cloud.NO_CAPACITY, times=5)]
    done = run.present(regions=["us-east-1", "us-west-1"])
    assert done["instances"][0]["region"] == "us-west-1"
    asked = [body["region_name"] for _, path, body in account.requests if path == LAUNCH]
    assert asked == ["us-east-1", "us-west-1"] * 3 and len(account.instances) == 1
    assert "b200-1: us-east-1 has no capacity (try 1)" in run.said


def test_a_region_that_says_to_have_capacity_is_asked_first(run: Run, account: Lambda) -> None:
    account.capacity["us-east-1"] = 0
    assert run.present(regions=["us-east-1", "us-west-1"])["instances"][0]["region"] == "us-west-1"
    assert account.count("POST", LAUNCH) == 1


@pytest.mark.parametrize("bound", [{"capacity_retries": 2}, {"capacity_timeout": 0}])
def test_capacity_is_given_up_within_a_bound(run: Run, account: Lambda, bound: dict[str, Any]) -> None:
    account.capacity = dict.fromkeys(account.capacity, 0)
    with pytest.raises(ApiError, match=rf"b200-1: no capacity for {B200} in us-east-1, asked [13] times: run it again"):
        run.present(**bound)
    assert account.count("POST", LAUNCH) == (3 if "capacity_retries" in bound else 1)


def test_what_was_launched_before_a_refusal_is_finished_and_named(run: Run, account: Lambda) -> None:
    account.capacity["us-east-1"] = 1
    said = r"b200-2: no capacity .* \(b200-1 was launched, and costs from now on\)"
    with pytest.raises(ApiError, match=said):
        run.present(names=["b200-1", "b200-2"], capacity_retries=0)
    assert account.instances[0]["ip"] in run.text("known_hosts")


@pytest.mark.parametrize(
    "fault", [Fault(".*", "GET", status=429, headers={"Retry-After": "1"}), Fault("instances", status=503)]
)
def test_limits_and_faults_of_the_server_are_waited_out(run: Run, account: Lambda, fault: Fault) -> None:
    account.faults = [Fault(**vars(fault)), Fault(LAUNCH, "POST", status=429, times=2)]
    assert run.present(patience=10)["changed"]
    assert len(account.instances) == 1 and account.count("POST", LAUNCH) == 3


def test_the_servers_pace_is_kept(account: Lambda, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_cloud, "PACE", 0.25)
    monkeypatch.setattr(lambda_cloud, "LAUNCH_PACE", 1.2)
    account.pace, account.launch_pace = 0.2, 1.0
    run.present(names=["b200-1", "b200-2"])
    assert account.limited == 0 and account.count("POST", LAUNCH) == 2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"type": "gpu_8x_b200"}, "Lambda Cloud has no type gpu_8x_b200: did you mean gpu_8x_b200_sxm6?"),
    "region": ({"regions": ["us-eest-1"]}, "Lambda Cloud has no region us-eest-1: did you mean us-west-1?"),
    "no region": ({"regions": []}, "no region is named: set glm_launch_region to one of europe-central-1, us-east-1"),
    "image": ({"image_family": "gpu-base-24-4"}, "us-east-1: Lambda Cloud has no image family gpu-base-24-4: did you"),
    "ssh key": ({"ssh_key": "opps"}, "Lambda Cloud has no SSH key opps: did you mean ops?"),
    "name": ({"names": ["b200 1"]}, "'b200 1' is no name for an instance"),
    "twice": ({"names": ["b200-1", "b200-1"]}, "an instance is named twice: b200-1, b200-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_launches_nothing(run: Run, account: Lambda, name: str) -> None:
    args, says = BAD[name]
    with pytest.raises(Refused) as refused:
        run.present(**args)
    assert str(refused.value).startswith(says) and "\n" not in str(refused.value)
    assert account.count("POST", LAUNCH) == 0


CODES = [code for code, (status, _) in lambda_server.MESSAGES.items() if status < 500]


@pytest.mark.parametrize("code", CODES)
def test_each_error_of_the_api_is_one_line(run: Run, account: Lambda, code: str) -> None:
    account.faults = [Fault(LAUNCH, "POST", code=code)]
    with pytest.raises(ApiError) as refused:
        run.present(capacity_retries=0)
    line = str(refused.value)
    assert "\n" not in line and TOKEN not in line and line.startswith("b200-1: ")
    if code != lambda_cloud.NO_CAPACITY:
        assert f"({code})" in line


def test_an_instance_of_another_type_or_two_of_one_name_are_no_match(run: Run, account: Lambda) -> None:
    account.add("b200-1", type="gpu_1x_h100_sxm5")
    with pytest.raises(Refused, match="b200-1 is there, and is a gpu_1x_h100_sxm5, no gpu_8x_b200_sxm6"):
        run.present()
    account.add("b200-2")
    account.add("b200-2")
    with pytest.raises(Refused, match="two instances are named b200-2"):
        run.present(names=["b200-2"])


def test_an_instance_that_somebody_else_launched_is_not_trusted(run: Run, account: Lambda) -> None:
    account.add("b200-1")
    (run.directory / "hosts").mkdir(parents=True)
    (run.directory / "hosts/b200-1.pub").write_text("ssh-ed25519 AAAA b200-1\n")
    done = run.present()
    assert done["instances"][0]["host_key"] is False and not (run.directory / "known_hosts").exists()


def test_two_runs_of_one_inventory_exclude_each_other(run: Run) -> None:
    with run.fleet().alone(check=False), pytest.raises(Refused, match="another run launches or gives back"):
        run.present()


# --- give back ---


def test_only_what_is_named_is_given_back(run: Run, account: Lambda) -> None:
    account.add("other")
    run.present(names=["b200-1", "b200-2"])
    ip = account.instances[1]["ip"]
    account.ends = 0.5
    done = run.absent(names=["b200-1"])
    assert (done["terminate"], done["changed"]) == (["b200-1"], True)
    assert [entry["name"] for entry in account.instances] == ["other", "b200-2"]
    assert ip not in run.text("known_hosts") and len(run.text("known_hosts").splitlines()) == 1
    assert sorted(path.name for path in (run.directory / "hosts").iterdir()) == [".lock", "b200-2.pub"]
    assert "waiting until gone: b200-1 (terminating)" in run.said


def test_an_unknown_name_gives_nothing_back(run: Run, account: Lambda) -> None:
    account.add("b200-1")
    with pytest.raises(Refused, match="Lambda Cloud has no instance b200-9: did you mean b200-1"):
        run.absent(names=["b200-1", "b200-9"])
    assert account.count("POST", TERMINATE) == 0


def test_of_two_with_one_name_the_id_says_which(run: Run, account: Lambda) -> None:
    one, two = account.add("b200-1"), account.add("b200-1")
    with pytest.raises(Refused, match="2 instances are named b200-1: name one by its id"):
        run.absent()
    run.absent(names=[one["id"]])
    assert [entry["id"] for entry in account.instances] == [two["id"]]


def test_an_instance_that_cannot_be_terminated_now_is_refused(run: Run, account: Lambda) -> None:
    blocked = {"available": False, "reason_code": "vm-action-in-progress", "reason_description": "it restarts"}
    account.add("b200-1")["actions"]["terminate"] = blocked
    with pytest.raises(Refused, match="b200-1: Lambda Cloud does not terminate it now: it restarts"):
        run.absent()


@pytest.mark.parametrize("done", [True, False])
def test_a_lost_answer_to_a_termination(run: Run, account: Lambda, done: bool) -> None:
    account.add("b200-1")
    account.faults = [Fault(TERMINATE, "POST", done=done)]
    run.absent()
    assert not account.instances


def test_what_does_not_go_is_said_within_a_bound(run: Run, account: Lambda) -> None:
    account.add("b200-1")
    account.ends = 3600
    with pytest.raises(ApiError, match=r"b200-1 \(terminating\) was not gone within 0 s"):
        run.absent(wait_timeout=0)


def test_check_mode_gives_nothing_back(run: Run, account: Lambda) -> None:
    account.add("b200-1")
    assert run.absent(check=True)["terminate"] == ["b200-1"]
    assert account.count("POST", TERMINATE) == 0


# --- firewall ---

OURS = "glm-fleet lambda: clients"


def rule(source: str, port: int = 8000, description: str = OURS) -> dict[str, Any]:
    ports = {"port_range": [port, port]}
    return {"protocol": "tcp", **ports, "source_network": source, "description": description}


def bring(account: Lambda, *networks: str, check: bool = False) -> bool:
    api = Api(TOKEN, account.url, patience=3)
    wanted = [lambda_firewall.network(network) for network in networks]
    before, after = lambda_firewall.bring(api, wanted, 8000, OURS, check=check)
    return before != after


def test_other_rules_are_kept_and_a_second_run_changes_nothing(account: Lambda) -> None:
    account.rules += [rule("203.0.113.0/24", 9000, "theirs"), {**rule("0.0.0.0/0", 80, "web"), "unknown": [1]}]
    others = [dict(entry) for entry in account.rules]
    assert bring(account, "198.51.100.0/24", "203.0.113.7", check=True) and account.rules == others
    assert bring(account, "198.51.100.0/24", "203.0.113.7")
    assert account.rules == [*others, rule("198.51.100.0/24"), rule("203.0.113.7/32")]
    assert not bring(account, "198.51.100.0/24", "203.0.113.7")
    assert account.count("PATCH", "firewall-rulesets/global") == 1
    # A network that is no longer named loses its way in.
    assert bring(account, "198.51.100.0/24")
    assert account.rules == [*others, rule("198.51.100.0/24")]


def test_a_network_that_a_rule_of_somebody_lets_in_needs_none(account: Lambda) -> None:
    account.rules.append(rule("203.0.113.7", description="by hand"))  # the API takes a bare address for /32
    assert not bring(account, "203.0.113.7/32")


def test_a_lost_answer_of_the_firewall_is_asked_again(account: Lambda) -> None:
    account.faults = [Fault("firewall-rulesets/global", "PATCH", status=502, done=True)]
    assert bring(account, "203.0.113.0/24")
    assert account.rules == [*DEFAULT_RULES, rule("203.0.113.0/24")]


def test_rules_that_cannot_be_read_are_not_written(account: Lambda) -> None:
    account.faults = [Fault("firewall-rulesets/global", status=200, times=50)]
    with pytest.raises(ApiError):
        bring(account, "203.0.113.0/24")
    assert account.rules == DEFAULT_RULES


@pytest.mark.parametrize("text", ["203.0.113.7/24", "2001:db8::/32", "office", ""])
def test_a_network_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=re.escape(f"glm_launch_networks: {text!r} is no IPv4 network")):
        lambda_firewall.network(text)


# --- the API's client ---


def test_a_token_goes_to_https_or_this_machine_alone() -> None:
    with pytest.raises(Refused, match="the API key would cross the network in the clear"):
        Api(TOKEN, "http://lambda.example/api/v1")


def test_a_redirection_is_not_followed_with_the_token(account: Lambda) -> None:
    account.faults = [Fault("instances", status=301, headers={"Location": "http://127.0.0.1:1/"})]
    with pytest.raises(ApiError, match="the API has moved"):
        Api(TOKEN, account.url).instances()


@pytest.mark.parametrize("value", ["two words", "a\nb", "schlüssel"])
def test_a_token_that_is_none_is_refused_without_a_word_of_it(value: str) -> None:
    with pytest.raises(Refused) as refused:
        lambda_cloud.read_token(value, "", str)
    assert value not in str(refused.value)


def test_a_token_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o640)
    with pytest.raises(Refused, match="chmod 600"):
        lambda_cloud.read_token("", str(path), str)
    path.chmod(0o600)
    assert lambda_cloud.read_token("", str(path), str) == TOKEN
    assert lambda_cloud.read_token("given", str(path), str) == "given"


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(lambda_cloud.Unavailable) as refused:
        Api(TOKEN, "http://127.0.0.1:1/api/v1", patience=0).instances()
    assert "Connection refused" in str(refused.value) and "\n" not in str(refused.value)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert lambda_cloud.retry_after({"Retry-After": "7"}) == 7
    assert lambda_cloud.retry_after({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0
    assert lambda_cloud.retry_after({"Retry-After": "soon"}) == 0 == lambda_cloud.retry_after({})


def test_a_fingerprint_is_that_of_ssh(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "none") == ""
