"""Two gateways and two nodes in use, and a machine beside them that attacks.

Each test makes one attack while well-behaved clients go on, asserts how it was met, and says so in the table that
comes last: what was tried, and what the clients saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, provided
from testbed import ROOT, Play, crowd, docker

INVENTORY = ROOT / "molecule/edge/inventory"
RESULTS = ROOT / "results/edge"
NODES = ("edge-1", "edge-2")
TLS, PLAIN = "https://198.18.75.5:8000", "http://198.18.75.6:8000"
GATEWAYS = {"edge-gateway-1": TLS, "edge-gateway-2": PLAIN}
IMAGES = ["vllm/vllm-openai:light"]
SETTINGS: dict[str, Any] = {"glm_rollout_waves": [2]}
PER_SOURCE = 500  # glm_source_connections
ATTACKER, ADDRESS = "glm-edge-attacker", "198.18.75.200"
TOOLS = "slowhttptest nghttp2-client openssl python3 curl"
CERTIFICATE = INVENTORY / "keys/tls.pem"


def make_certificate() -> None:
    CERTIFICATE.parent.mkdir(mode=0o700, exist_ok=True)
    certificate, key = (CERTIFICATE.with_suffix(suffix) for suffix in (".crt", ".key"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "60", "-subj", "/CN=edge"),
            *("-addext", "subjectAltName=IP:198.18.75.5", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    CERTIFICATE.write_text(certificate.read_text() + key.read_text())
    CERTIFICATE.chmod(0o600)
    key.unlink()


class Attacker:
    """A machine on the gateways' network."""

    def __init__(self) -> None:
        docker("rm", "--force", ATTACKER, check=False)
        docker("run", "--detach", "--rm", "--name", ATTACKER, "--network", "glm-edge", "--ip", ADDRESS, "--init",
               "--label", "glm-fleet=edge", "glm-fleet/base", "sleep", "infinity")  # fmt: skip
        self.run(f"apt-get update -q && apt-get install -y -q --no-install-recommends {TOOLS}", seconds=600)
        docker("cp", str(Path(__file__).with_name("attacks.py")), f"{ATTACKER}:/attacks.py")

    @staticmethod
    def run(command: str, seconds: int = 120, check: bool = True) -> str:
        return docker("exec", ATTACKER, "sh", "-c", command, seconds=seconds, check=check)

    def attack(self, name: str, *arguments: str | int, seconds: int = 120) -> dict[str, Any]:
        """One of attacks.py: what it saw."""
        words = " ".join(["python3 /attacks.py", name, *(f"'{argument}'" for argument in arguments)])
        seen: dict[str, Any] = json.loads(self.run(words, seconds).splitlines()[-1])
        return seen

    @contextlib.contextmanager
    def beside(self, name: str, *arguments: str | int) -> Iterator[None]:
        """One of attacks.py that goes on through the block, which ends it."""
        words = ["docker", "exec", ATTACKER, "timeout", "300", "python3", "/attacks.py", name, *map(str, arguments)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            self.run(f"pkill -f 'attacks.py {name}'", check=False)
            process.wait(30)


@dataclass
class Edge:
    """What the tests need."""

    fleet: Fleet
    attacker: Attacker
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def info(self, gateway: str) -> dict[str, str]:
        """HAProxy's own figures; that it answers at all is half of the promise."""
        lines = self.fleet.haproxy(gateway, "show info").splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def connections(self, gateway: str) -> int:
        return int(self.info(gateway)["CurrConns"])

    def wait(self, gateway: str, most: int, seconds: int) -> int:
        """Until a gateway has few connections."""
        deadline = time.monotonic() + seconds
        while (now := self.connections(gateway)) > most:
            assert time.monotonic() < deadline, f"{gateway} still has {now} connections"
            time.sleep(1)
        return now

    @contextlib.contextmanager
    def attacked(self, name: str) -> Iterator[dict[str, Any]]:
        """Clients all through the attack, of which none may lose a request; the block says what it saw in `said`."""
        seen: dict[str, Any] = {}
        with self.fleet.load(name) as clients:
            yield seen
            for gateway, address in GATEWAYS.items():
                began = time.monotonic()
                assert self.info(gateway)
                assert self.fleet.ask(address, "hello", 20, max_tokens=4) == 200
                assert time.monotonic() - began < 20 * crowd()
        good = f"{clients['sent']} requests, {clients['streams']} of them streams: 0 failed, 0 cut"
        self.rows.append((name, seen["said"], good))


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """EDGE_KEEP=1 leaves the machines."""
    (RESULTS / "attacks.md").unlink(missing_ok=True)
    play = Play(tmp_path_factory.mktemp("edge"), INVENTORY)
    fleet = Fleet(play, NODES, GATEWAYS, SETTINGS, clients=(12, 6, 20))
    with provided(fleet, "EDGE_KEEP", IMAGES) as fleet:
        make_certificate()
        attacker = Attacker()
        run = fleet.play(seconds=900)
        assert run.code == 0, run.messages
        os.environ["SSL_CERT_FILE"] = str(CERTIFICATE.with_suffix(".crt"))
        try:
            made = Edge(fleet, attacker)
            yield made
            table(made.rows)
        finally:
            os.environ.pop("SSL_CERT_FILE")
            if not os.environ.get("EDGE_KEEP"):
                docker("rm", "--force", ATTACKER, check=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in ("attacks.md", "accounts.md"):
        if (RESULTS / name).exists():
            terminalreporter.write_line("\n" + (RESULTS / name).read_text())


def table(rows: list[tuple[str, str, str]]) -> None:
    """For the terminal."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = ["| attack | how it was met | what the clients saw meanwhile |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    (RESULTS / "attacks.md").write_text("\n".join(lines) + "\n")
