"""Runs real engines on one GPU under the project's own programs, and writes down what they do.

exercise.py STAGE RESULTS STEP [STEP ...]     STAGE as tests/gpu/releases.yml and README.md make it

Each step starts a release by engine-launch, asks the engine, and ends it. Nothing is asserted here: what comes is kept
in RESULTS (a line of JSON for each thing seen in events.jsonl, a log for each start), and is compared afterwards.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EDGE = "http://127.0.0.1:8000"
MODEL = "glm-5.2-fp8"
QUESTIONS = yaml.safe_load((ROOT / "roles/verify/files/questions.yml").read_text(encoding="utf-8"))
WATCHDOG_SECONDS = 120
WORKLOAD = {"input_len": 1024, "output_len": 128, "num_prompts": 64, "max_concurrency": 32}
BEGAN = time.monotonic()


class Book:
    """What was seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()

    def note(self, what: str, **seen: Any) -> None:
        line = json.dumps({"at": round(time.monotonic() - BEGAN, 1), "what": what, **seen})
        with self.lock, (self.directory / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            print(line[:600], flush=True)


class Node:
    """One engine at a time, under engine-launch and engine-watchdog."""

    def __init__(self, stage: Path, book: Book, name: str = "node") -> None:
        self.stage, self.book, self.name = stage, book, name
        self.home = Path("/tmp/glm") / name
        self.home.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "CONTAINERS": str(self.home),
            "PATH": f"{HERE}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "plugins/module_utils"),  # glm_node
        }
        self.label = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.last_line = ""

    def start(self, release: str, label: str) -> None:
        self.label, self.began = label, time.monotonic()
        self.directory = self.stage / "releases" / release
        self.release = json.loads((self.directory / "release.json").read_text(encoding="utf-8"))
        self.url: str = self.release["url"]
        address = self.home / "notify"
        address.unlink(missing_ok=True)
        self.ready, self.told = threading.Event(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(str(address))
        self.told.settimeout(1)
        self.book.note("start", release=release, label=label)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "roles/inference_service/files/engine-launch"), str(self.directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**self.environment, "NOTIFY_SOCKET": str(address)},
        )
        threading.Thread(target=self.read_log, args=(self.process, label), daemon=True).start()
        threading.Thread(target=self.read_notifications, args=(self.process, self.told, label), daemon=True).start()

    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 2)

    def read_log(self, process: subprocess.Popen[bytes], label: str) -> None:
        assert process.stdout
        with (self.book.directory / f"{label}.log").open("a", encoding="utf-8") as file:
            for line in process.stdout:
                self.last_line = line.decode(errors="replace").rstrip("\n")
                file.write(f"{self.seconds()}\t{self.last_line}\n")
                file.flush()

    def read_notifications(self, process: subprocess.Popen[bytes], told: socket.socket, label: str) -> None:
        while process.poll() is None:
            with contextlib.suppress(TimeoutError):
                text = told.recv(4096).decode()
                self.book.note("notify", label=label, seconds=self.seconds(), text=text)
                if "READY=1" in text:
                    self.ready.set()

    def wait_ready(self, limit: float) -> bool:
        assert self.process
        end = time.monotonic() + limit
        while time.monotonic() < end and self.process.poll() is None:
            if self.ready.wait(0.5):
                self.book.note("ready", label=self.label, seconds=self.seconds())
                return True
        self.book.note("not ready", label=self.label, seconds=self.seconds())
        return False

    def end(self, why: str, limit: float = 200) -> None:
        assert self.process
        began = time.monotonic()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill_engine()
            self.process.kill()
            code = None
        time.sleep(0.5)
        took = round(time.monotonic() - began - 0.5, 1)
        self.book.note("end", label=self.label, why=why, code=code, took=took, last_line=self.last_line)
        self.book.note("gpu", label=self.label, memory_free_after=self.gpu_free())

    def stop(self) -> None:
        assert self.process
        self.process.terminate()
        self.end("SIGTERM")

    def engine_pid(self) -> int:
        return int((self.home / "glm-engine").read_text(encoding="utf-8"))

    def kill_engine(self, pattern: str = "") -> bool:
        """The engine's first process; or the one of its session whose title holds the pattern."""
        with contextlib.suppress(OSError):
            session = self.engine_pid()
            listed = subprocess.run(["ps", "-e", "-o", "pid=,sid=,args="], capture_output=True, text=True, check=True)
            for line in listed.stdout.splitlines():
                pid, sid, title = line.split(None, 2)
                if int(sid) == session and (pattern in title if pattern else int(pid) == session):
                    self.book.note("SIGKILL", label=self.label, title=title[:80], seconds=self.seconds())
                    os.kill(int(pid), signal.SIGKILL)
                    return True
        return False

    def gpu_free(self) -> float | None:
        """Seconds until nothing holds the GPU's memory."""
        began = time.monotonic()
        while time.monotonic() - began < 60:
            if gpu_memory() < 1500:
                return round(time.monotonic() - began, 1)
            time.sleep(0.5)
        return None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """engine-watchdog, as its timer starts it, from the moment that the engine is ready."""
        done = threading.Event()

        def watch() -> None:
            data = self.home / "data"
            data.mkdir(exist_ok=True)
            (self.home / "look.json").unlink(missing_ok=True)
            (self.home / "active").write_text(str(int(time.monotonic() * 1e6)), encoding="utf-8")
            while not done.is_set():
                began = time.monotonic()
                program = ROOT / "roles/inference_service/files/engine-watchdog"
                looked = subprocess.run(
                    [sys.executable, str(program), str(self.directory), str(data), str(WATCHDOG_SECONDS)],
                    capture_output=True, text=True, check=False,
                    env={**self.environment, "RUNTIME_DIRECTORY": str(self.home)},
                )  # fmt: skip
                took = round(time.monotonic() - began, 2)
                said = (looked.stdout + looked.stderr).strip()[-500:]
                if looked.returncode or said or took > 1:
                    self.book.note("watchdog", label=self.label, took=took, code=looked.returncode, said=said)
                done.wait(WATCHDOG_SECONDS / 8)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()

    # --- what is asked ---

    def ask(
        self, path: str, body: dict[str, Any] | None = None, timeout: float = 180
    ) -> tuple[int | str, bytes, float]:
        """Status, body, and the seconds to the first byte of the answer's body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        began = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                first = answer.read(1)
                moment = time.monotonic() - began
                return answer.status, first + answer.read(), moment
        except urllib.error.HTTPError as problem:
            return problem.code, problem.read(), time.monotonic() - began
        except (OSError, http.client.HTTPException) as problem:
            return repr(problem), b"", time.monotonic() - began

    def firsts(self, times: int = 2) -> None:
        """Each kind of request, more than once: what does the first of its kind cost?"""
        for name, path, make in kinds():
            for number in range(times):
                began = time.monotonic()
                status, body, first = self.ask(path, make(number))
                self.book.note(
                    "request", label=self.label, kind=name, number=number, status=status,
                    seconds=round(time.monotonic() - began, 2), first_byte=round(first, 2), **summary(body),
                )  # fmt: skip
        for number in range(times):
            began = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(32) as pool:
                statuses = list(pool.map(lambda n: self.ask("/v1/chat/completions", chat(f"Say {n}"))[0], range(32)))
            self.book.note(
                "request", label=self.label, kind="32 chats at once", number=number,
                status=sorted({str(status) for status in statuses}), seconds=round(time.monotonic() - began, 2),
            )  # fmt: skip

    def very_long(self) -> None:
        """A prompt of 64,000 tokens; one has ended an engine, so it is asked last."""
        for number in range(2):
            began = time.monotonic()
            status, body, _ = self.ask("/v1/chat/completions", long(number, 1075))
            took = round(time.monotonic() - began, 2)
            self.book.note("very long", label=self.label, number=number, status=status, seconds=took, **summary(body))

    def save(self, path: str, name: str) -> None:
        status, body, _ = self.ask(path)
        (self.book.directory / f"{self.label}-{name}").write_bytes(body)
        self.book.note("saved", label=self.label, path=path, status=status, size=len(body))

    def answers(self) -> None:
        """Whole answers, for the shapes."""
        for name, path, make in kinds():
            if name != "long prompt":
                status, body, _ = self.ask(path, make(9))
                self.book.note("answer", label=self.label, kind=name, status=status, body=body.decode()[:4000])
        for path in (
            "/v1/models",
            "/version",
            "/get_server_info",
            "/server_info",
            "/load",
            "/ping",
            "/health_generate",
        ):
            status, body, _ = self.ask(path)
            self.book.note("answer", label=self.label, kind=path, status=status, body=body.decode()[:3000])
        wrong = {**chat("hi"), "model": "no-such-model"}
        status, body, _ = self.ask("/v1/chat/completions", wrong)
        self.book.note("answer", label=self.label, kind="wrong model", status=status, body=body.decode()[:500])

    def verify(self) -> None:
        """The module of the role verify, through the edge, with a key."""
        metrics = self.release["metrics"]
        arguments = {
            "url": EDGE, "engine_url": self.url, "models": [MODEL], "listed_models": [MODEL],
            "api_key": (self.stage / "key").read_text(encoding="utf-8"), "questions": QUESTIONS,
            "metrics": [name.partition("{")[0] for name in (metrics["running"], *metrics["progress"])],
            "cached_tokens_metric": metrics.get("cached", ""), "image_digest": self.release["image_digest"],
            "gpu_count": 1, "headers": {"X-Glm-Probe": "1"},
        }  # fmt: skip
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(ROOT / "plugins/modules/verify_endpoint.py")],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}), capture_output=True, text=True, check=False,
            env={**self.environment, "PYTHONPATH": str(self.stage / "ansible")},
        )  # fmt: skip
        took = round(time.monotonic() - began, 1)
        try:
            checks = json.loads(done.stdout)["checks"]
        except (ValueError, KeyError):
            checks = done.stdout[-500:] + done.stderr[-1500:]
        self.book.note("verify", label=self.label, took=took, checks=checks)

    def load(self, seconds: float = 20) -> None:
        """The tests' own clients, through the edge."""
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "molecule/shared/load.py"), "6", "4", EDGE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**self.environment, "PYTHONPATH": str(self.stage / "clients")},
        )  # fmt: skip
        assert process.stdin
        process.stdin.write((self.stage / "key").read_text(encoding="utf-8") + "\n")
        process.stdin.flush()
        time.sleep(seconds)
        process.terminate()
        output, errors = process.communicate(timeout=60)
        result: Any = json.loads(output) if output.strip() else errors[-1000:]
        if isinstance(result, dict):
            result |= {name: [len(result[name]), *result[name][:3]] for name in ("failed", "cut")}
        self.book.note("load", label=self.label, result=result)

    def bench(self) -> None:
        """The engine's own benchmark client with the project's arguments."""
        client = yaml.safe_load((ROOT / f"engines/{self.release['engine']}/benchmark.yml").read_text(encoding="utf-8"))
        result = self.book.directory / f"{self.label}-bench.json"
        values = {
            **{f"__benchmark_plan.{name}": value for name, value in WORKLOAD.items()},
            "benchmark_engine_port": 8001, "benchmark_served_model_name": MODEL,
            "benchmark_model_path": f"/models/{self.release['model']}",
        }  # fmt: skip
        arguments = [
            re.sub(r"\{\{ (.*?) \}\}", lambda match: str(values[match[1]]), argument)
            .replace("{seed}", "1")
            .replace("{result}", str(result))
            for argument in client["arguments"]
        ]
        site = os.environ["SGLANG_SITE" if self.release["engine"] == "sglang" else "VLLM_SITE"]
        began = time.monotonic()
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, timeout=300,
            env={**self.environment, "PYTHONPATH": site, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.book.note(
            "benchmark", label=self.label, code=done.returncode, took=round(time.monotonic() - began, 1),
            said=(done.stdout[-2500:] if not done.returncode else done.stdout[-500:] + done.stderr[-2000:]),
        )  # fmt: skip

    def drain(self, tokens: int = 4000) -> None:
        """SIGTERM to engine-launch while a long stream is in flight."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            body = chat("count", max_tokens=tokens, min_tokens=tokens, ignore_eos=True, stream=True)
            body["stream_options"] = {"include_usage": True}
            stream = pool.submit(self.ask, "/v1/chat/completions", body)
            time.sleep(2)
            assert self.process
            self.process.terminate()
            began, seen = time.monotonic(), ""
            while not stream.done():
                health, answer = self.ask("/health", timeout=3), self.ask("/v1/chat/completions", chat("x"), 3)
                now = f"health {health[0]}, chat {answer[0]}"
                if now != seen:
                    self.book.note("draining", label=self.label, after=round(time.monotonic() - began, 1), seen=now)
                    seen = now
                time.sleep(0.5)
            status, body_seen, _ = stream.result()
            self.book.note(
                "stream", label=self.label, after=round(time.monotonic() - began, 1), status=status,
                done=b"[DONE]" in body_seen, **summary(body_seen),
            )  # fmt: skip
        self.end("SIGTERM with a stream in flight")

    def killed(self, pattern: str = "") -> None:
        """SIGKILL to the engine, or one process of it, while a stream is in flight."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            body = chat("count", max_tokens=4000, min_tokens=4000, ignore_eos=True, stream=True)
            stream = pool.submit(self.ask, "/v1/chat/completions", body)
            time.sleep(2)
            self.kill_engine(pattern)
            status, answer, _ = stream.result()
            self.book.note("stream", label=self.label, status=status, done=b"[DONE]" in answer, size=len(answer))
        self.end(f"SIGKILL {pattern}")


def leave(url: str, key: str, body: dict[str, Any], seconds: float, half: bool) -> None:
    """Sends a request, or half of one, and closes the connection after so long."""
    address, _, path = url.removeprefix("http://").partition("/")
    host, _, port = address.partition(":")
    data = json.dumps(body).encode()
    head = (
        f"POST /{path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\nX-Glm-Probe: 1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode() + (data[: len(data) // 2] if half else data))
        time.sleep(seconds)


def gpu_memory() -> int:
    shown = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout.split()[0])


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
    return {**body, "chat_template_kwargs": {"enable_thinking": False}, **more}


def long(number: int, repeat: int) -> dict[str, Any]:
    return chat(f"[{os.urandom(4).hex()}] {number} " + " ".join(QUESTIONS["find_fact"]["filler"] * repeat))


def kinds() -> list[tuple[str, str, Callable[[int], dict[str, Any]]]]:
    completions, messages = "/v1/chat/completions", "/v1/messages"
    (tool,) = QUESTIONS["tool_call"]["tools"]
    tools = [{"type": "function", "function": tool}]
    (agent,) = QUESTIONS["agent"]["tools"]
    anthropic_tool = {"name": agent["name"], "description": agent["description"], "input_schema": agent["parameters"]}
    schema = {"name": "city", "schema": tool["parameters"]}
    usage = {"stream_options": {"include_usage": True}}
    return [
        ("one token", "/v1/completions", lambda n: {"model": MODEL, "prompt": "ok", "max_tokens": 1}),
        ("chat", completions, lambda n: chat(f"Say {n}")),
        ("chat, sampled", completions, lambda n: chat(f"Say {n}", temperature=0.8, top_p=0.9, max_tokens=48)),
        ("thinking", completions, lambda n: chat(f"Say {n}", chat_template_kwargs={}, max_tokens=128)),
        ("stream", completions, lambda n: chat(f"Say {n}", stream=True, max_tokens=64, **usage)),
        ("tool, auto", completions, lambda n: chat(f"Paris {n}", tools=tools, tool_choice="auto")),
        ("tool, required", completions, lambda n: chat(f"Paris {n}", tools=tools, tool_choice="required")),
        ("tool, auto, stream", completions, lambda n: chat(f"Paris {n}", tools=tools, stream=True, **usage)),
        ("JSON schema", completions,
         lambda n: chat(f"City {n}", response_format={"type": "json_schema", "json_schema": schema})),
        ("long prompt", completions, lambda n: long(n, 148)),
        ("messages", messages, lambda n: chat(f"Say {n}")),
        ("messages, tool, stream", messages, lambda n: chat(f"Say {n}", stream=True, tools=[anthropic_tool])),
        ("count_tokens", "/v1/messages/count_tokens",
         lambda n: {name: value for name, value in chat("hi").items() if name in ("model", "messages")}),
        ("responses", "/v1/responses", lambda n: {"model": MODEL, "input": f"Say {n}", "max_output_tokens": 24}),
    ]  # fmt: skip


def summary(body: bytes) -> dict[str, Any]:
    """Of an answer or of a stream's events: usage, end, and an error."""
    text, seen = body.decode(errors="replace"), {}
    documents = [line[5:] for line in text.splitlines() if line.startswith("data:") and "[DONE]" not in line] or [text]
    for document in documents:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            value = json.loads(document)
            for name in ("usage", "error", "detail"):
                if value.get(name):
                    seen[name] = value[name]
            for choice in value.get("choices") or []:
                if choice.get("finish_reason"):
                    seen["finish"] = choice["finish_reason"]
    return {**seen, "events": len(documents)}


def caches(book: Book, label: str) -> None:
    command = (
        "du -sm /var/lib/glm/cache/*/* /var/lib/glm/cache/*/root-cache/* 2>/dev/null; cd /root; ls -lad .[!.]* *;"
        " du -sm $(find . -mindepth 1 -maxdepth 1 ! -type l) 2>/dev/null"
    )
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
    book.note("caches", label=label, shown=shown.splitlines())


def flags(release: Path) -> list[str]:
    """The engine's arguments in a release's `run`."""
    words = shlex.split((release / "run").read_text(encoding="utf-8").replace("\\\n", " "), comments=True)
    after = next(number for number, word in enumerate(words) if "@sha256:" in word) + 1
    return words[after + 3 :] if words[after] == "python3" else words[after:]


def parsed(stage: Path, book: Book, engine: str, releases: list[str]) -> None:
    """parse.py, as the role runs it in the image."""
    site = os.environ["SGLANG_SITE" if engine == "sglang" else "VLLM_SITE"]

    def one(release: str) -> None:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(ROOT / f"engines/{engine}/parse.py"), *flags(stage / "releases" / release)],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": site},
        )  # fmt: skip
        book.note(
            "parse",
            release=release,
            code=done.returncode,
            took=round(time.monotonic() - began, 1),
            said=done.stderr[-700:],
        )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, releases))


