"""engine-launch, with programs of the test in the place of `docker` and of the engine."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loading import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/inference_service/files/engine-launch"
engine_launch: Any = load_file(PROGRAM, "engine_launch")

# Keeps the container's state in a file and its process id in another, as the test's engine leaves them.
DOCKER = """#!/bin/sh
cd "$HERE" || exit 1
echo "$*" >> docker.log
case "$1 $2" in
  "container ls") [ -e docker-is-down ] && { rm docker-is-down; exit 1; }; cat container 2>/dev/null ;;
  "container rm") rm -f container ;;
  "stop -t") kill -TERM "$(cat pid)"; sleep 0.3; rm -f container ;;
  "attach --no-stdin") echo "attached" ; while [ -e container ]; do sleep 0.1; done ;;
esac
exit 0
"""
ENGINE = """#!{python}
import contextlib, http.server, json, os, signal, sys, threading, time
here = os.environ["HERE"]
open(here + "/pid", "w").write(str(os.getpid()))
open(here + "/container", "w").write("running")
def stop(*_):
    end(0)
signal.signal(signal.SIGTERM, stop)
lock = threading.Lock()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock, open(here + "/asked", "a") as file: file.write(json.dumps(body) + "\\n")
        while os.path.exists(here + "/compiles"): time.sleep(0.05)
        if os.path.exists(here + "/compiles-later"): open(here + "/compiles", "w")
        self.send_response(200); self.end_headers()
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/v1/models":
            self.wfile.write(json.dumps({{"data": [{{"id": "{served}"}}]}}).encode())
    def log_message(self, *_): pass
