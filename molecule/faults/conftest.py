"""Two gateways, two nodes and clients that use them: what the tests of this folder break, one fault at a time.

Each test injects one fault and asserts how it ends. Around it are the clients, a look at the gateways each second, and
the promises that hold whatever the fault: the nodes serve a release that was verified, enough of them all through,
and no request is lost but those of an engine that the fault itself has killed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from fleet import Fleet, provided
from machines import Machine, Mirror
from testbed import ROOT, Play, Run

INVENTORY = ROOT / "molecule/faults/inventory"
RESULTS = ROOT / "results/faults"
NODES = ("faults-1", "faults-2")
CANARY, OTHER = NODES
GATEWAYS = {"faults-gateway-1": "http://198.18.72.5:8000", "faults-gateway-2": "http://198.18.72.6:8000"}
IMAGES = ["vllm/vllm-openai:light"]
SETTINGS: dict[str, Any] = {"glm_rollout_waves": [1, 1], "glm_watchdog_timeout": 15}
FEWEST = 1  # nodes that the gateways offer and call up, at any time
HEALTHY_WITHIN = 240  # seconds from the end of a test


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): one fault of the list; its test function's module is the area")
    config.addinivalue_line("markers", "command_line: of glm-fleet, not of a fault")
    config.addinivalue_line("markers", "vital: one of those that `make test` runs too")


def pytest_sessionstart(session: pytest.Session) -> None:
    """The results of a whole run are of that run alone."""
    if (
        not session.config.option.keyword
        and not session.config.option.markexpr
        and not session.config.option.collectonly
    ):
        for old in (RESULTS / "cases").glob("*.json"):
            old.unlink()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Machines with a first release; FAULTS_KEEP=1 leaves all as it is."""
    play = Play(tmp_path_factory.mktemp("faults"), INVENTORY)
    fleet = Fleet(play, NODES, GATEWAYS, SETTINGS, clients=(12, 4, 1))
    with provided(fleet, "FAULTS_KEEP", IMAGES) as fleet:
        run = fleet.play(seconds=600)
        assert run.code == 0, run.messages
        yield fleet


@dataclass
class Case:
    """One fault: what is done, and what comes of it."""

    fleet: Fleet
    area: str
    fault: str
    began: float = 0.0
    what: str = ""  # what happened, in a few words
    engines: list[str] = field(default_factory=list)  # what serves as it begins
    spared: str = ""  # why requests may be lost: the fault takes an engine, not the project
    looks: list[tuple[float, int]] = field(default_factory=list)  # when, and how many nodes were offered and up

    @property
    def mirror(self) -> Mirror:
        return Mirror("glm-faults-mirror")

    def node(self, name: str = CANARY) -> Machine:
        return self.fleet.machine(name)

    def play(self, *arguments: str, seconds: int = 300, **settings: Any) -> Run:
        """A run that ends, whatever the fault."""
        self.began = self.began or time.monotonic()
        return self.fleet.play(*arguments, seconds=seconds, **settings)

    def next(self, **settings: Any) -> dict[str, Any]:
        """The settings of a release that no node has."""
        return {"light_release": f"{self.fault} {time.time():.0f}", **settings}

    def during(self, phase: str, act: Callable[[], object]) -> threading.Thread:
        """Acts as soon as the canary's state says so."""
        return once(lambda: self.fleet.state(CANARY)["phase"] == phase, act)

    def during_the_copy(self, name: str, act: Callable[[Machine], object]) -> threading.Thread:
        """Acts on a node as soon as its weights are being copied."""
        node = self.node(name)
        return once(
            lambda: node.run("systemctl is-active glm-weights", check=False).strip() in ("active", "activating"),
            lambda: act(node),
        )

    def refused(self, run: Run, pattern: str) -> None:
        """Nothing was changed, and one line says why."""
        assert run.code != 0
        line = found(run, pattern)
        assert run.recap("changed") == 0, run.output[-3000:]
        self.what = f"refused, nothing changed: {line}"

    def rolled_back(self, run: Run, pattern: str, release: str) -> None:
        """The canary serves its old release again, and the other node was not touched."""
        assert run.code != 0
        line = found(run, pattern)
        assert self.fleet.releases() == [release] * len(NODES)
        self.what = f"rolled back, rollout halted: {line}"

    def unprepared(self, run: Run, pattern: str, release: str) -> None:
        """It ended before the first wave: both nodes serve on, untouched."""
        assert run.code != 0
        line = found(run, pattern)
        assert [self.fleet.engine(node) for node in NODES] == self.engines, "an engine was touched"
        assert self.fleet.releases() == [release] * len(NODES)
        self.what = f"ended before the first wave, no engine touched: {line}"

    def converged(self, run: Run, what: str) -> None:
        assert run.code == 0, run.messages
        assert len(set(self.fleet.releases())) == 1
        self.what = what


