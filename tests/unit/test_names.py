"""Names and addresses of an inventory."""

from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.filter.names import (
    differing_settings,
    results_problems,
    role_variables,
    share_problems,
    unknown_variables,
    variables_of_roles,
)

ROLES = variables_of_roles(str(Path(__file__).resolve().parents[2] / "roles"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("inference_service_port", "an inventory cannot set this: set glm_engine_port instead"),
        ("inference_service_extra_env", "an inventory cannot set this: set glm_engine_extra_env instead"),
        ("container_runtime_proxies", "an inventory cannot set this: set glm_http_proxy and glm_no_proxy instead"),
        ("inference_service_node", "an inventory cannot set this: the project sets it itself, remove it"),
        ("inference_service_extra_arg", "there is no such setting: did you mean glm_engine_extra_args?"),
        ("report_directory", "an inventory cannot set this: set glm_results_dir instead"),
        ("preflight_node", "an inventory cannot set this: the project sets it itself, remove it"),  # a fact
        ("ansible_pipelining", ""),
        ("ansible_ssh_pipelining", ""),
        ("rotation_max_sesions", ""),
        ("inference_service_gpu_devise", "there is no such setting: did you mean inference_service_gpu_device?"),
        ("inference_service_gpu_device", ""),  # an option that an inventory can set
        ("gateway_address", ""),  # somebody else's
        ("report_email", ""),
        ("glm_prot", ""),  # unknown_variables has it
        ("ansible_host", ""),
    ],
)
def test_a_variable_of_a_role_is_set_or_refused(name: str, line: str) -> None:
    assert role_variables([name], ROLES) == ([f"{name}: {line}"] if line else [])


def test_a_place_for_reports_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert results_problems(str(tmp_path / "results/lambda")) == []
    (tmp_path / "file").touch()
    assert "/file/lambda cannot be written" in results_problems(str(tmp_path / "file/lambda"))[0]


def test_a_setting_of_the_fleet_that_one_host_sets_alone_is_named() -> None:
    hostvars = {"a": {"glm_image": "x:1", "glm_model": "m"}, "b": {"glm_model": "m"}}
    found = differing_settings(["a", "b"], hostvars, ["glm_image", "glm_model"])
    assert len(found) == 1 and found[0].startswith("glm_image: differs")


def test_the_same_setting_everywhere_is_no_finding() -> None:
    assert differing_settings(["a", "b"], {"a": {"glm_image": "x"}, "b": {"glm_image": "x"}}, ["glm_image"]) == []


@pytest.mark.parametrize("name", ["glm_weights_share", "glm_weights_share_port", "glm_weights_share_rate"])
def test_a_setting_that_has_another_name_by_now_is_told(name: str) -> None:
    now = name.replace("_weights", "")
    assert unknown_variables([name], [now, "glm_weights_sources"]) == [
        f"{name}: there is no such setting: it is {now} now"
    ]


@pytest.mark.parametrize(("share", "address", "found"), [
    (True, "node-1.example", 1), ("yes", "node-1.example", 1), ("false", "node-1.example", 0),
    (None, "node-1.example", 0), (True, "198.18.0.1", 0), (True, "fd00::1", 0),
])  # fmt: skip
def test_nodes_that_share_are_known_by_an_ip_address(share: object, address: str, found: int) -> None:
    hostvars: dict[str, dict[str, object]] = {
        "node-1": {"ansible_host": address, "glm_share": share},
        "node-2": {"ansible_host": "198.18.0.2"},
    }
    problems = share_problems(["node-1", "node-2"], hostvars)
    assert len(problems) == found
    assert all("node-1.example is a name: set glm_node_address for it" in problem for problem in problems)
    assert share_problems(["node-1"], hostvars) == []
