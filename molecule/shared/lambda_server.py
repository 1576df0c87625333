"""A server with the part of Lambda Cloud's API that the project uses, made from its public description (1.10.0).

It insists on what that says of requests (fields, their forms, the key), keeps the limits (1 request a second, a launch
in 12) by a 429 as Cloudflare sends it, and fails on demand. It is no proof of what Lambda Cloud itself does.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "secret_tests_0123456789abcdef.ABCDEFGH"
JUPYTER = "jupyter-secret-03b7d30d9d3e4d8fa41657bc0d478c1b"
REGIONS = ["us-east-1", "us-west-1", "us-south-1", "europe-central-1"]
PRICES = {"gpu_8x_b200_sxm6": 5352, "gpu_1x_h100_sxm5": 429, "cpu_4x_general": 12}
DEFAULT_RULES: list[dict[str, Any]] = [
    {"protocol": "tcp", "port_range": [22, 22], "source_network": "0.0.0.0/0", "description": "Allow SSH"},
    {"protocol": "icmp", "source_network": "0.0.0.0/0", "description": "Allow ping"},
]
LAUNCH = {
    *("region_name", "instance_type_name", "ssh_key_names", "file_system_names", "file_system_mounts", "hostname"),
    *("name", "image", "user_data", "tags", "firewall_rulesets"),
}
MESSAGES = {
    "global/invalid-api-key": (401, "API key was invalid, expired, or deleted."),
    "global/account-inactive": (403, "Your account is inactive."),
    "global/forbidden": (403, "Forbidden."),
    "global/invalid-address": (403, "Your billing address is invalid."),
    "global/quota-exceeded": (400, "Quota exceeded."),
    "global/invalid-parameters": (400, "Invalid request data."),
    "global/object-does-not-exist": (404, "Specified instance does not exist."),
    "global/not-found": (404, "The requested resource was not found."),
    "global/duplicate": (400, "Duplicate."),
    "global/conflict": (409, "The request conflicts with the current state of the resource."),
    "global/internal-error": (500, "An internal server error occurred."),
    "instance-operations/launch/insufficient-capacity": (400, "Not enough capacity to fulfill launch request."),
    "instance-operations/launch/file-system-in-wrong-region": (400, "The file system is in another region."),
    "filesystems/filesystem-in-use": (400, "The filesystem is in use."),
    "firewall-rulesets/firewall-ruleset-in-use": (409, "Firewall ruleset is in use by one or more instances."),
    "provider/internal-unavailable": (503, "Provider unavailable"),
}


@dataclass
class Fault:
    """How the next `times` requests whose method and path fit fail.

    code: an error of the API; status: an answer without its form; neither: the connection ends without an answer.
    done: whether what is asked for is done before.
    """

    path: str
    method: str = "GET"
    code: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    done: bool = False


class Refusal(Exception):
    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code)
        self.code, self.message = code, message


class Lambda:
    """The account, and what has been asked of it."""

    def __init__(self) -> None:
        self.instances: list[dict[str, Any]] = []
        self.rules: list[dict[str, Any]] = [dict(rule) for rule in DEFAULT_RULES]
        self.keys = ["ops"]
        self.capacity: dict[str, int] = dict.fromkeys(REGIONS, 1000)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.pace, self.launch_pace = 0.0, 0.0  # seconds between two requests; 0 for no limit
        self.boots = 0.0  # seconds until a launched instance is active
        self.hidden = 0.0  # seconds until it is listed
        self.ends = 0.0  # seconds until a terminated one is gone, once it was listed as it goes
        self.limited = 0  # answers 429 by the limits
        self.user_data: dict[str, str] = {}
        self._last, self._last_launch = 0.0, 0.0
        self._lock = threading.Lock()
        self.url = ""

    def add(self, name: str, **fields: Any) -> dict[str, Any]:
        number = len(self.instances)
        kind, region = fields.pop("type", "gpu_8x_b200_sxm6"), fields.pop("region", "us-east-1")
        tags = fields.pop("tags", {})
        entry = {
            "id": f"{number:08x}" + "a1b2c3d4" * 3,
            "name": name,
            "ip": f"198.18.{number // 250}.{number % 250 + 1}",
            "private_ip": f"10.19.{number // 250}.{number % 250 + 1}",
            "status": "active",
            "ssh_key_names": ["ops"],
            "file_system_names": [],
            "region": {"name": region, "description": "Somewhere, USA"},
            "instance_type": type_of(kind),
            "hostname": f"198-18-{number // 250}-{number % 250 + 1}",
            "jupyter_token": JUPYTER,
            "jupyter_url": f"https://jupyter-{number}.lambdaspaces.com/?token={JUPYTER}",
            "actions": {
                action: {"available": True} for action in ("migrate", "rebuild", "restart", "cold_reboot", "terminate")
            },
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
            "firewall_rulesets": [],
            **fields,
        }
        self.instances.append(entry)
        return entry

    def count(self, method: str, path: str) -> int:
        return sum(seen[:2] == (method, path) for seen in self.requests)

    def listed(self) -> list[dict[str, Any]]:
        """As they are now; what begins with _ is the server's own."""
        now = time.monotonic()
        for entry in self.instances:
            if entry["status"] == "booting" and now >= entry.get("_active", now + 1):
                entry["status"], entry["ip"] = "active", entry.pop("_ip")
        self.instances = [entry for entry in self.instances if now < entry.get("_gone", now + 1)]
        for entry in self.instances:
            if entry["status"] == "terminating":
                entry.setdefault("_gone", now + self.ends)
        seen = [entry for entry in self.instances if now >= entry.get("_listed", 0)]
        return [{name: value for name, value in entry.items() if not name.startswith("_")} for entry in seen]

    def launch(self, body: dict[str, Any]) -> dict[str, Any]:
        known = isinstance(body, dict) and {"region_name", "instance_type_name", "ssh_key_names"} <= set(body) <= LAUNCH
        if not known or len(body["ssh_key_names"]) != 1 or len(body.get("name", "")) > 64:
            raise Refusal("global/invalid-parameters")
        if "hostname" in body and not re.fullmatch(r"[a-z0-9][0-9a-z-]{0,62}", body["hostname"]):
            raise Refusal("global/invalid-parameters", "hostname")
        tags = {tag["key"]: tag["value"] for tag in body.get("tags", [])}
        if any(not re.fullmatch(r"[a-z][a-z0-9-:]+", key) or len(value) > 128 for key, value in tags.items()):
            raise Refusal("global/invalid-parameters", "tags")
        region = body["region_name"]
        if region not in REGIONS or body["instance_type_name"] not in PRICES:
            raise Refusal("global/object-does-not-exist", "no such region or type")
        if body["ssh_key_names"][0] not in self.keys:
            raise Refusal("global/object-does-not-exist", "no such SSH key")
        if self.capacity[region] < 1:
            raise Refusal("instance-operations/launch/insufficient-capacity")
        self.capacity[region] -= 1
        entry = self.add(
            body.get("name", ""), region=region, type=body["instance_type_name"], status="booting", tags=tags
        )
        entry["file_system_names"] = body.get("file_system_names", [])
        now = time.monotonic()
        entry["_ip"], entry["_active"], entry["_listed"] = entry.pop("ip"), now + self.boots, now + self.hidden
        self.user_data[entry["id"]] = body.get("user_data", "")
        return {"instance_ids": [entry["id"]]}

    def terminate(self, body: dict[str, Any]) -> dict[str, Any]:
        found = [entry for entry in self.instances if entry["id"] in body["instance_ids"]]
        if len(found) != len(body["instance_ids"]):
            raise Refusal("global/object-does-not-exist")
        for entry in found:
            entry["status"] = "terminating"
            if not self.ends:
                entry["_gone"] = time.monotonic()
        return {"terminated_instances": [{k: v for k, v in entry.items() if k[0] != "_"} for entry in found]}

    def patch(self, body: dict[str, Any]) -> dict[str, Any]:
        for rule in body["rules"]:
            ports = rule.get("port_range")
            if not {"protocol", "source_network", "description"} <= set(rule) or len(rule["description"]) > 128:
                raise Refusal("global/invalid-parameters")
            if (rule["protocol"] == "icmp") != (ports is None):
                raise Refusal("global/invalid-parameters", "port_range")
        self.rules = body["rules"]
        return self.ruleset()

    def do(self, method: str, path: str, body: Any) -> Any:
        known: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "instances"): self.listed,
            ("GET", "regions"): lambda: [{"name": name, "description": "Somewhere, USA"} for name in REGIONS],
            ("GET", "instance-types"): self.types,
            ("GET", "ssh-keys"): lambda: [
                {"id": name, "name": name, "public_key": "ssh-ed25519 A"} for name in self.keys
            ],
            ("GET", "images"): lambda: [
                {"family": family, "region": {"name": name}}
                for family in ("lambda-stack-24-04", "gpu-base-24-04")
                for name in REGIONS
            ],
            ("POST", "instance-operations/launch"): lambda: self.launch(body),
            ("POST", "instance-operations/terminate"): lambda: self.terminate(body),
            ("GET", "firewall-rulesets/global"): self.ruleset,
            ("PATCH", "firewall-rulesets/global"): lambda: self.patch(body),
        }
        if (method, path) not in known:
            raise Refusal("global/not-found")
        return known[method, path]()

    def types(self) -> dict[str, Any]:
        regions = [{"name": name, "description": ""} for name, free in self.capacity.items() if free]
        return {name: {"instance_type": type_of(name), "regions_with_capacity_available": regions} for name in PRICES}

    def ruleset(self) -> dict[str, Any]:
        return {"id": "global", "name": "Default Workspace Global Rules", "rules": self.rules}

    def answer(self, method: str, path: str, body: Any, key: str) -> tuple[int, dict[str, str], str] | None:
        """Status, headers and text; None for a connection that ends."""
        with self._lock:
            now = time.monotonic()
            launches = path == "instance-operations/launch"
            if now - self._last < self.pace or (launches and now - self._last_launch < self.launch_pace):
                self.limited += 1
                return 429, {}, "error code: 1015"
            self._last = now
            self._last_launch = now if launches else self._last_launch
            self.requests.append((method, path, body))
            if key != f"Bearer {TOKEN}":
                return refusal(Refusal("global/invalid-api-key"))
            fault = next(
                (f for f in self.faults if f.times and f.method == method and re.fullmatch(f.path, path)), None
            )
            try:
                if fault:
                    fault.times -= 1
                    if fault.done:
                        self.do(method, path, body)
                    if fault.code:
                        raise Refusal(fault.code)
                    return (fault.status, fault.headers, "upstream error") if fault.status else None
                return 200, {}, json.dumps({"data": self.do(method, path, body)})
            except Refusal as problem:
                return refusal(problem)


def refusal(problem: Refusal) -> tuple[int, dict[str, str], str]:
    status, message = MESSAGES[problem.code]
    return status, {}, json.dumps({"error": {"code": problem.code, "message": problem.message or message}})


def type_of(name: str) -> dict[str, Any]:
    specs = {"vcpus": 208, "memory_gib": 2900, "storage_gib": 22000, "gpus": 8}
    description = {"description": f"type {name}", "gpu_description": "B200 (180 GB SXM6)"}
    return {"name": name, **description, "price_cents_per_hour": PRICES[name], "specs": specs}


@contextmanager
def running() -> Iterator[Lambda]:
    account = Lambda()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            path = self.path.removeprefix("/api/v1/")
            given = account.answer(self.command, path, body, self.headers.get("Authorization", ""))
            if given is None:
                self.close_connection = True
                return
            status, headers, text = given
            content = text.encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_PUT = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        account.url = f"http://127.0.0.1:{server.server_address[1]}/api/v1"
        try:
            yield account
        finally:
            server.shutdown()
            thread.join()