def once(ready: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Acts as soon as it is ready, while the test goes on; not at all if it is not within 200 s."""

    def wait() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if ready():
                act()
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def cases(names: Iterable[str], vital: Collection[str]) -> list[Any]:
    """The parameters of a table of faults, whose names are the table's keys."""
    return [pytest.param(name, id=name, marks=[pytest.mark.vital] * (name in vital)) for name in names]


def found(run: Run, pattern: str) -> str:
    """The one line that the pattern matches; of a loop's item too."""
    lines = [line for message in run.messages for line in message.splitlines()]
    lines += " ".join(run.output.split()).split(" Origin: ")  # where a failed task is written follows what it says
    for line in lines:
        match = re.search(pattern, line)
        if match:
            said = (line if len(line) < 300 else line[match.start() :]).strip()
            said = said if len(said) < 300 else f"{said[:300].strip()} ..."
            return said.removeprefix("Nothing was changed: ").removeprefix("Nothing was changed. ")
    raise AssertionError(f"no line matches {pattern!r}: {run.messages}\n{run.errors}")


def watch(case: Case, stop: threading.Event) -> None:
    """How many nodes the gateways offer and call up, each second."""
    gateway = next(iter(GATEWAYS))
    while not stop.wait(1.0):
        try:
            up = sum(state == "in up" for state in case.fleet.rotation(gateway).values())
        except (AssertionError, ValueError, IndexError):
            continue  # HAProxy is being reloaded, or its host restarted
        case.looks.append((time.monotonic(), up))


def serves(fleet: Fleet, node: str) -> str:
    """Why a node is not what it should be; empty where it serves what was verified last."""
    state, release = fleet.state(node), fleet.release(node)
    if (state["phase"], state["release"]) != ("serving", release):
        return f"{node}: state {state}, release {release}"
    verified = json.loads(fleet.run(node, "cat /var/lib/glm/verify.json"))
    wanted = json.loads(fleet.run(node, f"cat /opt/glm/releases/{release}/release.json"))["image_digest"]
    running = fleet.run(node, "docker inspect --format '{{.Config.Image}}' glm-engine", check=False).strip()
    if not (verified["ok"] and running.endswith(wanted)):
        return f"{node}: verified {verified['ok']}, runs {running}, wanted {wanted}"
    return ""


@pytest.fixture
def case(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Case]:
    """Clients and looks all through the test; afterwards the fleet is whole, and nothing was lost."""
    marker = request.node.get_closest_marker("fault")
    area = request.module.__name__.removeprefix("test_").replace("_", " ").capitalize()
    case = Case(fleet, area, request.node.callspec.id if marker is None else marker.args[0])
    stop = threading.Event()
    if not fleet.all_in() or any(serves(fleet, node) for node in NODES) or len(set(fleet.releases())) > 1:
        mended = fleet.play(seconds=600)  # what the case before has broken is not this one's
        assert mended.code == 0, mended.messages
    case.engines = [fleet.engine(node) for node in NODES]
    with ThreadPoolExecutor() as pool, fleet.load(case.fault, check=False) as seen:
        watching = pool.submit(watch, case, stop)
        try:
            yield case
            deadline = time.monotonic() + HEALTHY_WITHIN
            while not fleet.all_in() or any(serves(fleet, node) for node in NODES):
                assert time.monotonic() < deadline, [serves(fleet, node) for node in NODES] + [
                    str(fleet.rotation(gateway)) for gateway in GATEWAYS
                ]
                time.sleep(1)
        finally:
            stop.set()
            watching.result()
    lost = [*seen["failed"], *seen["cut"]]
    out = [at for at, up in case.looks if up < len(NODES) and at >= case.began]
    assert not lost or (case.spared and len(lost) < seen["sent"] / 4), lost
    assert min((up for _, up in case.looks), default=len(NODES)) >= FEWEST, "too few nodes were offered"
    if case.what:
        record(case, seen, round(max(out) - case.began) if out else 0)


def record(case: Case, seen: dict[str, Any], healthy_s: int) -> None:
    """For the table: only what has passed comes this far."""
    lost = len(seen["failed"]) + len(seen["cut"])
    (RESULTS / "cases").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{case.area} {case.fault}".lower())
    row = {
        "area": case.area,
        "fault": case.fault,
        "what": re.sub(r"\b[0-9a-f]{12}\b", "ID", re.sub(r"\w+ on \S+ \(process \d+\)", "NAME on HOST", case.what)),
        "requests": seen["sent"],
        "lost": lost,
        "spared": case.spared if lost else "",
        "healthy_s": healthy_s,
    }
    (RESULTS / "cases" / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n")


@pytest.fixture
def release(case: Case) -> str:
    """What all nodes serve as the test begins."""
    (only,) = set(case.fleet.releases())
    return only