def serve():
    http.server.ThreadingHTTPServer.request_queue_size = 64
    server = http.server.ThreadingHTTPServer(("127.0.0.1", {port}), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
def end(code):
    with contextlib.suppress(FileNotFoundError): os.unlink(here + "/container")
    with contextlib.suppress(ValueError): sys.stdout.flush()
    os._exit(code)
{body}
"""


def free_ports() -> int:
    """The first of two free ports: the engine's, and the one on which its agent speaks."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


class Node:
    """A release, a `docker` in PATH and systemd's notification socket."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.release = directory / "release"
        self.release.mkdir()
        self.program(directory / "bin/docker", DOCKER)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(directory / "notify"))
        self.socket.setblocking(False)
        self.port = free_ports()
        self.process: subprocess.Popen[str] | None = None

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def install(self, body: str, served: str = "glm", **changes: Any) -> None:
        engine = yaml.safe_load((ROOT / "engines/vllm.yml").read_text())
        data = {
            "id": "0123456789ab",
            "served_model_names": ["glm"],
            "listed_model_names": ["glm"],
            "container": "glm-engine",
            "url": f"http://127.0.0.1:{self.port}",
            "health_path": "/health",
            "models_path": "/v1/models",
            "start_timeout": 30,
            "stop_timeout": 5,
            **engine["log"],
            **changes,
        }
        (self.release / "release.json").write_text(json.dumps(data))
        text = ENGINE.format(python=sys.executable, port=self.port, served=served, body=body)
        self.program(self.release / "run", text)

    def launch(self, *arguments: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments, str(self.release)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
                "HERE": str(self.directory),
                "NOTIFY_SOCKET": str(self.directory / "notify"),
            },
        )
        return self.process

    def end(self) -> tuple[int, str, list[str]]:
        assert self.process
        output, errors = self.process.communicate(timeout=30)
        return self.process.returncode, output, errors.splitlines()

    def notified(self) -> str:
        told = []
        while True:
            try:
                told.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return "\n".join(told)

    def wait_for(self, text: str) -> str:
        end, told = time.monotonic() + 20, ""
        while time.monotonic() < end:
            told += self.notified()
            if text in told:
                return told
            time.sleep(0.05)
        raise AssertionError(f"{text!r} was not notified, only {told!r}")

    def wait_for_docker(self, text: str) -> None:
        end = time.monotonic() + 20
        while text not in self.docker_log():
            assert time.monotonic() < end, f"docker was not called with {text!r}, only with {self.docker_log()!r}"
            time.sleep(0.05)

    def docker_log(self) -> str:
        path = self.directory / "docker.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    if node.process and node.process.poll() is None:
        node.process.kill()
        node.process.communicate()
    node.socket.close()


def test_serves_and_stops_gently_when_asked(node: Node) -> None:
    node.install('print("hello", flush=True); serve(); time.sleep(60)')
    process = node.launch()
    assert "READY=1\nSTATUS=serving glm, release 0123456789ab" in node.wait_for("READY=1")
    process.send_signal(signal.SIGTERM)
    code, output, errors = node.end()
    assert (code, errors) == (0, [])
    assert "hello" in output
    assert "stop -t 5 glm-engine" in node.docker_log()
    assert "STOPPING=1" in node.notified()


def test_tells_the_phases(node: Node) -> None:
    node.install(r"""
print("(EngineCore_DP0 pid=7) INFO 11-23 20:00:00 [gpu_model_runner.py:1] Starting to load model /m...", flush=True)
time.sleep(3)
sys.stdout.write("Loading safetensors checkpoint shards:  50% Completed | 70/141 [00:05<00:05]\r"); sys.stdout.flush()
time.sleep(3)
serve(); time.sleep(60)""")
    node.launch()
    told = node.wait_for("READY=1")
    assert told.index("STATUS=loading weights") < told.index("STATUS=loading weights, 50 %") < told.index("READY=1")


class Agent:
    """What the edge hears on the port after the engine's."""

    def __init__(self, node: Node) -> None:
        self.port = node.port + 1

    def says(self) -> str:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return connection.makefile().read()
        except OSError:
            return ""

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 20
        while (said := self.says()) != text:
            assert time.monotonic() < end, f"the agent never said {text!r}, last {said!r}"
            time.sleep(0.05)


def test_an_engine_is_warm_before_the_edge_may_use_it(node: Node) -> None:
    agent = Agent(node)
    node.install("time.sleep(1); serve(); time.sleep(60)", warm_up_timeout=60)
    (node.directory / "compiles").touch()
    process = node.launch()
    agent.wait_for("down #starting the container\n")
    told = node.wait_for("STATUS=warming up: a short prompt")
    agent.wait_for("down #warming up: a short prompt\n")
    assert "READY=1" not in told
    (node.directory / "compiles").unlink()
    node.wait_for("READY=1")
    agent.wait_for("up\n")
    asked = [json.loads(line) for line in (node.directory / "asked").read_text().splitlines()]
    assert len(asked) == sum(count for count, _ in engine_launch.WARM_UP.values())
    assert [bool(body.get("stream")) for body in asked].count(True) == 2
    assert any("tools" in body for body in asked)
    assert max(len(body["messages"][0]["content"].split()) for body in asked) >= 20000
    assert any(body.get("tool_choice") == "required" for body in asked)
    long = [body["messages"][0]["content"][:10] for body in asked if len(body["messages"][0]["content"]) > 1000]
    assert len(long) == len(set(long)) == 3, "what the prefix cache holds warms nothing"
    assert len({body["max_tokens"] for body in asked}) == 32, "a batch shrinks step by step"
    assert {body["model"] for body in asked} == {"glm"}
    (node.directory / "container").write_text("running")
    process.send_signal(signal.SIGTERM)
    assert node.end()[0] == 0
    assert agent.says() == ""


def test_an_engine_that_does_not_get_warm_serves_all_the_same(node: Node) -> None:
    node.install("serve(); time.sleep(60)", warm_up_timeout=4)
    (node.directory / "compiles-later").touch()
    process = node.launch()
    node.wait_for("READY=1")
    Agent(node).wait_for("up\n")
    process.send_signal(signal.SIGTERM)
    code, output, _ = node.end()
    assert code == 0
    assert "engine-launch: warming up: the same, greedy: " in output
    assert "engine-launch: not warm after 4 s" in output


def test_an_engine_that_answers_nothing_has_failed_to_start(node: Node) -> None:
    node.install("serve(); time.sleep(60)", warm_up_timeout=3)
    (node.directory / "compiles").touch()
    node.launch()
    code, output, errors = node.end()
    assert code == 1
    assert errors == [
        "glm: error: the engine is healthy, and there was no answer to a request for 3 s: "
        "see journalctl -u glm-engine, or raise inference_service_warm_up_timeout"
    ]
    assert "engine-launch: warming up: a short prompt: 3.0 s, no answer from /v1/chat/completions within 3 s" in output
    assert "READY=1" not in node.notified()


def test_the_agent_speaks_for_a_release_of_before(node: Node) -> None:
    """Its release.json knows no warm-up: the edge, which was told `down` by the start before, hears `up`."""
    node.install("serve(); time.sleep(60)")
    process = node.launch()
    node.wait_for("READY=1")
    Agent(node).wait_for("up\n")
    assert not (node.directory / "asked").exists()
    process.send_signal(signal.SIGTERM)
    assert node.end()[0] == 0


def test_a_taken_agent_port_is_named(node: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", node.port + 1))
        taken.listen()
        node.install("serve(); time.sleep(60)")
        node.launch()
        code, _, errors = node.end()
    assert code == 1
    assert errors == [
        f"glm: error: port {node.port + 1}, where the edge asks whether the engine is ready, cannot be opened "
        "(Address already in use): free it, or set glm_engine_port to a port below a free one"
    ]


def test_an_engine_that_exits_at_once(node: Node) -> None:
    node.install('print("vllm serve: error: unrecognized arguments: --frobnicate"); end(2)')
    node.launch()
    code, output, errors = node.end()
    assert code == 1
    assert errors == [
        "glm: error: engine exited with code 2 after 2 s: vllm serve: error: unrecognized arguments: --frobnicate"
    ]
    assert "unrecognized" in output


def test_an_engine_that_never_gets_ready_is_stopped(node: Node) -> None:
    node.install('print("Starting to load model", flush=True); time.sleep(60)', start_timeout=3)
    node.launch()
    code, _, errors = node.end()
    assert code == 1
    assert errors == [
        "glm: error: engine not ready after 3 s, last phase: loading weights: "
        "raise glm_engine_start_timeout or see journalctl -u glm-engine"
    ]
    assert "stop -t 5 glm-engine" in node.docker_log()


def test_a_container_that_docker_never_starts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a panic in dockerd: the container is created, and the client waits."""
    node.install("serve()")
    node.program(
        node.release / "run",
        """#!/bin/sh
trap '' TERM
echo created > "$HERE/container"
echo 'docker: error during connect: EOF.'
while :; do sleep 1; done
""",
    )
    monkeypatch.setenv("HERE", str(node.directory))
    monkeypatch.setenv("PATH", f"{node.directory}/bin", prepend=os.pathsep)
    for name, seconds in {
        "DOCKER_PATIENCE": 1,
        "CREATED_INTERVAL": 0.1,
        "CLIENT_PATIENCE": 0.5,
        "PROBE_INTERVAL": 0.1,
    }.items():
        monkeypatch.setattr(engine_launch, name, seconds)
    with pytest.raises(engine_launch.Failure) as failure:
        engine_launch.Launch(engine_launch.Release(str(node.release))).run()
    assert str(failure.value) == (
        "Docker did not start the container within 1 s: docker: error during connect: EOF.: see journalctl -u docker"
    )
    assert not (node.directory / "container").exists()


def test_an_engine_that_serves_another_name(node: Node) -> None:
    node.install("serve(); time.sleep(60)", served="other")
    node.launch()
    code, _, errors = node.end()
    assert code == 1
    assert "/v1/models lists other and not glm: see what listens on that port" in errors[0]


def test_an_end_that_nobody_asked_for_is_a_failure_whatever_its_code(node: Node) -> None:
    node.install('serve(); time.sleep(3); print("bye"); end(0)')
    node.launch()
    node.wait_for("READY=1")
    code, _, errors = node.end()
    assert code == 1
    assert errors[0].startswith("glm: error: engine exited with code 0 after serving for ")
    assert errors[0].endswith(": bye")


def test_follows_the_container_through_a_restart_of_docker(node: Node) -> None:
    node.install("""
if os.fork():
    time.sleep(1); open(here + "/docker-is-down", "w"); os._exit(125)
open(here + "/pid", "w").write(str(os.getpid()))
sys.stdout.close(); os.close(1); os.close(2)
serve(); time.sleep(60)""")
    process = node.launch()
    node.wait_for("READY=1")
    node.wait_for_docker("attach --no-stdin --sig-proxy=false glm-engine")
    process.send_signal(signal.SIGTERM)
    code, output, errors = node.end()
    assert (code, errors) == (0, [])
    assert "Docker was restarted and the engine goes on" in output


@pytest.mark.parametrize(
    ("status", "command"), [("exited", "container rm glm-engine"), ("created", "container rm glm-engine")]
)
def test_clean_up_removes_what_does_not_run(node: Node, status: str, command: str) -> None:
    node.install("")
    (node.directory / "container").write_text(status)
    node.launch("--clean-up")
    assert node.end()[0] == 0
    assert command in node.docker_log()
    assert "stop" not in node.docker_log()


def test_a_running_leftover_is_stopped_gently_before_the_start(node: Node) -> None:
    node.install('print("new"); end(3)')
    with subprocess.Popen(["sleep", "60"]) as leftover:
        (node.directory / "pid").write_text(str(leftover.pid))
        (node.directory / "container").write_text("running")
        node.launch()
        code, output, _ = node.end()
        leftover.wait(timeout=5)
    assert code == 1
    assert output.index("stopping the container") < output.index("new")


def test_a_journal_that_is_gone_holds_no_engine_up(node: Node) -> None:
    """As after a crash of journald: nobody reads the unit's output any more."""
    node.install("""
serve()
while not os.path.exists(here + "/talk"): time.sleep(0.05)
for _ in range(20000): print("a line of sixty-four characters, of which an engine prints many", flush=True)
open(here + "/talked", "w")
time.sleep(60)
""")
    process = node.launch()
    node.wait_for("READY=1")
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    (node.directory / "talk").touch()
    end = time.monotonic() + 20
    while not (node.directory / "talked").exists():
        assert time.monotonic() < end, "the engine was held up"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "stop -t 5 glm-engine" in node.docker_log()


def test_a_docker_that_hangs_is_one_that_does_not_answer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.program(node.directory / "bin/docker", "#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setenv("PATH", f"{node.directory}/bin", prepend=os.pathsep)
    monkeypatch.setattr(engine_launch, "DOCKER_TIMEOUT", 0.2)
    assert engine_launch.container_status("glm-engine") is None
    assert engine_launch.docker("stop", "-t", "0", "glm-engine").returncode != 0


def test_a_stop_has_its_own_time_beside_that_of_docker(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], float]] = []

    def run(command: list[str], timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command[1:3], timeout))
        gone = len(asked) > 2
        return subprocess.CompletedProcess(command, 0, "" if gone else "running\n", "")

    node.install("")
    monkeypatch.setattr(subprocess, "run", run)
    engine_launch.clean_up(engine_launch.Release(str(node.release)))
    assert asked == [(["container", "ls"], 60), (["stop", "-t"], 65), (["container", "ls"], 60)]


