"""What a host does to itself: the findings, and the files that keep it away from what serves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from ansible_collections.glm.fleet.plugins.filter.updates import update_findings
from ansible_collections.glm.fleet.plugins.modules import node_info

ROOT = Path(__file__).resolve().parents[2]


def render(name: str, **values: Any) -> str:
    environment = jinja2.Environment(autoescape=False, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["comment"] = lambda text, *_: f"# {text}"
    text = (ROOT / "templates" / name).read_text()
    return environment.from_string(text).render(ansible_managed="Ansible managed", **values)


@pytest.mark.parametrize(
    ("dump", "reboots"),
    [
        ('Unattended-Upgrade::Automatic-Reboot "true";\n', True),
        ('Unattended-Upgrade::Automatic-Reboot "1";\n', True),
        ('Unattended-Upgrade::Automatic-Reboot "false";\n', False),
        ('Unattended-Upgrade::Automatic-Reboot-Time "02:00";\n', False),
        ("", False),
    ],
)
def test_apt_s_own_words_for_an_automatic_reboot(dump: str, reboots: bool) -> None:
    assert node_info.parse_apt_flag(dump, "Unattended-Upgrade::Automatic-Reboot") is reboots


def test_a_host_that_reboots_by_itself_is_refused_unless_the_user_says_otherwise() -> None:
    (finding,) = update_findings({"automatic_reboot": True}, "refuse")
    assert finding["id"] == "automatic_reboot"
    assert finding["fix"] == "set glm_automatic_reboot: disable to have it switched off, or keep to accept it"
    assert update_findings({"automatic_reboot": True}, "disable") == []
    assert update_findings({"automatic_reboot": True}, "keep") == []
    assert update_findings({"automatic_reboot": False}, "refuse") == []
    assert update_findings({}, "refuse") == []


def test_needrestart_leaves_alone_what_serves() -> None:
    said = re.findall(r"^\$nrconf\{override_rc\}\{qr\((.+)\)\} = 0;$", render("needrestart.conf.j2"), re.MULTILINE)
    units = ("glm-engine.service", "glm-watchdog.timer", "haproxy.service", "docker.service", "containerd.service")
    assert all(any(re.search(pattern, unit) for pattern in said) for unit in units)
    assert not any(re.search(pattern, "ssh.service") for pattern in said)


def test_unattended_upgrades_pass_over_what_serves() -> None:
    text = render("unattended-upgrades.conf.j2", system_updates_automatic_reboot="refuse")
    said = re.findall(r'^  "(.+)";$', text, re.MULTILINE)
    packages = ("haproxy", "docker-ce", "docker-ce-cli", "docker.io", "containerd", "containerd.io", "runc")
    # unattended-upgrades matches from the beginning of a name.
    assert all(any(re.match(pattern, package) for pattern in said) for package in packages)
    assert not any(re.match(pattern, package) for pattern in said for package in ("libssl3t64", "openssh-server"))
    assert "Automatic-Reboot" not in text
    text = render("unattended-upgrades.conf.j2", system_updates_automatic_reboot="disable")
    assert 'Unattended-Upgrade::Automatic-Reboot "false";' in text
