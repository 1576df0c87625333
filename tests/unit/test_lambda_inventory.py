"""The inventory plugin, by the real ansible-inventory against a server made from the description of Lambda's API."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lambda_server
import pytest
from ansible_collections.glm.fleet.plugins.inventory import lambda_cloud as plugin
from lambda_server import JUPYTER, TOKEN, Fault, Lambda
from testbed import crowd

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PLUGIN = "plugin: glm.fleet.lambda_cloud\n"


@pytest.fixture
def account() -> Iterator[Lambda]:
    with lambda_server.running() as account:
        account.pace = 1.0
        yield account


class Inventory:
    """A directory with the plugin's file, and the environment in which it is read."""

    def __init__(self, account: Lambda, directory: Path) -> None:
        self.account, self.directory = account, directory
        self.environment = {"LAMBDA_API_URL": account.url, "LAMBDA_API_KEY": TOKEN}
        self.write("")

    def write(self, options: str) -> None:
        (self.directory / "lambda.lambda_cloud.yml").write_text(PLUGIN + options)

    def run(self, *arguments: str, source: Path | None = None) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LAMBDA_")}
        done = subprocess.run(
            [BIN / "ansible-inventory", "-i", source or self.directory / "lambda.lambda_cloud.yml", *arguments],
            cwd=ROOT, env={**inherited, **self.environment, "COLUMNS": "1000"}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        for secret in (TOKEN, JUPYTER, "jupyter"):
            assert secret not in done.stdout + done.stderr
        return done

    def listed(self, source: Path | None = None) -> dict[str, Any]:
        done = self.run("--list", "--export", source=source)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(re.sub(r'\{\s*"__ansible_unsafe": ("(?:[^"\\]|\\.)*")\s*\}', r"\1", done.stdout)))

    def refused(self) -> str:
        """The one line of the plugin, in what Ansible makes of it."""
        done = self.run("--graph")
        assert done.returncode != 0
        path = re.escape(str(self.directory / "lambda.lambda_cloud.yml"))
        found = re.findall(
            rf"^\[WARNING\]: Failed to parse inventory with 'auto' plugin: {path}: (.*)$", done.stderr, re.M
        )
        assert len(found) == 1, done.stderr
        return str(found[0])


@pytest.fixture
def inventory(account: Lambda, tmp_path: Path) -> Inventory:
    return Inventory(account, tmp_path)


def fill(account: Lambda) -> None:
    account.add("b200-1", tags={"glm-role": "node", "team": "a"})
    account.add("b200-2", tags={"glm-role": "node"}, region="us-west-1", type="gpu_1x_h100_sxm5")
    account.add("gw 1", tags={"glm-role": "gateway"}, type="cpu_4x_general")
    account.add("b200-3", status="booting", tags={"glm-role": "node"})
    account.add("by-hand")
    account.add("{{ 7 * 7 }}", tags={"x1": "{{ lookup('pipe', 'id') }}"})


def test_hosts_have_names_addresses_and_groups_and_no_secret(account: Lambda, inventory: Inventory) -> None:
    fill(account)
    found = inventory.listed()
    hostvars = found["_meta"]["hostvars"]
    assert found["nodes"]["hosts"] == ["b200-1", "b200-2"] and found["gateways"]["hosts"] == ["gw-1"]
    assert set(hostvars) == {"b200-1", "b200-2", "gw-1", "by-hand", "7-7"}  # only active ones
    node = hostvars["b200-1"]
    assert (node["ansible_host"], node["glm_node_address"]) == ("198.18.0.1", "10.19.0.1")
    assert (node["lambda_region"], node["lambda_type"]) == ("us-east-1", "gpu_8x_b200_sxm6")
    assert node["lambda_tags"] == {"glm-role": "node", "team": "a"}
    # What the account's users wrote is data, never a template.
    assert hostvars["7-7"]["lambda_tags"] == {"x1": "{{ lookup('pipe', 'id') }}"}
    assert len(account.requests) == 1


FILTERS = {
    "regions: [us-west-1]": ["b200-2"],
    "types: [gpu_8x_b200_sxm6]": ["7-7", "b200-1", "by-hand"],
    "statuses: [booting]": ["b200-3"],
    "names: ['b200-*', 'gw*']": ["b200-1", "b200-2", "gw-1"],
    "tags: {team: a}": ["b200-1"],
    "tags: {glm-role: ''}": ["b200-1", "b200-2", "gw-1"],
}


def test_filters(account: Lambda, inventory: Inventory) -> None:
    """Each in a file of its own, whose hosts are in a group of its own."""
    fill(account)
    (inventory.directory / "lambda.lambda_cloud.yml").unlink()
    for number, options in enumerate(FILTERS):
        text = f"{PLUGIN}{options}\ngroups: {{found_{number}: 'true'}}\n"
        (inventory.directory / f"{number}.lambda_cloud.yml").write_text(text)
    found = inventory.listed(source=inventory.directory)
    assert [sorted(found[f"found_{number}"]["hosts"]) for number in range(len(FILTERS))] == list(FILTERS.values())
    assert account.limited == 0