def test_no_release(node: Node) -> None:
    node.launch()
    code, _, errors = node.end()
    assert code == 1
    assert len(errors) == 1
    assert "is no release" in errors[0]


@pytest.mark.parametrize(
    ("lines", "explanation"),
    [
        (
            [
                "(EngineCore_DP0 pid=7) ERROR 11-23 20:00:00 [core.py:1] Traceback (most recent call last):",
                '(EngineCore_DP0 pid=7) ERROR 11-23 20:00:00 [core.py:1]   File "/x.py", line 1, in f',
                "(EngineCore_DP0 pid=7) ERROR 11-23 20:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory.",
                "Traceback (most recent call last):",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            ],
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            [
                "docker: Error response from daemon: could not select device driver",
                "Run 'docker run --help' for more information",
            ],
            "docker: Error response from daemon: could not select device driver",
        ),
        (["INFO 11-23 20:00:00 [x.py:1] almost done"], "almost done"),
        (  # a warning is no reason, nor is a client's mistake
            [
                "INFO 11-26 13:03:52 [x.py:1] Loading weights took 0.18 seconds",
                "(APIServer pid=574) WARNING 11-26 13:03:52 [system_utils.py:299] Found ulimit of 20000 and failed to "
                "automatically increase with error current limit exceeds maximum limit. This can cause fd limit errors "
                "like `OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n",
                "(APIServer pid=574) ERROR 11-26 13:10:17 [serving.py:228] Error with model error=ErrorInfo(message="
                "'The model `nope` does not exist.', type='NotFoundError', param='model', code=404)",
            ],
            "Loading weights took 0.18 seconds",
        ),
        ([], "it gave no reason"),
    ],
)
def test_explanation(node: Node, lines: list[str], explanation: str) -> None:
    node.install("")
    log = engine_launch.Log(engine_launch.Release(str(node.release)))
    log.lines.extend(lines)
    assert log.explanation() == explanation


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["[2026-11-26 13:00:00] Received sigquit from a child process. It usually means the child failed."],
         "137 (it killed itself) after"),
        ([], "137 (killed: out of memory? see journalctl -k) after"),
    ],
)  # fmt: skip
def test_an_engine_that_kills_itself_is_told_from_one_that_was_killed(node: Node, lines: list[str], said: str) -> None:
    node.install("", **yaml.safe_load((ROOT / "engines/sglang.yml").read_text())["log"])
    launch = engine_launch.Launch(engine_launch.Release(str(node.release)))
    launch.log.lines.extend([*lines, "RuntimeError: no kernel"])
    assert said in launch.ending(137)
    assert launch.ending(137).endswith(": RuntimeError: no kernel")
    assert "killed" not in launch.ending(1)


