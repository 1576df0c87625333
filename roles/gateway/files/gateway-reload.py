#!/usr/bin/python3
"""Reload HAProxy: keep the servers' state, then wait until the new worker serves.

Called by haproxy.service with the master's process id. Without the state file a
reload would put drained servers back; without the wait `systemctl reload` would
return while the old worker, with the old keys, still takes connections. The copy
of what was loaded tells the next run of the playbook which configuration is in use.
"""

import os
import shutil
import signal
import socket
import sys
import time

ADMIN_SOCKET = "/run/haproxy/admin.sock"
STATE_FILE = "/var/lib/haproxy/server-state"
CONFIG = "/etc/haproxy/haproxy.cfg"
LOADED = "/run/haproxy/loaded.cfg"
TIMEOUT = 15.0


def ask(command: str, path: str) -> str:
    """The answer of HAProxy's runtime interface."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(path)
        connection.sendall(command.encode() + b"\n")
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


def worker(path: str) -> "str | None":
    """The process id of the worker that answers now."""
    try:
        lines = ask("show info", path).splitlines()
    except OSError:
        return None
    return next((line.split()[1] for line in lines if line.startswith("Pid:")), None)


def save_state(path: str, file: str) -> None:
    with open(f"{file}.new", "w", encoding="utf-8") as new:
        new.write(ask("show servers state", path))
    os.replace(f"{file}.new", file)


def reload(master: int, path: str = ADMIN_SOCKET, file: str = STATE_FILE, timeout: float = TIMEOUT) -> "str | None":
    """What went wrong, if anything."""
    before = worker(path)
    if before is not None:
        save_state(path, file)
    os.kill(master, signal.SIGUSR2)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if worker(path) not in (None, before):
            return None
        time.sleep(0.05)
    return f"HAProxy still serves its old configuration after {timeout:.0f} s: see journalctl -u haproxy.service"


def main() -> int:
    try:
        shutil.copyfile(CONFIG, f"{LOADED}.new")
        problem = reload(int(sys.argv[1]))
        if not problem:
            os.replace(f"{LOADED}.new", LOADED)
    except OSError as error:
        problem = f"HAProxy was not reloaded: {error}"
    if problem:
        print(f"glm: error: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
