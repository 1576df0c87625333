"""Inventory plugin: the instances of a Lambda Cloud account."""

from __future__ import annotations

DOCUMENTATION = r"""
name: lambda_cloud
short_description: Instances of Lambda Cloud
description:
  - Reads the instances of an account by Lambda Cloud's public API, of which it makes one request a run, and two where a
    region or type of the filters is not among the instances.
  - Its file ends in C(lambda_cloud.yml) or C(lambda_cloud.yaml).
  - A host has the name of its instance, in which other characters than letters, digits, C(.), C(_) and C(-) become
    C(-). One without a name has its id. Of several with one name each gets C(-) and the first 8 digits of its id, and a
    line says so.
  - Of each host C(ansible_host) is the public address, C(glm_node_address) the private one, and C(lambda_id),
    C(lambda_name), C(lambda_status), C(lambda_region), C(lambda_type), C(lambda_cents_per_hour), C(lambda_hostname),
    C(lambda_tags) (a dictionary), C(lambda_ssh_keys) and C(lambda_file_systems) say what the API does. Its secrets
    C(jupyter_token) and C(jupyter_url) are dropped as they come.
  - Where the API cannot be reached and the cache has an entry, also an expired one, that is taken with a warning.
  - Written from the public OpenAPI description, version 1.10.0. It has never run against Lambda Cloud itself.
author: glm-fleet developers (!UNKNOWN)
extends_documentation_fragment: [constructed, inventory_cache]
options:
  plugin:
    description: Says that the file is for this plugin.
    type: str
    required: true
    choices: [glm.fleet.lambda_cloud]
  token:
    description: The API key. It is never shown. It may be encrypted by C(ansible-vault encrypt_string).
    type: str
    default: ""
    env: [{name: LAMBDA_API_KEY}]
  token_file:
    description:
      - A file with the API key, mode 0600, also encrypted by Ansible Vault. It counts where I(token) is empty.
      - A relative path begins at the file of this inventory.
    type: str
    default: keys/lambda-api-key
  api_url:
    description: The API, without a slash at its end.
    type: str
    default: https://cloud.lambda.ai/api/v1
    env: [{name: LAMBDA_API_URL}]
  patience:
    description: Seconds for which answers 429 and 5xx, and failed connections, are waited out.
    type: int
    default: 60
  regions:
    description: Only instances in these regions. Empty for all, as with the next ones.
    type: list
    elements: str
    default: []
  types:
    description: Only instances of these types.
    type: list
    elements: str
    default: []
  statuses:
    description: Only instances in these states.
    type: list
    elements: str
    choices: [booting, active, unhealthy, terminated, terminating, preempted]
    default: [active]
  names:
    description: Only instances whose name fits one of these patterns, such as C(b200-*).
    type: list
    elements: str
    default: []
  tags:
    description: Only instances with all these tags; an empty value stands for any.
    type: dict
    default: {}
  node_tags:
    description: An instance with all these tags is in the group C(nodes).
    type: dict
    default: {glm-role: node}
  node_names:
    description: So is one whose name fits one of these patterns.
    type: list
    elements: str
    default: []
  gateway_tags:
    description: An instance with all these tags is in the group C(gateways).
    type: dict
    default: {glm-role: gateway}
  gateway_names:
    description: So is one whose name fits one of these patterns.
    type: list
    elements: str
    default: []
  known_hosts:
    description:
      - A file of host keys, as playbooks/launch.yml writes it. A host whose address is in it is in the group
        C(lambda_launched), for which C(ansible_ssh_common_args) lets ssh ask this file alone. A relative path begins at
        the file of this inventory.
    type: str
    default: keys/known_hosts
"""

