"""The part of Lambda Cloud's API that this project uses.

Paths, fields, error codes and limits are those of the public OpenAPI description, version 1.10.0
(https://cloud.lambda.ai/api/v1/openapi.json): at most one request a second, and one launch in 12 seconds. That
description names no idempotency key, no answer 429 and no header Retry-After: both are heeded where they come.
"""

from __future__ import annotations

import difflib
import email.utils
import http.client
import json
import os
import re
import socket
import time
import urllib.error
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.urls import open_url
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import plain
from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused, check_private

URL = "https://cloud.lambda.ai/api/v1"
ENVIRONMENT = "LAMBDA_API_KEY"
# Seconds from an answer to the next request: from one request to the next it would be less at the server, where the
# first was longer on its way.
PACE, LAUNCH_PACE = 1.0, 12.0
LAUNCH = "instance-operations/launch"
NO_CAPACITY = f"{LAUNCH}/insufficient-capacity"
STATUSES = ["booting", "active", "unhealthy", "terminated", "terminating", "preempted"]
GONE = ("terminated", "terminating", "preempted")
# What is kept of an instance. All else stays out, above all jupyter_token and jupyter_url, which log in.
FIELDS = (
    *("id", "name", "ip", "private_ip", "status", "hostname", "ssh_key_names", "file_system_names"),
    *("file_system_mounts", "firewall_rulesets"),
)
# What to do about an error, by its code.
ADVICE = {
    "global/invalid-api-key": "make a key in the console (API keys), and put it where this one came from",
    "global/account-inactive": "see in the console that the address is verified and a payment method is there",
    "global/invalid-address": "put the billing address right in the console",
    "global/quota-exceeded": "launch fewer, give others back, or ask Lambda for a higher quota",
    "global/forbidden": "the key may not do this: take one of the right workspace",
    f"{LAUNCH}/file-system-in-wrong-region": "take a file system of the region, or the region of the file system",
    NO_CAPACITY: "take another region or type, or try again later",
    "global/internal-error": "try again later",
}


class ApiError(Refused):
    """The API says no, in one line. code: its own, empty where it gave none."""

    def __init__(self, line: str, code: str = "") -> None:
        super().__init__(line)
        self.code = code


class Unavailable(ApiError):
    """The API cannot be reached, or does not answer as it should, for longer than was waited."""


class Unknown(ApiError):
    """The answer to a change was lost: it may have been made or not."""