def test_what_is_composed(account: Lambda, inventory: Inventory) -> None:
    fill(account)
    inventory.write(
        "node_names: ['by-*']\ngateway_tags: {}\n"
        "compose: {ansible_user: \"'ubuntu'\", glm_node_address: ansible_host}\n"
        "groups: {west: lambda_region == 'us-west-1'}\nkeyed_groups: [{key: lambda_region, prefix: region}]\n"
    )
    found = inventory.listed()
    assert found["nodes"]["hosts"] == ["b200-1", "b200-2", "by-hand"] and "gateways" not in found
    assert found["west"]["hosts"] == found["region_us_west_1"]["hosts"] == ["b200-2"]
    assert found["_meta"]["hostvars"]["b200-2"]["glm_node_address"] == "198.18.0.2"
    inventory.write("strict: true\ncompose: {x: not_there.y}\n")
    assert "Could not set x for host" in inventory.run("--graph").stderr


def test_two_of_one_name_are_told_apart_and_named(account: Lambda, inventory: Inventory) -> None:
    account.add("b200-1", tags={"glm-role": "node"})
    account.add("b200-1", tags={"glm-role": "node"})
    account.add("", tags={"glm-role": "node"})
    done = inventory.run("--graph", "nodes")
    assert done.stderr.count("2 instances are named b200-1: their hosts are b200-1-ID") == 1
    hosts = re.findall(r"--([\w-]+)$", done.stdout, re.M)
    assert hosts == ["00000002a1b2c3d4a1b2c3d4a1b2c3d4", "b200-1-00000000", "b200-1-00000001"]


def test_hosts_whose_key_is_known_are_asked_for_it(account: Lambda, inventory: Inventory) -> None:
    fill(account)
    (inventory.directory / "keys").mkdir()
    (inventory.directory / "keys/known_hosts").write_text("198.18.0.2 ssh-ed25519 AAAA\n")
    found = inventory.listed()
    assert found["lambda_launched"]["hosts"] == ["b200-2"]
    arguments = found["lambda_launched"]["vars"]["ansible_ssh_common_args"]
    assert arguments == f"-o 'UserKnownHostsFile=\"{inventory.directory}/keys/known_hosts\"'"


