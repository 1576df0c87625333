"""engine-watchdog against metrics and a `systemctl` of the test: what it restarts, and what it leaves alone."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/inference_service/files/engine-watchdog"
SYSTEMCTL = """#!/bin/sh
cd "$HERE" || exit 1
echo "$*" >> systemctl.log
case "$1" in
  show) cat unit ;;
  try-restart) [ ! -e refuses ] || { echo "Job failed." >&2; exit 1; } ;;
esac
"""
STATE = {"phase": "serving", "release": "r1", "previous": None, "rollout_id": "x", "since": "s", "reason": None}


class Node:
    """A directory with what the watchdog reads and writes, and the engine's metrics."""

    def __init__(self, directory: Path, engine: str = "vllm") -> None:
        self.directory = directory
        data = yaml.safe_load((ROOT / f"engines/{engine}.yml").read_text())
        self.names: dict[str, Any] = data["metrics"]
        self.metrics: dict[str, float] | None = {}
        self.asked: list[dict[str, Any]] = []
        self.answers: int | None = 200  # of a request for a token; None for none at all
        self.when_asked: Callable[[], None] = lambda: None
        node = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if node.metrics is None:
                    return  # closes without an answer
                self.send_response(200)
                self.end_headers()
                lines = [name if "{" in name else f'{name}{{engine="0"}}' for name in node.metrics]
                lines = [f"{line} {value}" for line, value in zip(lines, node.metrics.values(), strict=True)]
                self.wfile.write(("# TYPE x counter\n" + "\n".join(lines) + "\n").encode())

            def do_POST(self) -> None:
                node.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                node.when_asked()
                if node.answers is not None:
                    self.send_response(node.answers)
                    self.end_headers()
                else:
                    time.sleep(0.5)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        for name in ("release", "data", "run"):
            (directory / name).mkdir()
        (directory / "systemctl").write_text(SYSTEMCTL)
        (directory / "systemctl").chmod(0o755)
        (directory / "release/release.json").write_text(
            json.dumps(
                {
                    "id": "r1",
                    "url": f"http://127.0.0.1:{self.server.server_port}",
                    "metrics": self.names,
                    "first_steps": data["first_steps"],
                    "served_model_names": ["m"],
                },
            )
        )
        (directory / "data/state.json").write_text(json.dumps(STATE))
        self.unit()

    def unit(self, active: str = "active", invocation: str = "one", serves: float = 7200) -> None:
        """`serves` is for how many seconds it has."""
        begin = int((time.monotonic() - serves) * 1e6)
        lines = [f"ActiveState={active}", f"InvocationID={invocation}", f"ActiveEnterTimestampMonotonic={begin}"]
        (self.directory / "unit").write_text("\n".join(lines) + "\n")

    def works(self, running: int = 0, waiting: int = 0, **progress: float) -> None:
        """`progress` by the end of the metric's name."""
        self.metrics = {self.names["running"]: running}
        if "waiting" in self.names:
            self.metrics[self.names["waiting"]] = waiting
        self.metrics |= {
            name: next((value for end, value in progress.items() if end in name), 7.0)
            for name in self.names["progress"]
        }

    def look(self, seconds: float = 0.0) -> subprocess.CompletedProcess[str]:
        """One look; `seconds` is the time after which a standstill counts."""
        return subprocess.run(
            [PROGRAM, self.directory / "release", self.directory / "data", str(seconds)],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "PATH": f"{self.directory}:{os.environ['PATH']}",
                "HERE": str(self.directory),
                "RUNTIME_DIRECTORY": str(self.directory / "run"),
            },
        )

    def restarts(self) -> int:
        return (self.directory / "systemctl.log").read_text().count("try-restart glm-engine.service")

    def data(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.directory / "data" / name).read_text()))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.server.shutdown()


NEVER, AT_ONCE = 3600.0, 0.001


@pytest.mark.parametrize("work", [{"running": 1}, {"waiting": 1}])
def test_work_without_a_token_is_a_stall(node: Node, work: dict[str, int]) -> None:
    node.works(**work)
    node.answers = None
    node.look(NEVER)
    assert node.restarts() == 0
    done = node.look(AT_ONCE)
    assert done.returncode == 0
    assert node.restarts() == 1
    head = re.match(
        r"<4>glm: the engine is stalled: (no token for \d s, 1 requests in flight): restarting it", done.stdout
    )
    assert head and "(restart 1 of this kind)" in done.stdout
    said = head[1]
    assert (
        node.data("watchdog.json").items() >= {"restarts": 1, "release": "r1", "reason": said, "serves": True}.items()
    )
    assert node.data("state.json")["reason"].endswith(said)
    assert node.data("state.json") | {"reason": None} == STATE