def failures(stage: Path, book: Book, prefix: str, victim: str) -> None:
    """Starts that fail, all at once, each on its own port."""

    def one(name: str) -> None:
        node = Node(stage, book, name)
        node.start(name, name)
        if name.endswith("killed"):
            for _ in range(100):
                time.sleep(1)
                if node.kill_engine(victim):
                    break
        node.end("a start that fails", 150)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, [prefix + name for name in ("fails-flag", "fails-memory", "fails-weights", "fails-killed")]))


class Steps:
    """Each method is a step."""

    def __init__(self, stage: Path, book: Book) -> None:
        self.stage, self.book, self.node = stage, book, Node(stage, book)

    def cold(self, release: str) -> None:
        """A first start, and everything that is asked of it."""
        node = self.node
        node.start(release, f"{release}-cold")
        if not node.wait_ready(1200):
            return node.stop()
        with node.watched():
            node.save("/metrics", "metrics-idle.txt")
            node.firsts()
            caches(self.book, node.label)
            node.verify()
            node.load()
            node.bench()
            node.answers()
            node.save("/metrics", "metrics-after.txt")
            node.save("/openapi.json", "openapi.json")
        node.drain()
        caches(self.book, f"{node.label}, stopped")
        return None

    def warm(self, release: str, victim: str = "") -> None:
        """A second start; its first requests; then the engine is killed."""
        node = self.node
        node.start(release, f"{release}-warm")
        if not node.wait_ready(600):
            return node.stop()
        node.firsts()
        node.verify()
        node.killed(victim)
        return None

    def other(self, release: str) -> None:
        """A start of another profile: verified first, as a rollout does."""
        node = self.node
        node.start(release, f"{release}-other")
        if not node.wait_ready(900):
            return node.stop()
        with node.watched():
            node.save("/metrics", "metrics-idle.txt")
            node.verify()
            node.firsts()
            node.bench()
            node.save("/metrics", "metrics-after.txt")
            node.very_long()
        node.stop()
        return None

    def vllm(self) -> None:
        self.cold("recipe")
        self.warm("recipe", "VLLM::EngineCore")

    def vllm_others(self) -> None:
        self.other("reference")
        self.other("throughput")

    def vllm_failures(self) -> None:
        failures(self.stage, self.book, "", "VLLM::EngineCore")
        node = self.node
        node.start("fails-e4m3", "fails-e4m3")
        node.end("a start that fails", 120)
        parsed(self.stage, self.book, "vllm", ["recipe", "reference", "throughput", "fails-flag"])

    def sglang_smoke(self) -> None:
        """Whether it starts at all."""
        node = self.node
        node.start("sglang-reference", "sglang-smoke")
        if node.wait_ready(900):
            node.save("/metrics", "metrics-idle.txt")
            node.firsts(1)
        node.stop()

    def cancels(self, release: str) -> None:
        """Clients that leave in the middle of a request: does the engine go on counting them?"""
        node = self.node
        node.start(release, f"{release}-cancels")
        if not node.wait_ready(600):
            return node.stop()
        key = (self.stage / "key").read_text(encoding="utf-8").strip()
        counted = (node.release["metrics"]["running"].partition("{")[0], "sglang:num_running_reqs")
        for url, path, kind in itertools.product(
            (node.url, EDGE), ("/v1/chat/completions", "/v1/messages"), ("streamed", "whole", "half a body")
        ):
            body = chat("count", max_tokens=1500, min_tokens=1500, ignore_eos=True, stream=kind == "streamed")
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                for number in range(16):
                    pool.submit(leave, url + path, key, body, 0.03 * number, kind == "half a body")
            for after in (1, 8):
                time.sleep(after)
                lines = node.ask("/metrics")[1].decode().splitlines()
                active = [line for line in lines if line.startswith(counted) and not line.endswith(" 0.0")]
                self.book.note("left", url=url, path=path, kind=kind, after=after, active=active)
        node.stop()
        return None

    def sglang_cancels(self) -> None:
        self.cancels("sglang-reference")

    def vllm_cancels(self) -> None:
        self.cancels("recipe")

    def sglang(self) -> None:
        self.cold("sglang-reference")
        self.warm("sglang-reference", "sglang::scheduler")
        self.other("sglang-low-latency")

    def sglang_failures(self) -> None:
        failures(self.stage, self.book, "sglang-", "sglang::scheduler")
        parsed(self.stage, self.book, "sglang", ["sglang-reference", "sglang-low-latency", "sglang-fails-flag"])


def main() -> None:
    stage, book = Path(sys.argv[1]), Book(Path(sys.argv[2]))
    steps = Steps(stage, book)
    for step in sys.argv[3:]:
        book.note("step", name=step)
        try:
            getattr(steps, step.replace("-", "_"))()
        except Exception:
            book.note("broken", step=step, error=traceback.format_exc()[-1500:])
            steps.node.kill_engine()
            time.sleep(5)
    book.note("done")


if __name__ == "__main__":
    main()