BAD = {
    "option": ("region: us-east-1", "the plugin has no option region: did you mean regions?"),
    "region": ("regions: [us-eest-1]", "regions: Lambda Cloud has no region us-eest-1: did you mean us-west-1?"),
    "type": ("types: [gpu_8x_b200]", "types: Lambda Cloud has no type gpu_8x_b200: did you mean gpu_8x_b200_sxm6?"),
    "url": ("api_url: http://198.51.100.1/api/v1", "http://198.51.100.1/api/v1: the API key would cross the network"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_line(account: Lambda, inventory: Inventory, name: str) -> None:
    options, says = BAD[name]
    if name == "url":
        del inventory.environment["LAMBDA_API_URL"]
    inventory.write(options)
    assert inventory.refused().startswith(says)


def test_a_wrong_and_a_missing_token_are_one_line(account: Lambda, inventory: Inventory) -> None:
    inventory.environment["LAMBDA_API_KEY"] = "wrong"
    assert inventory.refused() == (
        "Lambda Cloud: API key was invalid, expired, or deleted (global/invalid-api-key): make a key in the console "
        "(API keys), and put it where this one came from"
    )
    inventory.environment["LAMBDA_API_KEY"] = ""
    assert inventory.refused() == (
        f"there is no API key of Lambda Cloud: put the key into {inventory.directory}/keys/lambda-api-key (mode 0600), "
        "or set the environment variable LAMBDA_API_KEY"
    )


def test_the_token_of_a_file_and_of_a_vault(account: Lambda, inventory: Inventory) -> None:
    account.add("b200-1")
    inventory.environment["LAMBDA_API_KEY"] = ""
    keys = inventory.directory / "keys"
    keys.mkdir()
    (keys / "lambda-api-key").write_text(f"{TOKEN}\n")
    (keys / "lambda-api-key").chmod(0o644)
    assert "is open to others (mode 0644): chmod 600" in inventory.refused()
    (keys / "lambda-api-key").chmod(0o600)
    assert "b200-1" in inventory.run("--graph").stdout
    password = inventory.directory / "password"
    password.write_text("pass\n")
    vault = [str(BIN / "ansible-vault"), "encrypt", "--vault-password-file", str(password)]
    subprocess.run([*vault, str(keys / "lambda-api-key")], check=True, capture_output=True)
    (keys / "lambda-api-key").chmod(0o644)  # as git gives an encrypted file back
    assert "b200-1" in inventory.run("--graph", "--vault-password-file", str(password)).stdout
    (keys / "lambda-api-key").unlink()
    encrypted = subprocess.run(
        [*vault[:1], "encrypt_string", *vault[2:], "--name", "token", TOKEN], check=True, capture_output=True, text=True
    ).stdout
    inventory.write(encrypted)
    assert "b200-1" in inventory.run("--graph", "--vault-password-file", str(password)).stdout


@pytest.mark.parametrize(
    "fault", [Fault("instances", status=429, headers={"Retry-After": "2"}), Fault("instances", status=503)]
)
def test_429_and_5xx_are_waited_out(account: Lambda, inventory: Inventory, fault: Fault) -> None:
    account.add("b200-1")
    account.faults = [Fault(**vars(fault))]
    assert "b200-1" in inventory.run("--graph").stdout
    assert account.count("GET", "instances") == 2 and account.limited == 0


def test_they_are_not_waited_out_for_longer_than_is_set(account: Lambda, inventory: Inventory) -> None:
    account.faults = [Fault("instances", status=429, headers={"Retry-After": "3600"}, times=9)]
    inventory.write("patience: 2")
    assert inventory.refused().endswith("too many requests (429), waited 2 s for it")


CACHED = (
    "cache: true\ncache_plugin: ansible.builtin.jsonfile\npatience: 0\ncache_connection: {}/cache\ncache_timeout: {}\n"
)


@pytest.mark.parametrize(("timeout", "asked"), [(3600, 1), (1, 2)], ids=["valid", "expired"])
def test_the_cache_is_enough_while_the_api_is_down(
    account: Lambda, inventory: Inventory, timeout: int, asked: int
) -> None:
    fill(account)
    account.pace = 0.0  # without patience, a second run on a fast machine would be told to wait
    inventory.write(CACHED.format(inventory.directory, timeout))
    first = inventory.listed()
    time.sleep(1.5)
    account.faults = [Fault("instances", status=503, times=99)]
    assert inventory.listed() == first
    assert account.count("GET", "instances") == asked
    said = inventory.run("--graph", "--flush-cache").stderr  # it asks, whatever the cache says
    assert said.count("the hosts are those of the cache, and may be old") == 1
    account.faults = [Fault("instances", code="global/invalid-api-key", times=99)]
    if timeout == 1:
        assert inventory.refused().startswith("Lambda Cloud: API key was invalid")


def test_the_cache_holds_no_secret_and_another_filter_needs_no_request(account: Lambda, inventory: Inventory) -> None:
    fill(account)
    inventory.write(CACHED.format(inventory.directory, 3600))
    inventory.run("--graph")
    texts = [path.read_text() for path in (inventory.directory / "cache").iterdir()]
    assert len(texts) == 1 and "198.18.0.1" in texts[0]
    assert not [secret for secret in (JUPYTER, TOKEN, "jupyter") if secret in texts[0]]
    inventory.write(CACHED.format(inventory.directory, 3600) + "statuses: [booting]\n")
    assert set(inventory.listed()["_meta"]["hostvars"]) == {"b200-3"}
    assert len(account.requests) == 1


def test_no_cache_and_no_api_is_one_line(account: Lambda, inventory: Inventory) -> None:
    account.faults = [Fault("instances", times=99)]
    inventory.write(CACHED.format(inventory.directory, 3600))
    line = inventory.refused()
    assert line.startswith(f"{account.url}/instances: ") and "waited 0 s" in line


def test_500_instances_cost_little_time_and_no_secret(account: Lambda, inventory: Inventory) -> None:
    for number in range(500):
        account.add(f"n-{number}", tags={"glm-role": "gateway" if number % 50 == 0 else "node"})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = inventory.run("--graph")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Beside other work the wall time says nothing, and what shares a core's caches costs computing time too.
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert len(re.findall(r"--n-\d+$", done.stdout, re.M)) == 500
    assert len(account.requests) == 1 and spent < 2.0 * crowd()
    assert len(inventory.listed()["_meta"]["hostvars"]) == 500


def test_the_file_of_the_project_is_read(account: Lambda, tmp_path: Path) -> None:
    """inventory/lambda-cloud as it is, but for the place of its cache."""
    fill(account)
    environment = {"LAMBDA_API_URL": account.url, "LAMBDA_API_KEY": TOKEN, "HOME": str(tmp_path)}
    done = subprocess.run(
        [BIN / "ansible-inventory", "-i", "inventory/lambda-cloud", "--graph", "nodes"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert re.findall(r"--([\w-]+)$", done.stdout, re.M) == ["b200-1", "b200-2"]
    assert list((tmp_path / ".cache/glm-fleet/inventory").iterdir())


def test_a_name_is_made_one_that_no_pattern_is() -> None:
    made = [plugin.host_name({"name": name, "id": "i-1"}) for name in ("My Instance", "a:b,c!", "", " - ", "gpu_1.x")]
    assert made == ["My-Instance", "a-b-c", "i-1", "i-1", "gpu_1.x"]