EXAMPLES = r"""
# inventory/lambda-cloud/lambda.lambda_cloud.yml: those that playbooks/launch.yml has launched, which have tags
plugin: glm.fleet.lambda_cloud

# --- another one: instances that were launched by hand, by their names
# plugin: glm.fleet.lambda_cloud
# regions: [us-east-1]
# node_names: ["b200-*"]
# gateway_names: ["gw-*"]
# compose: {ansible_user: "'ubuntu'"}
# keyed_groups: [{key: lambda_region, prefix: region}]
# cache: true
# cache_plugin: ansible.builtin.jsonfile
# cache_connection: ~/.cache/glm-fleet/lambda
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable, get_cache_plugin
from ansible_collections.glm.fleet.plugins.plugin_utils.lambda_cloud import Api, Unavailable, no_such, read_token
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused

LAUNCHED = "lambda_launched"  # the group of hosts whose key is known
VARIABLES = {
    "lambda_id": "id",
    "lambda_name": "name",
    "lambda_status": "status",
    "lambda_region": "region",
    "lambda_type": "type",
    "lambda_cents_per_hour": "cents_per_hour",
    "lambda_hostname": "hostname",
    "lambda_tags": "tags",
    "lambda_ssh_keys": "ssh_key_names",
    "lambda_file_systems": "file_system_names",
    "ansible_host": "ip",
    "glm_node_address": "private_ip",
}


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):  # type: ignore[misc]
    """The hosts are made of what is cached: instances without their secrets, before any filter."""

    NAME = "glm.fleet.lambda_cloud"

    def verify_file(self, path: str) -> bool:
        return bool(super().verify_file(path)) and path.endswith(("lambda_cloud.yml", "lambda_cloud.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        config = self._read_config_data(path)
        self._path = path
        try:
            self._check_names(config)
            chosen = self._chosen(self._instances(cache))
        except Refused as problem:
            raise AnsibleParserError(f"{path}: {problem}") from None
        self._add(chosen)

    def _check_names(self, config: Mapping[str, Any]) -> None:
        """Ansible passes over an option that it does not know."""
        for name in config:
            if name not in self._options:
                raise Refused(no_such("option", str(name), self._options).replace("Lambda Cloud", "the plugin", 1))

    def _beside(self, option: str) -> str:
        """A path of the options, absolute; empty stays empty."""
        path = os.path.expanduser(str(self.get_option(option)))
        return os.path.join(os.path.dirname(os.path.abspath(self._path)), path) if path else ""

    def _instances(self, cache: bool) -> list[dict[str, Any]]:
        """From the cache where it may be used and has them, else from the API."""
        caching, key = bool(self.get_option("cache")), self.get_cache_key(self._path)
        if caching and cache:
            try:
                return list(self._cache[key])
            except KeyError:
                pass
        try:
            # As it is read again, a task of the same run may have asked right before.
            found = self._api(later=not cache).instances()
        except Unavailable as problem:
            kept = self._expired(key) if caching else None
            if kept is None:
                raise
            self.display.warning(f"{self._path}: {problem}: the hosts are those of the cache, and may be old")
            return kept
        if caching:
            self._cache[key] = found
        return found

    def _expired(self, key: str) -> list[dict[str, Any]] | None:
        """What the cache has, however old it is."""
        options = {"_uri": self.get_option("cache_connection"), "_prefix": self.get_option("cache_prefix")}
        given = {name: value for name, value in options.items() if value is not None}
        try:
            return list(get_cache_plugin(self.get_option("cache_plugin"), _timeout=0, **given)[key])
        except KeyError:
            return None

    def _api(self, later: bool = False) -> Api:
        value = str(self.get_option("token") or "")
        token = read_token(value, self._beside("token_file"), self.loader.get_real_file)
        url, patience = str(self.get_option("api_url")), float(self.get_option("patience"))
        return Api(token, url, patience=patience, later=later)

    def _chosen(self, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
        regions, types, names = (self.get_option(name) for name in ("regions", "types", "names"))
        self._check_filters(regions, {entry["region"] for entry in instances}, "region")
        self._check_filters(types, {entry["type"] for entry in instances}, "type")
        return [
            entry
            for entry in instances
            if entry["status"] in self.get_option("statuses")
            and (not regions or entry["region"] in regions)
            and (not types or entry["type"] in types)
            and (not names or fits(entry["name"], names))
            and has_tags(entry, self.get_option("tags"))
        ]

    def _check_filters(self, wanted: Iterable[str], seen: set[str], what: str) -> None:
        """Raises Refused for a name that no instance has, and the API does not know either."""
        unseen = [name for name in wanted if name not in seen]
        if not unseen:
            return
        try:
            api = self._api()
            known = api.regions() if what == "region" else list(api.types())
        except Unavailable as problem:  # no reason to do without the hosts
            self.display.warning(f"{self._path}: it is not known whether there is a {what} {unseen[0]}: {problem}")
            return
        for name in unseen:
            if name not in known:
                raise Refused(f"{what}s: {no_such(what, name, known)}")

    def _add(self, instances: list[dict[str, Any]]) -> None:
        strict, known = self.get_option("strict"), self._known_hosts()
        groups = {"nodes": self.inventory.add_group("nodes")}  # there also where it is empty, as playbooks name it
        names = Counter(host_name(entry) for entry in instances)
        for name, count in names.items():
            if count > 1:
                self.display.warning(
                    f"{self._path}: {count} instances are named {name}: their hosts are {name}-ID, with the first 8 "
                    "digits of the id"
                )
        for entry in instances:
            host = host_name(entry)
            host = self.inventory.add_host(f"{host}-{entry['id'][:8]}" if names[host] > 1 else host)
            variables = {name: entry[field] for name, field in VARIABLES.items() if entry.get(field) is not None}
            if entry.get("ip") in known:
                self._trust(host)
            for name, value in variables.items():
                self.inventory.set_variable(host, name, value)
            for group, role in (("nodes", "node"), ("gateways", "gateway")):
                tags = self.get_option(f"{role}_tags")
                if (tags and has_tags(entry, tags)) or fits(entry["name"], self.get_option(f"{role}_names")):
                    if group not in groups:
                        groups[group] = self.inventory.add_group(group)
                    self.inventory.add_host(host, group=groups[group])
            self._set_composite_vars(self.get_option("compose"), variables, host, strict=strict)
            self._add_host_to_composed_groups(self.get_option("groups"), variables, host, strict=strict)
            self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, host, strict=strict)

    def _trust(self, host: str) -> None:
        """Of a group, so that the user's own group_vars outrank it."""
        group = self.inventory.add_group(LAUNCHED)
        self.inventory.set_variable(
            group, "ansible_ssh_common_args", f"-o 'UserKnownHostsFile=\"{self._beside('known_hosts')}\"'"
        )
        self.inventory.add_host(host, group=group)

    def _known_hosts(self) -> set[str]:
        """The addresses in the file of host keys."""
        try:
            with open(self._beside("known_hosts"), encoding="utf-8") as file:
                return {line.split()[0] for line in file if line.strip()}
        except OSError:
            return set()


def host_name(entry: Mapping[str, Any]) -> str:
    """A name that no pattern of Ansible is."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", entry["name"]).strip("-") or str(entry["id"])


def fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def has_tags(entry: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(key in entry["tags"] and value in ("", None, entry["tags"][key]) for key, value in wanted.items())