@pytest.mark.parametrize("metric", ["generation_tokens", "prompt_tokens", "kv_cache_usage"])
def test_an_engine_whose_counters_move_is_left_alone(node: Node, metric: str) -> None:
    """However long its answers take: a long prompt moves the cache's use alone."""
    node.answers = None
    for step in range(3):
        node.works(running=32, waiting=500, **{metric: step / 8})
        node.look(AT_ONCE if step else NEVER)
    # The last look began a new standstill, which is not over at once.
    assert node.restarts() == 0


def memory(node: Node) -> dict[str, Any]:
    return dict(json.loads((node.directory / "run/look.json").read_text()))


def test_an_idle_engine_is_not_asked_before_half_of_the_time(node: Node) -> None:
    node.works()
    node.look(NEVER)
    node.look(NEVER)
    assert node.asked == []


@pytest.mark.parametrize("status", [200, 400, 503])
def test_an_idle_engine_that_gives_a_token_is_left_alone(node: Node, status: int) -> None:
    node.works()
    node.answers = status
    node.look(NEVER)
    before = memory(node)["since"]
    for _ in range(2):
        node.look(AT_ONCE)
    assert node.asked[0] == {"model": "m", "prompt": "ok", "max_tokens": 1}
    assert memory(node)["since"] > before
    assert node.restarts() == 0


def test_an_idle_engine_that_gives_no_token_is_a_stall(node: Node) -> None:
    """Its gauges are as old as its last step: it may have taken requests since."""
    node.works()
    node.answers = None
    node.look(NEVER)
    done = node.look(AT_ONCE)
    assert "s, nor one that was asked for: restarting" in done.stdout
    assert node.restarts() == 1


@pytest.mark.parametrize("running", [0, 1])
def test_an_engine_that_moves_while_it_is_asked_is_left_alone(node: Node, running: int) -> None:
    node.works(running=running)
    node.answers = None
    node.when_asked = lambda: node.works(running=1, generation_tokens=8.0)
    node.look(NEVER)
    node.look(AT_ONCE)
    assert len(node.asked) == 1
    assert node.restarts() == 0


@pytest.mark.parametrize("work", [{"running": 1}, {"waiting": 1}])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_with_requests_that_gives_a_token_is_left_alone(
    tmp_path: Path, engine: str, work: dict[str, int]
) -> None:
    """A client that stalls while it sends its body counts as a request in flight, and the engine is well.

    One whose grammar is compiled waits, for as long as that takes, and others are answered.
    """
    node = Node(tmp_path, engine)
    node.works(**work)
    node.look(NEVER)
    before = memory(node)["since"]
    for _ in range(2):
        node.look(AT_ONCE)
    assert node.asked[0] == {"model": "m", "prompt": "ok", "max_tokens": 1}
    assert memory(node)["since"] > before
    assert node.restarts() == 0
    node.server.shutdown()


@pytest.mark.parametrize("status", [400, 500, 503])
def test_a_refusal_is_no_token_where_requests_are_in_flight(node: Node, status: int) -> None:
    """The HTTP server of a hung engine refuses what its full queue has no place for."""
    node.works(running=1)
    node.answers = status
    node.look(NEVER)
    node.look(AT_ONCE)
    assert len(node.asked) == 1
    assert node.restarts() == 1


def test_an_engine_with_requests_is_not_asked_before_half_of_the_time(node: Node) -> None:
    node.works(running=1)
    node.look(NEVER)
    node.look(NEVER)
    assert node.asked == []


def test_work_counts_from_when_it_was_first_seen(node: Node) -> None:
    node.works()
    node.look(NEVER)
    before = memory(node)["since"]
    node.works(running=1)
    node.look(NEVER)
    assert memory(node)["since"] > before
    since = memory(node)["since"]
    node.look(NEVER)
    assert memory(node)["since"] == since
    assert node.restarts() == 0


def test_metrics_that_do_not_answer_are_a_stall(node: Node) -> None:
    node.works()
    node.look(NEVER)
    node.metrics = None
    node.look(NEVER)
    done = node.look(AT_ONCE)
    assert re.search(r"its metrics have not answered for \d+ s", done.stdout)
    assert node.restarts() == 1


@pytest.mark.parametrize("active", ["activating", "deactivating", "inactive", "failed"])
def test_an_engine_that_does_not_serve_is_left_to_systemd(node: Node, active: str) -> None:
    node.works(running=1)
    node.look(NEVER)
    node.unit(active)
    node.look(AT_ONCE)
    assert node.restarts() == 0
    assert not (node.directory / "run/look.json").exists()


def test_a_new_start_begins_anew(node: Node) -> None:
    node.works(running=1)
    node.look(NEVER)
    before = json.loads((node.directory / "run/look.json").read_text())["since"]
    node.unit(invocation="two")
    node.look(NEVER)
    assert json.loads((node.directory / "run/look.json").read_text())["since"] > before


