#!/usr/bin/python3 -B
"""Reload HAProxy: keep the servers' state, then wait until the new worker serves.

Called by haproxy.service with the master's process id. Without the state file a reload would put drained servers back;
without the wait `systemctl reload` would return while the old worker, with the old keys, still takes connections. The
copy of what was loaded tells the next run of the playbook which configuration is in use.

    --save   keeps the state alone
    --check  before a start: HAProxy takes no word of a damaged state file, and offers what was drained

The state is kept twice, on the disk and with its checksum. Where both copies are damaged nobody knows any more who was
drained: all servers are, until somebody puts them back. Where there is none it is a first start.
"""

import hashlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib/gateway"))
from glm_node.haproxy import BACKEND, SOCKET, HAProxy, Unavailable, locked

# HAProxy reads the first.
STATE_FILES = ("/var/lib/haproxy/server-state", "/var/lib/glm/haproxy-server-state")
CONFIG = "/etc/haproxy/haproxy.cfg"
LOADED = "/run/haproxy/loaded.cfg"
TIMEOUT = 15.0
SEAL = "# sha256 "  # HAProxy passes over such a line


def worker(path: str) -> "str | None":
    """The process id of the worker that answers now."""
    try:
        # Short, so that several tries fit into the time of a reload.
        return HAProxy(path, timeout=TIMEOUT / 5).info().get("Pid")
    except Unavailable:
        return None


def ports_of(config: str) -> "dict[str, str]":
    """The port of each server that a configuration offers; other backends may have servers of the same names."""
    section = re.search(rf"^backend {BACKEND}\n((?:[ \t#].*\n|\n)*)", config, re.M)
    return dict(re.findall(r"^ *server (\S+) \S+:(\d+)", section[1], re.M)) if section else {}


def state_for(state: str, config: str) -> str:
    """The servers' state without what the configuration decides.

    HAProxy would take port and TLS of the state file, not those of a new configuration.
    """
    ports = ports_of(config)
    lines = []
    for line in state.splitlines():
        fields = line.split()
        if line.startswith("#") or len(fields) < 19:
            lines.append(line)
            continue
        # srv_name is the fourth, srv_port the 19th; the 20th is the last that 2.6 insists on, srv_use_ssl the next.
        fields[18] = ports.get(fields[3], fields[18])
        lines.append(" ".join(fields[:20]))
    return "\n".join(lines) + "\n"


def drained(config: str) -> str:
    """The state in which no server of the configuration is offered."""
    servers = ports_of(config)
    # The fields are those of state_for: stopped, in maintenance by the operator's word, with its weight.
    rows = [f"0 {BACKEND} 0 {name} - 0 1 1 1 0 1 0 0 14 0 0 0 - {port} -" for name, port in servers.items()]
    return "\n".join(["1", *rows]) + "\n"


def seal(state: str) -> str:
    return SEAL + hashlib.sha256(state.encode()).hexdigest() + "\n"


def keep(state: str, files: Iterable[str]) -> None:
    """In each file, on the disk before this returns."""
    version, _, rest = state.partition("\n")
    for file in files:
        directory = os.path.dirname(file)
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with open(f"{file}.new", "w", encoding="utf-8") as new:
            new.write(f"{version}\n{seal(state)}{rest}")
            new.flush()
            os.fsync(new.fileno())
        os.replace(f"{file}.new", file)
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def kept(file: str) -> "str | None":
    """The state in a file; empty for a damaged one, None for no file."""
    try:
        with open(file, encoding="utf-8", errors="replace") as text:
            version, sealed, *rows = text.read().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    except ValueError:
        return ""
    if sealed.startswith(SEAL):
        state = version + "".join(rows)
        return state if sealed == seal(state) else ""
    # A file of a release before has no seal.
    whole = all(row.endswith("\n") and len(row.split()) >= 20 for row in rows if row.strip())
    return version + sealed + "".join(rows) if version == "1\n" and sealed.startswith("#") and whole else ""


def check_state(files: "tuple[str, str]", config: str) -> "str | None":
    """Before a start: what was lost, if anything."""
    first, second = map(kept, files)
    if first or (first is None and second is None):
        return None
    if second:
        keep(second, files[:1])
        return f"{files[0]} was {'lost' if first is None else 'damaged'}: taken from {files[1]}"
    with open(config, encoding="utf-8") as text:
        keep(drained(text.read()), files)
    return (
        f"{' and '.join(files)} were damaged, and who was drained is not known: all servers are drained. "
        "Put them back with playbooks/undrain.yml, or remove both files and restart haproxy.service"
    )


def save_state(path: str, files: "tuple[str, str]", config: str) -> None:
    with open(config, encoding="utf-8") as text:
        state = state_for(HAProxy(path).ask("show servers state"), text.read())
    keep(state, files)


def reload(master: int, path: str, files: "tuple[str, str]", config: str, timeout: float = TIMEOUT) -> "str | None":
    """What went wrong, if anything."""
    before = worker(path)
    if before is not None:
        save_state(path, files, config)
    else:
        check_state(files, config)
    os.kill(master, signal.SIGUSR2)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if worker(path) not in (None, before):
            return None
        time.sleep(0.05)
    return f"HAProxy still serves its old configuration after {timeout:.0f} s: see journalctl -u haproxy.service"


def main() -> int:
    try:
        if sys.argv[1] == "--save":
            with locked():  # nodes of one wave change at once; the last one to ask has to be the last one to write
                save_state(SOCKET, STATE_FILES, CONFIG)
            return 0
        if sys.argv[1] == "--check":
            lost = check_state(STATE_FILES, CONFIG)
            if lost:
                print(f"glm: {lost}", file=sys.stderr)
            return 0
        shutil.copyfile(CONFIG, f"{LOADED}.new")
        with locked():  # nobody changes the keys of the old worker while the new one reads them
            problem = reload(int(sys.argv[1]), SOCKET, STATE_FILES, CONFIG)
        if not problem:
            os.replace(f"{LOADED}.new", LOADED)
    except (OSError, Unavailable) as error:
        what = "the state of its servers was not kept" if sys.argv[1].startswith("--") else "it was not reloaded"
        problem = f"HAProxy: {what}: {error}"
    if problem:
        print(f"glm: error: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