class Api:
    """Keeps to the API's limits within this process, and waits out 429, 5xx and failed connections for a while.

    token: never part of an error
    patience: seconds for all repetitions of one request
    later: whether another process of this run may have asked just now, so that the first request has to wait too
    """

    next_request = 0.0  # of all objects, as they share the limit
    next_launch = 0.0

    def __init__(
        self, token: str, url: str = URL, *, patience: float = 60, timeout: float = 20, later: bool = False
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise Refused(f"{url}: the API key would cross the network in the clear: write https://")
        self._token, self._url, self.patience, self.timeout = token, url.rstrip("/"), patience, timeout
        if later:
            Api.next_request = max(Api.next_request, time.monotonic() + PACE)

    def instances(self) -> list[dict[str, Any]]:
        """Those of the account, without secrets, in the order of their names."""
        found = [instance(entry) for entry in self._list(self.get("instances"))]
        return sorted(found, key=lambda entry: natural(f"{entry['name']} {entry['id']}"))

    def regions(self) -> list[str]:
        return sorted(str(entry["name"]) for entry in self._list(self.get("regions")))

    def types(self) -> dict[str, dict[str, Any]]:
        """By name: cents_per_hour, description, and the regions that say to have capacity."""
        found = self.get("instance-types")
        if not isinstance(found, Mapping):
            raise Unavailable(f"{self._url}/instance-types: the answer is no list of types")
        return {
            str(name): {
                "cents_per_hour": int(entry["instance_type"]["price_cents_per_hour"]),
                "description": str(entry["instance_type"].get("description", "")),
                "regions": [str(region["name"]) for region in entry["regions_with_capacity_available"]],
            }
            for name, entry in found.items()
        }

    def ssh_keys(self) -> list[str]:
        return [str(entry["name"]) for entry in self._list(self.get("ssh-keys"))]

    def images(self) -> list[dict[str, str]]:
        """Family and region of each."""
        found = self._list(self.get("images"))
        return [{"family": str(entry["family"]), "region": str(entry["region"]["name"])} for entry in found]

    def launch(self, order: Mapping[str, Any]) -> str:
        """The id of the new instance. Raises Unknown where the answer is lost."""
        wait = Api.next_launch - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        try:
            return str(self.post(LAUNCH, order)["instance_ids"][0])
        except (KeyError, IndexError, TypeError):
            raise Unknown(f"{self._url}/{LAUNCH}: the answer names no instance") from None
        finally:
            Api.next_launch = time.monotonic() + LAUNCH_PACE

    def terminate(self, ids: Iterable[str]) -> list[dict[str, Any]]:
        """Those that the API says to have terminated. It may be asked twice."""
        answer = self.post("instance-operations/terminate", {"instance_ids": list(ids)}, again=True)
        return [instance(entry) for entry in self._list((answer or {}).get("terminated_instances"))]

    def get(self, path: str) -> Any:
        return self._call("GET", path, None, again=True)

    def post(self, path: str, body: Mapping[str, Any], *, again: bool = False) -> Any:
        return self._call("POST", path, body, again=again)

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("PATCH", path, body, again=True)

    def _list(self, found: Any) -> list[dict[str, Any]]:
        if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
            raise Unavailable(f"{self._url}: the answer holds no list where the API's description has one")
        return found

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, *, again: bool) -> Any:
        """The `data` of the answer.

        again: whether it may be sent again where it is not known whether it has arrived. Without, that is Unknown.
        """
        end = time.monotonic() + self.patience
        pause = 1.0
        while True:
            try:
                return self._once(method, path, body)
            except _Again as problem:
                if problem.arrived and not again:
                    raise Unknown(f"{problem}: it is not known whether it was done") from None
                wait = max(problem.wait, pause)
                if time.monotonic() + wait > end:
                    raise Unavailable(f"{problem}, waited {self.patience:.0f} s for it") from None
                time.sleep(wait)
                pause = min(2 * pause, 15)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        where = f"{self._url}/{path}"
        wait = Api.next_request - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        try:
            with open_url(
                where,
                method=method,
                data=None if body is None else json.dumps(body),
                headers={
                    "Accept": "application/json",
                    "Authorization": f"Bearer {self._token}",
                    **({} if body is None else {"Content-Type": "application/json"}),
                },
                timeout=self.timeout,
                http_agent="glm-fleet",
                follow_redirects="none",  # the key is for this server alone
                use_netrc=False,
            ) as answer:
                text = answer.read()
        except urllib.error.HTTPError as problem:
            raise self._refused(method, where, problem) from None
        except (OSError, http.client.HTTPException, ValueError) as problem:
            cause = getattr(problem, "reason", problem)
            unsent = isinstance(cause, (ConnectionRefusedError, socket.gaierror))
            raise _Again(f"{where}: {self._said(cause)}", arrived=not unsent) from None
        finally:
            Api.next_request = time.monotonic() + PACE
        try:
            return json.loads(text)["data"]
        except (ValueError, KeyError, TypeError):
            raise _Again(f"{where}: the answer is not that of the API", arrived=True) from None

    def _refused(self, method: str, where: str, problem: urllib.error.HTTPError) -> Exception:
        try:
            error = dict(json.loads(problem.read())["error"])
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
            error = {}
        code, said = self._said(error.get("code", "")), self._said(error.get("message", ""))
        advice = ADVICE.get(code) or self._said(error.get("suggestion") or "")
        if problem.code == 429:
            return _Again(f"{where}: too many requests (429)", wait=retry_after(problem.headers))
        if problem.code >= 500:
            line = f"{where}: {said or 'no answer'} ({code or problem.code})"
            return _Again(line, wait=retry_after(problem.headers), arrived=True)
        if 300 <= problem.code < 400:
            return ApiError(f"{where}: the API has moved, or this is none ({problem.code}): see api_url")
        line = f"Lambda Cloud: {said or f'{method} {where}'} ({code or problem.code})"
        return ApiError(": ".join(part for part in (line, advice) if part), code)

    def _said(self, text: object) -> str:
        """In one line, and without the token."""
        return " ".join(plain(str(text)).replace(self._token, "***").split()).rstrip(".")


class _Again(Exception):
    """An answer that another try may better. arrived: whether the request may have been done."""

    def __init__(self, line: str, *, wait: float = 0.0, arrived: bool = False) -> None:
        super().__init__(line)
        self.wait, self.arrived = wait, arrived


def retry_after(headers: Any) -> float:
    """Seconds by the header, which is a number or a date; 0 without one."""
    value = str(headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,6}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def instance(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of it, with `region` and `type` by name, `cents_per_hour` and `tags` as a dictionary."""
    kind, region = entry.get("instance_type") or {}, entry.get("region") or {}
    return {
        **{field: entry[field] for field in FIELDS if entry.get(field) is not None},
        "id": str(entry["id"]),
        "name": str(entry.get("name") or ""),
        "status": str(entry.get("status") or ""),
        "region": str(region.get("name") or ""),
        "type": str(kind.get("name") or ""),
        "cents_per_hour": kind.get("price_cents_per_hour"),
        "tags": {str(tag["key"]): str(tag["value"]) for tag in entry.get("tags") or []},
        # Of the actions only whether it may be terminated, and if not why.
        "terminate": dict((entry.get("actions") or {}).get("terminate") or {}),
    }


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts node-2 before node-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {near[0]}?" if near else f"take one of {', '.join(names) or '(there is none)'}"
    return f"Lambda Cloud has no {what} {name}: {advice}"


def dollars(cents: int) -> str:
    return f"{cents / 100:,.2f} USD"


def read_token(value: str, path: str, reader: Callable[[str], str]) -> str:
    """The API key: what is given, else the file's; never in an error.

    path: a file that its owner alone can read, or that Ansible Vault has encrypted; empty for none
    reader: from a path to that of the decrypted file, as Ansible's loader has it
    """
    where = "token"
    if not value and path and os.path.lexists(path):
        where = path
        try:
            check_private(path)
            with open(reader(path), encoding="utf-8", errors="replace") as file:
                value = file.read()
        except OSError as problem:
            raise Refused(f"{path}: {problem.strerror}") from None
    value = value.strip()
    if not value:
        place = f"put the key into {path} (mode 0600), or" if path else "set token_file, or"
        raise Refused(f"there is no API key of Lambda Cloud: {place} set the environment variable {ENVIRONMENT}")
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise Refused(f"{where}: this is no API key: it holds more than one word, or characters that no key has")
    return value
