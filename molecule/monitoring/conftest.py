"""A fleet that serves, with clients, and the Prometheus that watches it."""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fleet import Fleet, provided
from testbed import ROOT, Play, crowd

INVENTORY = ROOT / "molecule/monitoring/inventory"
NODES, GATEWAY, WATCHER = ("watched-1", "watched-2"), "watched-gateway", "watcher"
GATEWAYS = {GATEWAY: "http://198.18.81.5:8000"}
IMAGES = ["vllm/vllm-openai:light"]


class Watched(Fleet):
    """What Prometheus knows of it."""

    def ask_prometheus(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(query)}"
        answer = json.loads(self.run(WATCHER, f"curl -sf '{url}'"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, query: str) -> list[float]:
        return [float(series["value"][1]) for series in self.ask_prometheus("query", query=query)["result"]]

    def targets(self) -> dict[str, str]:
        """Of each target, by job and instance, how it is."""
        found = self.ask_prometheus("targets", state="active")["activeTargets"]
        return {f"{target['labels']['job']} {target['labels']['instance']}": target["health"] for target in found}

    def alerts(self) -> set[str]:
        """Those that fire, but for what a container cannot have."""
        found = self.ask_prometheus("alerts")["alerts"]
        return {
            f"{alert['labels']['alertname']} {alert['labels'].get('instance', '')}".strip()
            for alert in found
            if alert["state"] == "firing"
        }

    def delivered(self) -> set[str]:
        """Those that Alertmanager has."""
        found = json.loads(self.run(WATCHER, "curl -sf http://127.0.0.1:9093/api/v2/alerts"))
        return {alert["labels"]["alertname"] for alert in found}

    def wait(self, what: Callable[[], Any], seconds: float) -> float:
        """How long it took, in seconds of a machine of one's own."""
        spent = 0.0
        while not what():
            began = time.monotonic()
            time.sleep(1)
            spent += (time.monotonic() - began) / crowd()
            assert spent < seconds, (self.alerts(), self.targets())
        return spent


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    play = Play(tmp_path_factory.mktemp("monitoring"), INVENTORY)
    with provided(Watched(play, NODES, GATEWAYS, {}), "MONITORING_KEEP", IMAGES) as fleet:
        assert isinstance(fleet, Watched)
        yield fleet


@pytest.fixture(scope="session")
def watched(fleet: Watched) -> Watched:
    """The fleet serves, and Prometheus sees all of it."""
    run = fleet.play(seconds=900)
    assert run.code == 0, run.messages
    run = fleet.play(playbook="playbooks/monitoring.yml", seconds=300)
    assert run.code == 0, run.messages or run.output[-3000:]
    fleet.wait(lambda: (seen := fleet.targets()) and set(seen.values()) == {"up"}, 120)
    return fleet
