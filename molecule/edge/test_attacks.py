"""What an edge gets from the open internet. Each attack comes from one machine; good clients go on meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import INVENTORY, NODES, PER_SOURCE, PLAIN, TLS, Edge
from testbed import ROOT

GATEWAY = {TLS: "edge-gateway-1", PLAIN: "edge-gateway-2"}
OWN = 60  # connections of the clients, checks and tests
MANY = 3000


@pytest.mark.parametrize(("url", "bound"), [(PLAIN, 40), (TLS, 75)], ids=["no request", "no TLS handshake"])
def test_thousands_of_idle_connections(url: str, bound: int, edge: Edge) -> None:
    with edge.attacked(f"{MANY} connections without a byte, {url.split(':', maxsplit=1)[0]}") as seen:
        found = edge.attacker.attack("idle", url, MANY, seconds=200)
        assert found["held"] <= PER_SOURCE and found["left"] == 0 and found["seconds"] <= bound
        seen["said"] = f"{found['held']} held, closed after {found['seconds']} s"


def test_connections_that_ask_once_and_stay(edge: Edge) -> None:
    with edge.attacked(f"{MANY} connections that ask once and stay") as seen:
        found = edge.attacker.attack("keep_alive", PLAIN, MANY, seconds=200)
        assert found["held"] <= PER_SOURCE and found["left"] == 0 and found["seconds"] <= 45
        seen["said"] = f"{found['held']} held, closed after {found['seconds']} s"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("slow headers", "-H -p 3"),
        ("slow bodies without a key", "-B -s 8192 -p 3"),
        ("slow reading", "-X -w 10 -y 20 -n 5 -z 5 -k 3"),
    ],
    ids=["headers", "bodies", "reading"],
)
@pytest.mark.parametrize("url", [PLAIN, TLS], ids=["http", "https"])
def test_slowhttptest(name: str, options: str, url: str, edge: Edge) -> None:
    path = "/v1/chat/completions" if "-B" in options else "/v1/models"
    command = f"slowhttptest {options} -c 1500 -r 300 -i 5 -x 24 -l 25 -u {url}{path}"
    with edge.attacked(f"slowhttptest, {name}, {url.split(':', maxsplit=1)[0]}") as seen, ThreadPoolExecutor(1) as pool:
        running = pool.submit(edge.attacker.run, command, 120, False)
        most = 0
        while not running.done():
            most = max(most, edge.connections(GATEWAY[url]))
            time.sleep(1)
        assert "slowhttptest" in running.result()
        assert most <= PER_SOURCE + OWN
        left = edge.wait(GATEWAY[url], OWN, 60)
        seen["said"] = f"at most {most} connections at a time, {left} after it"


def test_slow_bodies_with_a_key(edge: Edge) -> None:
    """They take places of an engine; few enough that others have some."""
    with edge.attacked("300 slow bodies with a key") as seen:
        found = edge.attacker.attack("slow_bodies", PLAIN, 300, edge.fleet.key())
        seen["said"] = f"{found['left']} still held by their bytes after 30 s, gone with their client"
    edge.wait("edge-gateway-2", OWN, 60)


def test_a_flood_of_h2_streams_without_a_key(edge: Edge) -> None:
    with edge.attacked("h2load, 30,000 requests in 100 streams of 50 connections, no key") as seen:
        said = edge.attacker.run(f"h2load -n 30000 -c 50 -m 100 {TLS}/v1/models", 200)
        codes = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", said)
        assert codes and codes.groups() == ("0", "0", codes[3], "0") and int(codes[3]) > 1000, said
        finished = re.search(r"finished in ([0-9.]+)(ms|s), ([0-9.]+) req/s", said)
        assert finished
        seen["said"] = f"refused with 401 and 429, {finished[3]} a second"


def test_rapid_reset(edge: Edge) -> None:
    with edge.attacked("HTTP/2 rapid reset") as seen:
        found = edge.attacker.attack("reset", PLAIN, 50_000)
        assert found["streams"] > 1000
        seen["said"] = f"{found['streams']} streams in {found['connections']} connections, none reached a node"


def test_smuggling(edge: Edge) -> None:
    with edge.attacked("request smuggling, 11 kinds") as seen:
        answers = edge.attacker.attack("smuggle", PLAIN, 0, edge.fleet.key())["answers"]
        refused = sum(400 in statuses for statuses in answers.values())
        # An answer, or one and the refusal of what followed: never two that were let through.
        assert all(sum(status < 400 for status in statuses) <= 1 for statuses in answers.values()), answers
        for host in (*GATEWAY.values(), *NODES):
            log = edge.fleet.run(host, "journalctl --unit=haproxy --output=cat --no-pager | grep smuggled || true")
            requests = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
            assert all(request["key"] == "-" and request["status"] != 200 for request in requests), log
        seen["said"] = f"{refused} of {len(answers)} refused with 400, no second request reached a node"


def test_guessing_keys(edge: Edge) -> None:
    with edge.attacked("5,000 wrong keys, one after another") as seen:
        found = edge.attacker.attack("wrong_keys", PLAIN, 5000)["statuses"]
        assert set(found) <= {"401", "429"} and found["429"] > found["401"]
        seen["said"] = f"{found['401']} times 401, {found['429']} times 429"


def test_a_request_of_death_kills_one_engine_alone(edge: Edge) -> None:
    """Without clients beside it: the engine that dies takes its own requests with it."""
    fleet = edge.fleet
    for node in NODES:
        fleet.run(node, "docker exec glm-engine sh -c 'echo death > /tmp/fault'")
    before = {node: fleet.engine(node) for node in NODES}
    assert fleet.ask(PLAIN, "a request of death", 60) == 502
    time.sleep(3)
    killed = [node for node in NODES if fleet.engine(node) != before[node]]
    assert len(killed) == 1, killed
    assert fleet.ask(PLAIN, "hello", 60, max_tokens=4) == 200
    (survivor,) = set(NODES) - set(killed)
    fleet.run(survivor, "docker exec glm-engine rm /tmp/fault")
    deadline = time.monotonic() + 180
    while not fleet.all_in():
        assert time.monotonic() < deadline
        time.sleep(1)
    edge.rows.append(("a request that kills its engine", "502, sent to no other node: one of two engines died", "-"))


def test_words_of_a_node_are_text_in_the_terminal(edge: Edge) -> None:
    """A node that somebody else has taken over says what it likes."""
    node = edge.fleet.machine(NODES[0])
    state = node.state()
    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2Jall is well\x9b2J"
    write = "cat > /var/lib/glm/state.json"
    node.run(write, stdin=json.dumps({**state, "reason": evil}))
    try:
        command = [sys.executable, "-m", "glm_fleet", "status", "-i", str(INVENTORY)]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        plain = edge.fleet.play(playbook="playbooks/status.yml")
    finally:
        node.run(write, stdin=json.dumps(state))
    for text in (shown.stdout, shown.stderr, plain.output):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "all is well" in shown.stdout + shown.stderr
    edge.rows.append(("terminal escapes in a node's words", "printed without their control characters", "-"))


def test_the_units_can_do_little(edge: Edge) -> None:
    """By systemd's own measure on the node; what installs packages or is started by others is not ours to bound."""
    found = {}
    for host in (NODES[0], "edge-gateway-1"):
        listed = edge.fleet.run(host, "systemd-analyze security --no-pager | grep -E '^(glm-|haproxy)'")
        found.update({line.split()[0]: float(line.split()[1]) for line in listed.splitlines()})
    assert {"haproxy.service", "glm-engine.service", "glm-watchdog.service"} <= set(found)
    assert max(found.values()) <= 3.5, found