PHASES: dict[str, list[tuple[str, Any]]] = {
    "vllm": [
        (
            "(Worker pid=8) INFO 11-23 20:00:00 [default_loader.py:1] Loading weights took 5.60 seconds",
            "weights loaded",
        ),
        (
            "(Worker pid=8) INFO 11-23 20:00:00 [gpu_worker.py:1] Available KV cache memory: 80.1 GiB",
            "allocating the KV cache",
        ),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  35%|###", "capturing CUDA graphs, 35 %"),
        (
            "(APIServer pid=1) INFO 11-23 20:00:00 [api_server.py:1] Starting vLLM server on http://127.0.0.1:8001",
            "starting the HTTP server",
        ),
        ("DeepGEMM warmup:  12%|#", "compiling kernels, 12 %"),
        ("JIT kernel warmup (412 compile keys):   3%|#", "compiling kernels, 3 %"),
        ("INFO 11-23 20:00:00 [model_runner.py:399] Loading model from scratch...", "loading weights"),
        ("Multi-thread loading shards:  40% Completed | 56/141", "loading weights, 40 %"),
        ("Loading safetensors using Fastsafetensor loader:   9%|#", "loading weights, 9 %"),
        ("Loading safetensors using InstantTensor loader:  71% Completed | 5/7", "loading weights, 71 %"),
        ("INFO 11-23 20:00:00 [monitor.py:53] torch.compile took 31.67 s in total", "profiling memory"),
        ("INFO 11-23 20:00:00 [gpu_model_runner.py:6612] Profiling CUDA graph memory: FULL=6", "profiling memory"),
        ("Capturing prefill CUDA graphs (FULL):  50%|#", "capturing CUDA graphs, 50 %"),
        ("INFO 11-23 20:00:00 [gpu_model_runner.py:6844] Graph capturing finished in 5 secs", "warming up"),
        ("INFO Compiling a graph for compile range (1, 8192) takes 9.1 s", "compiling"),
        ('INFO 127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK', None),
    ],
    "sglang": [
        ("[2026-07-01 TP0] Load weight begin. avail mem=177.00 GB", "loading weights"),
        ("Multi-thread loading shards:  35% Completed | 49/141", "loading weights, 35 %"),
        ("[TP0] Capture cuda graph begin. This can take up to several minutes.", "capturing CUDA graphs"),
        ("[TP0] Capture target decode CUDA graph begin. backend=full", "capturing CUDA graphs"),
        ("[TP0] Capture draft decode cuda graph begin.", "capturing CUDA graphs"),
        ("Capturing batches (bs=64 avail_mem=20 GB):  10%|#", "capturing CUDA graphs, 10 %"),
        ("[TP0] KV Cache is allocated. dtype: torch.float8_e4m3fn, #tokens: 1200000", "allocating the KV cache"),
        ("[TP0] KV Cache VA upper bound. dtype: torch.float8_e4m3fn", "allocating the KV cache"),
        ("[TP0] Post-capture KV sizing: KV cache allocated. dtype: x", "allocating the KV cache"),
        ("[TP0] Entering DeepGEMM JIT Pre-Compile session. It may take a long time", "compiling kernels"),
        ("DeepGEMM warmup:  12%|#", "compiling kernels, 12 %"),
    ],
}


