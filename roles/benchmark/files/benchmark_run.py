#!/usr/bin/python3 -B
"""Runs the engine's benchmark client inside the serving container.

    benchmark-run PLAN

PLAN is a JSON file: the container, the client's arguments, the workload, and
the directory that takes the results. Progress goes to systemd's status line,
the client's own words to the journal.
"""

from __future__ import annotations

import datetime
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib/benchmark"))
from glm_node.files import lines
from glm_node.systemd import status

if TYPE_CHECKING:
    from types import FrameType

# Inside the container.
RESULT = "/tmp/glm-benchmark-result.json"  # noqa: S108  (the container's own /tmp, and one run at a time)
PID = "/tmp/glm-benchmark.pid"  # noqa: S108

BAR = re.compile(r"(\d+)/(\d+) \[")


class BenchmarkError(Exception):
    """One line for the user."""


def progress(line: str, workload: dict[str, Any]) -> str | None:
    """What a state of the client's progress bar means, or None for any other line."""
    found = BAR.search(line)
    if found is None:
        return None
    done, total = int(found[1]), int(found[2])
    if total == workload["num_prompts"]:
        return f"benchmark {workload['name']}: {done} of {total} requests"
    return f"benchmark {workload['name']}: warming up, {done} of {total} requests"


def in_container(container: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", "exec", container, *command], capture_output=True, text=True, check=False)


def runs(container: str) -> bool:
    return in_container(container, "true").returncode == 0


def stop_client(container: str) -> None:
    """`docker exec` does not pass signals on, so the client is ended from within."""
    in_container(container, "sh", "-c", f'kill "$(cat {PID})"')


def run_client(plan: dict[str, Any], seed: int) -> None:
    container, workload = plan["container"], plan["workload"]
    arguments = [part.replace("{seed}", str(seed)).replace("{result}", RESULT) for part in plan["arguments"]]
    in_container(container, "rm", "-f", RESULT)
    command = ["docker", "exec", "--env", "PYTHONUNBUFFERED=1", container]
    command += ["sh", "-c", f'echo $$ >{PID}; exec "$@"', "benchmark", *arguments]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
        assert client.stdout is not None  # noqa: S101  (it is a pipe: see above)
        for line in lines(client.stdout):
            state = progress(line, workload)
            if state is not None:
                status(state)
            elif line.strip():
                print(line, flush=True)
                said = [*said[-9:], line.strip()]
    if client.returncode != 0:
        if not runs(container):
            raise BenchmarkError(f"container {container} ended during the benchmark: see journalctl -u glm-engine")
        last = said[-1] if said else "it said nothing"
        raise BenchmarkError(f"{plan['client']} ended with {client.returncode}: {last}")


def read_result(container: str) -> dict[str, Any]:
    """The client's result: one JSON object, the last line where it writes a line a run."""
    read = in_container(container, "cat", RESULT)
    try:
        result = json.loads(read.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise BenchmarkError(f"the client left no result in {RESULT} of container {container}") from error
    if not isinstance(result, dict):
        raise BenchmarkError(f"the client's result in {RESULT} of container {container} is not a JSON object")
    return result


def keep(record: dict[str, Any], directory: Path, newest: int) -> Path:
    """Writes the record, points latest.json at it, and drops the oldest ones."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record['started'].replace(':', '')}-{record['workload']['name']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    link = directory / "latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(directory / "latest.json")
    for old in sorted(directory.glob("[0-9]*.json"))[:-newest]:
        old.unlink()
    return path


def utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def benchmark(plan: dict[str, Any]) -> Path:
    container = plan["container"]
    if not runs(container):
        raise BenchmarkError(f"container {container} is not running: see systemctl status glm-engine")

    def stopped(_signal: int, _frame: FrameType | None) -> NoReturn:
        stop_client(container)
        raise BenchmarkError("stopped before the end: by hand, or because benchmark_timeout was over")

    signal.signal(signal.SIGTERM, stopped)
    # Another seed on each run: the same prompts again would come from the prefix cache.
    seed = int(time.time())
    started = utc_now()
    status(f"benchmark {plan['workload']['name']}: starting the client")
    run_client(plan, seed)
    record = {
        "client": plan["client"],
        "started": started,
        "finished": utc_now(),
        "workload": {**plan["workload"], "seed": seed},
        "raw": read_result(container),
    }
    return keep(record, Path(plan["results"]), plan["keep"])


def main() -> int:
    try:
        plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        print(benchmark(plan))
    except BenchmarkError as error:
        print(f"glm: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
