"""The file of API keys on the controller: one key a line, with a name and limits. No error holds a word of a line."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any

from ansible_collections.glm.fleet.plugins.plugin_utils.private import Refused

KEY = re.compile(r"[A-Za-z0-9._~+/=-]{20,512}")
NAME = re.compile(r"(?!sk-)[A-Za-z0-9._-]{1,64}")
NAMES = "1 to 64 of A-Z a-z 0-9 . _ -, not beginning with sk-, as keys do"
LINE = "KEY [NAME] [requests_per_minute=N] [concurrent=N] [expires=YYYY-MM-DD]"
COUNTS = ("requests_per_minute", "concurrent")
LIMITS = (*COUNTS, "expires")


@dataclass(frozen=True)
class Entry:
    """A line that holds a key. A limit of 0 is none; so is an empty expiry."""

    line: int
    key: str = field(repr=False)  # not in a traceback
    name: str
    requests_per_minute: int = 0
    concurrent: int = 0
    expires: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()

    @property
    def expires_at(self) -> int:
        """Seconds since 1970 from which on the key is refused; 0 for never."""
        return int(moment(self.expires).timestamp()) if self.expires else 0

    def expired(self) -> bool:
        return 0 < self.expires_at <= datetime.now(timezone.utc).timestamp()

    def public(self) -> dict[str, Any]:
        """All but the key."""
        limits = {limit: getattr(self, limit) for limit in LIMITS}
        return {"name": self.name, "digest": self.sha256[:8], **limits, "expires_at": self.expires_at}


def moment(text: str) -> datetime:
    """A day is its first second, UTC. Raises ValueError."""
    form = "%Y-%m-%dT%H:%M:%SZ" if "T" in text else "%Y-%m-%d"
    return datetime.strptime(text, form).replace(tzinfo=timezone.utc)


def parse(text: str, path: str) -> list[Entry]:
    """The keys of a file. Raises Refused."""
    found: list[Entry] = []
    lines_of: dict[tuple[str, str], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if not KEY.fullmatch(words[0]):
            raise Refused(f"{where}: not an API key (20 to 512 of A-Z a-z 0-9 . _ ~ + / = -): write {LINE}")
        entry = Entry(number, words[0], **_rest(words[1:], where))
        if not entry.name:
            entry = replace(entry, name=entry.sha256[:8])
        for what, same in (("key", entry.key), ("name", entry.name)):
            if (what, same) in lines_of:
                cure = "delete one of them" if what == "key" else "give it another one"
                raise Refused(f"{where}: the same {what} as in line {lines_of[what, same]}: {cure}")
            lines_of[what, same] = number
        found.append(entry)
    if not found:
        raise Refused(f"{path} holds no key: put one a line in it, or delete it to have one made")
    return found


def _rest(words: list[str], where: str) -> dict[str, Any]:
    """Name and limits of a line."""
    values: dict[str, Any] = {"name": ""}
    if words and "=" not in words[0]:
        values["name"] = words.pop(0)
        if not NAME.fullmatch(values["name"]):
            raise Refused(f"{where}: the second word is no name: write {NAMES}")
    for word in words:
        limit, _, value = word.partition("=")
        if limit not in LIMITS or limit in values:
            raise Refused(f"{where}: a word that is no limit, or one twice: write {LINE}")
        values[limit] = value_of(limit, value, where)
    return values


def value_of(limit: str, value: Any, where: str) -> Any:
    """A limit as it counts. Raises Refused."""
    if limit not in LIMITS:
        raise Refused(f"{where}: there is no limit {limit}: take {', '.join(LIMITS)}")
    if limit in COUNTS:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", str(value)):
            raise Refused(f"{where}: {limit} takes a whole number from 1 on: write {limit}=60, or leave it out")
        return int(value)
    try:
        moment(str(value))
    except ValueError:
        raise Refused(f"{where}: expires takes a day: write expires=2027-01-31, from 00:00 UTC of which the key is "
                      "refused, or expires=2027-01-31T18:00:00Z") from None  # fmt: skip
    return str(value)


def new_key() -> str:
    return f"sk-glm-{secrets.token_urlsafe(32)}"


def line_of(key: str, name: str, limits: Mapping[str, Any]) -> str:
    return " ".join([key, name, *(f"{limit}={limits[limit]}" for limit in LIMITS if limits.get(limit))]) + "\n"


def edit(text: str, path: str, action: str, name: str, limits: Mapping[str, Any], *, grace: float = 0) -> str:
    """The file after add, revoke or rotate; comments and other lines stay as they are. Raises Refused.

    limits: those of the new key; of rotate, those that differ from the old key's
    grace: hours for which a rotated key goes on as NAME-old
    """
    limits = {limit: value_of(limit, value, "the new key") for limit, value in limits.items()}
    if not NAME.fullmatch(name):
        raise Refused(f"the name of a key is needed: {NAMES}")
    entries = {entry.name: entry for entry in parse(text, path)} if text.strip() else {}
    lines = [line if line.endswith("\n") else f"{line}\n" for line in text.splitlines(keepends=True)]
    if action == "add":
        if name in entries:
            raise Refused(f"{path} has a key {name}: take another name, or rotate that key")
        return "".join([*lines, line_of(new_key(), name, limits)])
    if name not in entries:
        raise Refused(f"{path} has no key {name} (it has {', '.join(entries) or 'none'})")
    old = entries[name]
    gone = {f"{name}-old"}  # of a rotation before
    if action == "revoke":
        gone.add(name)
        if not entries.keys() - gone:
            raise Refused(f"{name} is the only key of {path}: rotate it, or add another one first")
    else:
        kept = {limit: getattr(old, limit) for limit in LIMITS}
        lines[old.line - 1] = line_of(new_key(), name, {**kept, **limits})
        if grace:
            end = (datetime.now(timezone.utc) + timedelta(hours=grace)).strftime("%Y-%m-%dT%H:%M:%SZ")
            if old.expires_at and old.expires_at < moment(end).timestamp():
                end = old.expires
            lines[old.line - 1] += line_of(old.key, f"{name}-old", {**kept, "expires": end})
    numbers = {entry.line for entry in entries.values() if entry.name in gone}
    after = "".join(line for number, line in enumerate(lines, 1) if number not in numbers)
    parse(after, path)
    return after
