"""Action plugin: launch named instances of Lambda Cloud, or terminate them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from ansible_collections.glm.fleet.plugins.plugin_utils.lambda_cloud import (
    ENVIRONMENT,
    GONE,
    NO_CAPACITY,
    URL,
    Api,
    ApiError,
    Unknown,
    dollars,
    no_such,
    read_token,
)
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused, write

SPEC = {
    "names": {"type": "list", "elements": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "type": {"type": "str", "default": ""},
    "regions": {"type": "list", "elements": "str", "default": []},
    "image_family": {"type": "str", "default": ""},
    "ssh_key": {"type": "str", "default": ""},
    "file_systems": {"type": "list", "elements": "str", "default": []},
    "tags": {"type": "dict", "default": {}},
    "keys_directory": {"type": "path", "required": True},
    "api_key_file": {"type": "path", "default": ""},
    "api_url": {"type": "str", "default": URL},
    "max_cents_per_hour": {"type": "int"},
    "capacity_retries": {"type": "int", "default": 20},
    "capacity_timeout": {"type": "int", "default": 1800},
    "capacity_pause": {"type": "int", "default": 60},
    "lost_timeout": {"type": "int", "default": 300},
    "wait_timeout": {"type": "int", "default": 1800},
    "patience": {"type": "int", "default": 120},
    "poll": {"type": "int", "default": 10},
}
KEY_TAG = "glm-host-key"  # the fingerprint of the host key that an instance was launched with
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HOST_NAME = re.compile(r"[a-z0-9][0-9a-z-]{0,62}")


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=SPEC)
        check = bool(self._task.check_mode)
        fleet = None
        try:
            token = read_token(os.environ.get(ENVIRONMENT, ""), args["api_key_file"], self._loader.get_real_file)
            fleet = Fleet(Api(token, args["api_url"], patience=args["patience"], later=True), args, Display().display)
            with fleet.alone(check):
                done = fleet.absent(check) if args["state"] == "absent" else fleet.present(check)
            return {**result, **done}
        except Refused as problem:
            said = str(problem)
        except OSError as problem:
            said = f"{problem.filename or args['keys_directory']}: {problem.strerror}"
        changed = bool(fleet and fleet.changed)
        found = failure("lambda_instance", said, nothing_changed=not changed)
        return {**result, "failed": True, "changed": changed, "msg": said, "failure": found}


class Fleet:
    """The wanted instances, what is known of them on the controller, and the API.

    changed: whether an instance was launched or terminated, or may have been
    """

    def __init__(self, api: Api, args: Mapping[str, Any], say: Any) -> None:
        self.api, self.args, self.say = api, args, say
        self.names: list[str] = list(args["names"])
        self.directory = Path(args["keys_directory"])
        self.hosts = self.directory / "hosts"
        self.known_hosts = self.directory / "known_hosts"
        self.changed = False

    @contextmanager
    def alone(self, check: bool) -> Iterator[None]:
        """Two runs of one inventory would both find that an instance is missing."""
        if not self.names:
            raise Refused("no instance is named")
        if len(set(self.names)) < len(self.names):
            raise Refused(f"an instance is named twice: {', '.join(self.names)}")
        if check:
            yield
            return
        self.hosts.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.hosts / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused(f"another run launches or gives back instances with {self.directory}: wait") from None
            yield

    # --- launch ---

    def present(self, check: bool) -> dict[str, Any]:
        """Launches those that are missing, and waits until all are active."""
        for name in self.names:
            if not NAME.fullmatch(name):
                raise Refused(f"{name!r} is no name for an instance: 1 to 64 of A-Z a-z 0-9 . _ -")
        there = self._there(self.api.instances())
        for name, entry in there.items():
            if entry["type"] != self.args["type"]:
                raise Refused(f"{name} is there, and is a {entry['type']}, no {self.args['type']}: take another name")
            if not check:
                self._mark(name).unlink(missing_ok=True)
        missing = [name for name in self.names if name not in there]
        plan = self._plan(missing, list(there.values()))
        if check or not missing:
            return {**plan, "changed": bool(missing), "instances": self._settle(list(there), check)}
        limit = self.args["max_cents_per_hour"]
        if limit is None or plan["cents_per_hour"] > limit:
            said = "nothing was accepted" if limit is None else f"{dollars(limit)} were accepted"
            raise Refused(
                f"{', '.join(missing)} would cost {dollars(plan['cents_per_hour'])} an hour, and {said}: nothing is "
                "launched"
            )
        launched, problem = [], ""
        for name in missing:
            try:
                self._launch(name, plan["regions"], plan["ssh_key"])
                launched.append(name)
            except ApiError as refusal:
                problem = f"{name}: {refusal}"
                break
        instances = self._settle([*there, *launched], check)
        if problem:
            also = f" ({', '.join(launched)} was launched, and costs from now on)" if launched else ""
            raise ApiError(f"{problem}{also}")
        return {**plan, "changed": True, "instances": instances}

    def _there(self, instances: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The wanted ones that are there, by name."""
        there: dict[str, dict[str, Any]] = {}
        for entry in instances:
            if entry["name"] not in self.names or entry["status"] in GONE:
                continue
            if entry["name"] in there:
                ids = f"{there[entry['name']]['id']} and {entry['id']}"
                raise Refused(
                    f"two instances are named {entry['name']} ({ids}): give one of them back by its id, with "
                    "playbooks/release.yml"
                )
            there[str(entry["name"])] = dict(entry)
        return there

    def _plan(self, missing: list[str], there: list[dict[str, Any]]) -> dict[str, Any]:
        """What would be launched and what it costs. Raises Refused for what the account does not have."""
        args = self.args
        types = self.api.types()
        if args["type"] not in types:
            raise Refused(no_such("type", args["type"], types))
        kind = types[args["type"]]
        plan = {
            "launch": missing,
            "found": [entry["name"] for entry in there],
            "type": args["type"],
            "description": kind["description"],
            "regions": args["regions"],
            "cents_per_hour": kind["cents_per_hour"] * len(missing),
            "cost": dollars(kind["cents_per_hour"] * len(missing)),
            "ssh_key": args["ssh_key"],
        }
        if not missing:
            return plan
        if not args["regions"]:
            raise Refused(f"no region is named: set glm_launch_region to one of {', '.join(self.api.regions())}")
        known = self.api.regions()
        for region in args["regions"]:
            if region not in known:
                raise Refused(no_such("region", region, known))
        keys = self.api.ssh_keys()
        if not args["ssh_key"] and len(keys) == 1:
            plan["ssh_key"] = keys[0]
        elif not args["ssh_key"]:
            raise Refused(
                f"set glm_launch_ssh_key to an SSH key of Lambda Cloud: {', '.join(keys) or '(there is none)'}"
            )
        elif args["ssh_key"] not in keys:
            raise Refused(no_such("SSH key", args["ssh_key"], keys))
        if args["image_family"]:
            images = self.api.images()
            for region in args["regions"]:
                families = {image["family"] for image in images if image["region"] == region}
                if args["image_family"] not in families:
                    raise Refused(f"{region}: {no_such('image family', args['image_family'], families)}")
        # Those that say to have capacity first; the others may have some by the time.
        plan["regions"] = sorted(args["regions"], key=lambda region: region not in kind["regions"])
        return plan

    def _launch(self, name: str, regions: Sequence[str], ssh_key: str) -> None:
        """Until it is launched, or within the bounds there is no capacity. Raises ApiError."""
        if self._lost(name):
            return
        order = self._order(name, ssh_key)
        end = time.monotonic() + self.args["capacity_timeout"]
        for attempt in range(1, self.args["capacity_retries"] + 2):
            for region in regions:
                try:
                    self._send(name, {**order, "region_name": region})
                    self.say(f"{name}: launched in {region}")
                    return
                except ApiError as problem:
                    if problem.code != NO_CAPACITY:
                        raise
                    self.say(f"{name}: {region} has no capacity (try {attempt})")
            if time.monotonic() + self.args["capacity_pause"] > end or attempt > self.args["capacity_retries"]:
                break
            time.sleep(self.args["capacity_pause"])
        raise ApiError(
            f"no capacity for {self.args['type']} in {', '.join(regions)}, asked {attempt} times: run it again later, "
            "or set glm_launch_other_regions",
            NO_CAPACITY,
        )

    def _send(self, name: str, order: Mapping[str, Any]) -> None:
        """One order. Its mark stays until the answer is known: a run that ends here looks before it orders again."""
        mark = self._mark(name)
        write(str(mark), f"{time.time():.0f}\n")
        try:
            self.api.launch(order)
        except Unknown as problem:
            self.changed = True
            self.say(f"{name}: {problem}: looking whether it is there")
            if not self._lost(name):
                raise ApiError(
                    f"the answer to its launch was lost, and no instance of that name was listed within "
                    f"{self.args['lost_timeout']} s: look into the console, then run it again"
                ) from None
        except ApiError:
            mark.unlink(missing_ok=True)
            raise
        self.changed = True
        mark.unlink(missing_ok=True)

    def _mark(self, name: str) -> Path:
        return self.hosts / f"{name}.launching"

    def _lost(self, name: str) -> bool:
        """Whether the instance of an order without an answer is there; waited for so long as it may still come."""
        mark = self._mark(name)
        try:
            began = min(float(mark.read_text()), time.time())
        except (OSError, ValueError):
            return False
        while True:
            if name in self._there(self.api.instances()):
                mark.unlink(missing_ok=True)
                return True
            left = began + self.args["lost_timeout"] - time.time()
            if left <= 0:
                mark.unlink(missing_ok=True)
                return False
            time.sleep(min(left, self.args["poll"]))

    def _order(self, name: str, ssh_key: str) -> dict[str, Any]:
        private, public = self._host_key(name)
        data = {"ssh_deletekeys": True, "ssh_keys": {"ed25519_private": private, "ed25519_public": public}}
        tags = {**self.args["tags"], KEY_TAG: fingerprint(self._public(name))}
        return {
            "name": name,
            **({"hostname": name} if HOST_NAME.fullmatch(name) else {}),
            "instance_type_name": self.args["type"],
            "ssh_key_names": [ssh_key],
            "file_system_names": self.args["file_systems"],
            "tags": [{"key": key, "value": str(value)} for key, value in tags.items()],
            "user_data": "#cloud-config\n" + json.dumps(data),
            **({"image": {"family": self.args["image_family"]}} if self.args["image_family"] else {}),
        }

    def _host_key(self, name: str) -> tuple[str, str]:
        """Private and public host key, made on first use. It stays until the instance is active."""
        path = self.hosts / name
        if not path.exists():
            self._public(name).unlink(missing_ok=True)
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise Refused(f"{shlex.join(command)}: {' '.join(done.stderr.split())}")
        return path.read_text(), self._public(name).read_text().strip()

    def _public(self, name: str) -> Path:
        return self.hosts / f"{name}.pub"

    def _settle(self, names: Sequence[str], check: bool) -> list[dict[str, Any]]:
        """Waits until they are active, and writes their host keys down."""
        there = self._there(self.api.instances()) if names else {}
        end, told = time.monotonic() + self.args["wait_timeout"], ""
        while not check:
            entries = {name: there[name] for name in names if name in there}
            if lost := [name for name in names if name not in there]:
                raise ApiError(f"{', '.join(lost)} has gone while it started: see the console")
            if bad := [name for name, entry in entries.items() if entry["status"] not in ("booting", "active")]:
                raise ApiError(f"{bad[0]} is {entries[bad[0]]['status']}: see the console, or give it back")
            waiting = [name for name, entry in entries.items() if entry["status"] != "active" or not entry.get("ip")]
            if not waiting:
                break
            if time.monotonic() > end:
                raise ApiError(
                    f"{', '.join(waiting)} did not become active within {self.args['wait_timeout']} s, and costs "
                    "meanwhile: run it again to wait on, or give it back"
                )
            if (now := f"waiting until active: {', '.join(waiting)}") != told:
                self.say(now)
                told = now
            time.sleep(self.args["poll"])
            there = self._there(self.api.instances())
        entries = {name: there[name] for name in names if name in there}
        return [{**entry, "host_key": self._remember(entry, check)} for entry in entries.values()]

    def _remember(self, entry: Mapping[str, Any], check: bool) -> bool:
        """Whether its host key is known: that it was launched with the one of this inventory."""
        public = self._public(entry["name"])
        if not public.exists() or entry["tags"].get(KEY_TAG) != fingerprint(public):
            return False
        if not check and entry.get("ip"):
            kind, key = public.read_text().split()[:2]
            self._write_known_hosts({entry["ip"]: f"{entry['ip']} {kind} {key}"})
            (self.hosts / entry["name"]).unlink(missing_ok=True)  # the node has it, and nobody else needs it
        return True

    def _write_known_hosts(self, wanted: Mapping[str, str]) -> None:
        """Replaces the lines of these addresses; an empty one goes."""
        before = self.known_hosts.read_text() if self.known_hosts.exists() else ""
        kept = [line for line in before.splitlines() if line.split()[:1] and line.split()[0] not in wanted]
        after = "".join(f"{line}\n" for line in [*kept, *filter(None, wanted.values())])
        if after != before:
            write(str(self.known_hosts), after)

    # --- give back ---

    def absent(self, check: bool) -> dict[str, Any]:
        """Terminates those that are named, by name or id, and waits until they are gone."""
        instances = self.api.instances()
        chosen = [self._chosen(name, instances) for name in self.names]
        ids = [entry["id"] for entry in chosen]
        if len(set(ids)) < len(ids):
            raise Refused(f"an instance is named twice: {', '.join(self.names)}")
        going = [entry for entry in chosen if entry["status"] not in GONE]
        for entry in going:
            if entry["terminate"].get("available") is False:
                why = entry["terminate"].get("reason_description") or entry["terminate"].get("reason_code")
                raise Refused(f"{entry['name']}: Lambda Cloud does not terminate it now: {why}")
        plan = {
            "terminate": [entry["name"] or entry["id"] for entry in going],
            "instances": chosen,
            "changed": bool(going),
        }
        if check:
            return plan
        if going:
            self.changed = True
            self._terminate([entry["id"] for entry in going])
        left = self._wait_gone(ids)
        for entry in chosen:
            if entry.get("ip"):
                self._write_known_hosts({entry["ip"]: ""})
            if entry["name"] and not any(other["name"] == entry["name"] for other in left):
                for path in (self.hosts / entry["name"], self._public(entry["name"]), self._mark(entry["name"])):
                    path.unlink(missing_ok=True)
        return plan

    def _chosen(self, name: str, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        by_id = [entry for entry in instances if entry["id"] == name]
        found = by_id or [entry for entry in instances if entry["name"] == name]
        if len(found) > 1:
            ids = ", ".join(str(entry["id"]) for entry in found)
            raise Refused(f"{len(found)} instances are named {name}: name one by its id ({ids})")
        if not found:
            names = [str(entry["name"]) for entry in instances if entry["status"] not in GONE]
            raise Refused(no_such("instance", name, names))
        return dict(found[0])

    def _terminate(self, ids: list[str]) -> None:
        try:
            ended = self.api.terminate(ids)
        except ApiError as problem:
            if problem.code != "global/object-does-not-exist":
                raise
            return  # an answer was lost, and it is gone by the second: what is left is seen below
        for entry in ended:
            self.say(f"{entry['name'] or entry['id']}: {entry['status']}")

    def _wait_gone(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The other instances, once these are gone."""
        end, told = time.monotonic() + self.args["wait_timeout"], ""
        while True:
            now = self.api.instances()
            left = [entry for entry in now if entry["id"] in ids and entry["status"] != "terminated"]
            if not left:
                return [entry for entry in now if entry["id"] not in ids]
            words = ", ".join(f"{entry['name'] or entry['id']} ({entry['status']})" for entry in left)
            if time.monotonic() > end:
                raise ApiError(f"{words} was not gone within {self.args['wait_timeout']} s: see the console")
            if words != told:
                self.say(f"waiting until gone: {words}")
                told = words
            time.sleep(self.args["poll"])


def fingerprint(public: Path) -> str:
    """As ssh-keygen -l prints it, of the key on the controller; empty where that cannot be read."""
    done = subprocess.run(["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=False)
    with suppress(IndexError):
        return done.stdout.split()[1]
    return ""
