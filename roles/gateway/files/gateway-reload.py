#!/usr/bin/python3 -B
"""Reload HAProxy: keep the servers' state, then wait until the new worker serves.

Called by haproxy.service with the master's process id, or with --save to keep the
state alone. Without the state file a reload would put drained servers back; without
the wait `systemctl reload` would return while the old worker, with the old keys, still
takes connections. The copy of what was loaded tells the next run of the playbook which
configuration is in use.
"""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib/gateway"))
from glm_node.haproxy import SOCKET, HAProxy, Unavailable

STATE_FILE = "/var/lib/haproxy/server-state"
CONFIG = "/etc/haproxy/haproxy.cfg"
LOADED = "/run/haproxy/loaded.cfg"
TIMEOUT = 15.0


def worker(path: str) -> "str | None":
    """The process id of the worker that answers now."""
    try:
        # Short, so that several tries fit into the time of a reload.
        lines = HAProxy(path, timeout=TIMEOUT / 5).ask("show info").splitlines()
    except Unavailable:
        return None
    return next((line.split()[1] for line in lines if line.startswith("Pid:")), None)


def state_for(state: str, config: str) -> str:
    """The servers' state without what the configuration decides.

    HAProxy would take port and TLS of the state file, not those of a new configuration.
    """
    ports = dict(re.findall(r"^ *server (\S+) \S+:(\d+)", config, re.M))
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


def save_state(path: str, file: str, config: str) -> None:
    with open(config, encoding="utf-8") as text:
        state = state_for(HAProxy(path).ask("show servers state"), text.read())
    with open(f"{file}.new", "w", encoding="utf-8") as new:
        new.write(state)
    os.replace(f"{file}.new", file)


def reload(master: int, path: str, file: str, config: str, timeout: float = TIMEOUT) -> "str | None":
    """What went wrong, if anything."""
    before = worker(path)
    if before is not None:
        save_state(path, file, config)
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
            save_state(SOCKET, STATE_FILE, CONFIG)
            return 0
        shutil.copyfile(CONFIG, f"{LOADED}.new")
        problem = reload(int(sys.argv[1]), SOCKET, STATE_FILE, CONFIG)
        if not problem:
            os.replace(f"{LOADED}.new", LOADED)
    except (OSError, Unavailable) as error:
        problem = f"HAProxy was not reloaded: {error}"
    if problem:
        print(f"glm: error: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
