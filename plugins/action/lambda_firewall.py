"""Action plugin: let named networks through Lambda Cloud's firewall, and leave all other rules as they are."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from ansible_collections.glm.fleet.plugins.plugin_utils.lambda_cloud import ENVIRONMENT, URL, Api, ApiError, read_token
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused

SPEC = {
    "networks": {"type": "list", "elements": "str", "required": True},
    "port": {"type": "int", "required": True},
    "description": {"type": "str", "required": True},
    "api_key_file": {"type": "path", "default": ""},
    "api_url": {"type": "str", "default": URL},
    "patience": {"type": "int", "default": 120},
}
PATH = "firewall-rulesets/global"
LONGEST = 128  # characters of a description


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=SPEC)
        try:
            networks = [network(text) for text in args["networks"]]
            token = read_token(os.environ.get(ENVIRONMENT, ""), args["api_key_file"], self._loader.get_real_file)
            api = Api(token, args["api_url"], patience=args["patience"], later=True)
            before, after = bring(
                api, networks, args["port"], args["description"][:LONGEST], check=bool(self._task.check_mode)
            )
        except Refused as problem:
            said = str(problem)
            return {**result, "failed": True, "msg": said, "failure": failure("lambda_firewall", said)}
        diff = {"before": text(before), "after": text(after), "before_header": PATH, "after_header": PATH}
        return {**result, "changed": after != before, "diff": diff, "rules": after}


def network(text: str) -> str:
    """As the API writes it. Raises Refused."""
    try:
        return str(ipaddress.IPv4Network(text.strip()))
    except ValueError as problem:
        raise Refused(f"glm_launch_networks: {text!r} is no IPv4 network: {problem}: write 203.0.113.0/24") from None


def bring(
    api: Api, networks: Iterable[str], port: int, description: str, *, check: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rules before and after. Others are sent as they were read.

    The API has no way to change one rule alone, nor to see that nobody else has changed them meanwhile: they are read
    right before, and the answer is compared.
    """
    before = rules_of(api.get(PATH))
    after = merged(before, networks, port, description)
    if after == before or check:
        return before, after
    now = rules_of(api.patch(PATH, {"rules": after}))
    if missing := [rule for rule in after if key(rule) not in map(key, now)]:
        raise ApiError(f"the firewall does not have what was sent: {lines(missing)[0]} is missing: see the console")
    return before, after


def rules_of(ruleset: Any) -> list[dict[str, Any]]:
    rules = ruleset.get("rules") if isinstance(ruleset, Mapping) else None
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise ApiError(f"{PATH}: the answer holds no rules: nothing was changed")
    return [dict(rule) for rule in rules]


def merged(
    rules: Iterable[Mapping[str, Any]], networks: Iterable[str], port: int, description: str
) -> list[dict[str, Any]]:
    """With a rule for each network; those with this description whose network is no longer named are left out."""
    wanted = {
        key(rule): rule
        for name in networks
        for rule in [
            {"protocol": "tcp", "port_range": [port, port], "source_network": name, "description": description}
        ]
    }
    kept = [dict(rule) for rule in rules if rule.get("description") != description or key(rule) in wanted]
    there = {key(rule) for rule in kept}
    return kept + [rule for identity, rule in wanted.items() if identity not in there]


def key(rule: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a rule lets through."""
    source = str(rule.get("source_network", ""))
    return rule.get("protocol"), tuple(rule.get("port_range") or ()), source if "/" in source else f"{source}/32"


def text(rules: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{line}\n" for line in lines(rules))


def lines(rules: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"{rule.get('protocol')} {'-'.join(map(str, rule.get('port_range') or ['all']))} from "
        f"{rule.get('source_network')}: {rule.get('description')}"
        for rule in rules
    ]