@pytest.mark.parametrize(
    ("engine", "line", "phase"), [(engine, *case) for engine, cases in PHASES.items() for case in cases]
)
def test_phases_of_the_engines_own_lines(node: Node, engine: str, line: str, phase: str | None) -> None:
    node.install("", **yaml.safe_load((ROOT / f"engines/{engine}.yml").read_text())["log"])
    assert engine_launch.Log(engine_launch.Release(str(node.release))).phase_of(line) == phase


# Lines of vLLM 0.26.0 that started on a GPU, with caches.
START = """\
(EngineCore pid=2008) INFO 11-26 13:11:26 [gpu_model_runner.py:5250] Starting to load model /tmp/tiny...
Loading safetensors checkpoint shards:  20% Completed | 1/5 [00:00<00:00,  8.77it/s]
(EngineCore pid=2008) INFO 11-26 13:11:27 [default_loader.py:430] Loading weights took 0.20 seconds
(EngineCore pid=2008) INFO 11-26 13:11:31 [backends.py:1094] Using cache directory: \
/root/.cache/vllm/torch_compile_cache/fafa8000e7/rank_0_0/backbone for vLLM's torch.compile
(EngineCore pid=2008) INFO 11-26 13:11:39 [monitor.py:53] torch.compile took 5.55 s in total
(EngineCore pid=2008) INFO 11-26 13:11:41 [gpu_model_runner.py:6612] Profiling CUDA graph memory: \
PIECEWISE=6 (largest=32), FULL=6 (largest=32)
(EngineCore pid=2008) INFO 11-26 13:11:43 [gpu_worker.py:560] Available KV cache memory: 70.32 GiB
Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  67%|██████▋   | 4/6 [00:00<00:00, 35.46it/s]
(EngineCore pid=2008) INFO 11-26 13:11:45 [gpu_model_runner.py:6844] Graph capturing finished in 2 secs, took 0.10 GiB
(APIServer pid=1921) INFO 11-26 13:11:47 [api_server.py:677] Starting vLLM server on http://127.0.0.1:8001
"""


def test_the_phases_of_a_start_on_a_gpu(node: Node) -> None:
    node.install("")
    log = engine_launch.Log(engine_launch.Release(str(node.release)))
    assert [log.phase_of(line) for line in START.splitlines()] == [
        "loading weights",
        "loading weights, 20 %",
        "weights loaded",
        "compiling",
        "profiling memory",
        "profiling memory",
        "allocating the KV cache",
        "capturing CUDA graphs, 67 %",
        "warming up",
        "starting the HTTP server",
    ]