def test_restarts_are_counted_and_one_that_fails_is_said_so(node: Node) -> None:
    node.answers = None
    node.works(running=1)
    node.look(NEVER)
    node.look(AT_ONCE)
    (node.directory / "refuses").touch()
    done = node.look(AT_ONCE)
    assert done.returncode == 1
    assert "restart 2 of this kind" in done.stdout
    assert re.search(r"failed \(no token for \d s, 1 requests in flight\): .*Job failed\.\n$", done.stdout)
    assert node.data("watchdog.json")["restarts"] == 2
    assert node.data("watchdog.json")["serves"] is False
    assert "see journalctl -u glm-engine" in node.data("state.json")["reason"]


LOOKS = [
    "", '{"invoc', "[]", "null", "\x00\x00", '{"invocation": "one"}',
    '{"invocation": "one", "progress": [7.0, 7.0, 7.0], "since": "x", "idle": false}',
    '{"invocation": "one", "progress": [7.0], "since": null, "idle": false}',
]  # fmt: skip


@pytest.mark.parametrize("text", LOOKS)
@pytest.mark.parametrize("answers", [True, False])
def test_a_damaged_look_is_no_look(node: Node, text: str, answers: bool) -> None:
    """A power cut or a full disk may leave it so: the next look begins anew, and the one after it sees the stall."""
    node.works(running=1)
    node.answers = None
    if not answers:
        node.metrics = None
    (node.directory / "run/look.json").write_text(text)
    assert node.look(NEVER).stderr == ""
    assert memory(node)["invocation"] == "one"
    assert (node.look(AT_ONCE).stderr, node.restarts()) == ("", 1)


@pytest.mark.parametrize(
    "text", ["", '{"restarts": 3', '{"restarts": null}', '{"restarts": "many"}', '{"restarts": []}']
)
def test_a_damaged_record_keeps_nobody_from_restarting(node: Node, text: str) -> None:
    for name in ("watchdog.json", "state.json"):
        (node.directory / "data" / name).write_text(text)
    node.works(running=1)
    node.answers = None
    node.look(NEVER)
    assert node.look(AT_ONCE).stderr == ""
    assert (node.restarts(), node.data("watchdog.json")["restarts"]) == (1, 1)


def test_a_rollout_keeps_its_own_reason(node: Node) -> None:
    state = {**STATE, "phase": "draining"}
    (node.directory / "data/state.json").write_text(json.dumps(state))
    node.answers = None
    node.works(running=1)
    node.look(NEVER)
    node.look(AT_ONCE)
    assert node.restarts() == 1
    assert node.data("state.json") == state


def test_a_release_without_metrics_is_left_alone(node: Node) -> None:
    (node.directory / "release/release.json").write_text('{"id": "r0"}')
    assert node.look(AT_ONCE).returncode == 0
    assert node.restarts() == 0


def test_sglang_counts_steps_not_ended_requests(tmp_path: Path) -> None:
    """Its generation_tokens_total stands still for as long as one answer takes."""
    node = Node(tmp_path, "sglang")
    assert node.names["progress"] == ["sglang:realtime_tokens_total"]
    node.answers = None
    for step in range(3):
        node.works(running=1, realtime_tokens=float(step))
        node.look(AT_ONCE if step else NEVER)
    assert node.restarts() == 0
    node.server.shutdown()


def test_sglang_has_the_time_to_compile_in_its_first_steps(tmp_path: Path) -> None:
    """And no more, once its service is no longer young."""
    node = Node(tmp_path, "sglang")
    node.works(running=1)
    node.answers = None
    for serves, restarts in ((60, 0), (7200, 1)):
        node.unit(invocation=str(serves), serves=serves)
        node.look(NEVER)
        node.look(AT_ONCE)
        assert node.restarts() == restarts
    node.server.shutdown()


def test_a_check_of_health_is_no_work(tmp_path: Path) -> None:
    node = Node(tmp_path, "sglang")
    progress = node.names["progress"]
    node.works()
    assert node.metrics is not None
    node.metrics['sglang:http_requests_active{endpoint="/health",method="GET"}'] = 1
    node.look(NEVER)
    assert memory(node)["idle"] is True
    node.metrics['sglang:http_requests_active{endpoint="/v1/messages",method="POST"}'] = 1
    node.look(NEVER)
    assert memory(node)["idle"] is False
    # A release that calls the label something else.
    node.metrics = {
        'sglang:http_requests_active{endpoint="/v1/messages",verb="POST"}': 1,
        **dict.fromkeys(progress, 7.0),
    }
    node.look(NEVER)
    assert memory(node)["idle"] is False
    node.server.shutdown()
