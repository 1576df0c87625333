"""What a node is like once site.yml has run over it, read on the node itself."""

from __future__ import annotations

import json
import stat
from typing import Any

import pytest
from testinfra.host import Host

RELEASES = "/opt/glm/releases"


@pytest.fixture(scope="module")
def release(host: Host) -> dict[str, Any]:
    return dict(json.loads(host.file("/opt/glm/current/release.json").content_string))


@pytest.mark.parametrize("name", ["docker.service", "glm-engine.service", "haproxy.service", "glm-watchdog.timer"])
def test_service_runs_and_starts_at_boot(host: Host, name: str) -> None:
    service = host.service(name)
    assert service.is_running
    assert service.is_enabled


def test_the_state_says_that_the_current_release_serves(host: Host, release: dict[str, Any]) -> None:
    state = json.loads(host.file("/var/lib/glm/state.json").content_string)
    assert state["phase"] == "serving"
    assert host.file("/opt/glm/current").linked_to == f"{RELEASES}/{state['release']}"


def test_the_container_runs_the_digest_of_the_release(host: Host, release: dict[str, Any]) -> None:
    with host.sudo():
        image = host.check_output("docker inspect --format '{{.Config.Image}}' glm-engine")
    assert "@sha256:" in image
    assert image in host.file("/opt/glm/current/run").content_string


def test_no_key_and_no_secret_is_on_the_node(host: Host) -> None:
    """The edge keeps hashes; keys are in no file, no argument list and no label."""
    with host.sudo():
        found = host.run(
            "grep -rls 'sk-glm[-]' /etc /opt/glm /var/lib/glm /run/haproxy /var/log 2>/dev/null;"
            " ps -eo args | grep -v grep | grep 'sk-glm[-]'; docker inspect glm-engine | grep 'sk-glm[-]';"
            " journalctl --no-pager | grep 'sk-glm[-]'"
        )
    assert found.stdout == ""


@pytest.mark.parametrize("path", ["/opt/glm/current/engine.env", "/etc/glm/gateway/keys.map"])
def test_private_files_are_0600(host: Host, path: str) -> None:
    with host.sudo():
        assert stat.S_IMODE(host.file(path).mode) == 0o600


def test_only_the_edge_listens_beyond_loopback(host: Host) -> None:
    with host.sudo():
        listening = {line.split()[3] for line in host.check_output("ss -Hltn").splitlines()}
    outside = {address.rpartition(":")[2] for address in listening if not address.startswith(("127.", "[::1]"))}
    assert outside == {"22", "8000"}


def test_the_gpus_are_given_by_cdi(host: Host) -> None:
    assert "--device nvidia.com/gpu=all" in host.file("/opt/glm/current/run").content_string
    with host.sudo():
        assert host.check_output("docker exec glm-engine nvidia-smi -L | grep -c '^GPU'") == "8"


def test_the_weights_are_complete_and_nothing_partial_is_left(host: Host) -> None:
    models = "/var/lib/glm/models/zai-org--GLM-5.2-FP8"
    with host.sudo():
        assert host.check_output(f"ls {models}") == "1" * 40
        assert host.file(f"{models}/{'1' * 40}/.glm-manifest.json").exists


def test_the_engine_answers_through_the_edge_only_with_a_key(host: Host) -> None:
    status = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8000"
    assert host.check_output(f"{status}/v1/models") == "401"
    assert host.check_output(f"{status}/health") == "200"
    assert host.check_output(f"{status}/metrics") == "403"


def test_the_watchdog_has_looked_and_has_nothing_to_say(host: Host) -> None:
    with host.sudo():
        assert json.loads(host.file("/run/glm-watchdog/look.json").content_string)["progress"][0] > 0
        assert host.check_output("systemctl show --property Result --value glm-watchdog") == "success"
        assert host.check_output("journalctl --quiet --no-pager --unit glm-watchdog") == ""


def test_systemctl_status_tells_the_phase(host: Host, release: dict[str, Any]) -> None:
    with host.sudo():
        assert "serving glm-5.2-fp8" in host.check_output("systemctl show --property StatusText --value glm-engine")
