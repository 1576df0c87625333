"""Whether a node that was measured is as the others are."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# How far below the median a figure may be. GPUs of one kind differ little, disks more; a way to a hub differs by the
# hour, and with how many fetch at once.
TOLERANCE = {"gpu": 0.05, "all_reduce": 0.1, "disk": 0.3}
FIGURES = {
    "bf16_tflops": "bf16, TFLOP/s",
    "fp8_tflops": "FP8, TFLOP/s",
    "memory_gb_s": "memory, GB/s",
}
# A median of fewer says nothing of the one that is compared with it.
FEWEST = 3


def acceptance_checks(
    result: Mapping[str, Any], others: Iterable[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What was judged of a node, each with name, ok and detail; `others` are the results of accepted nodes.

    wanted: gpu_count.
    """
    return list(_checks(result, [other for other in others if _kind(other) == _kind(result)], wanted))


def accepted_results(directory: str, node: str, measured: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What other nodes have shown: those accepted before, and those measured in this run, empty where not yet."""
    found = {name: result for name, result in measured.items() if result}
    for path in Path(directory).glob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("ok") and record.get("result"):
            found.setdefault(path.stem, record["result"])
    return [result for name, result in found.items() if name != node]


def _kind(result: Mapping[str, Any]) -> list[str]:
    """What nodes that can be compared have in common: as many GPUs of the same name."""
    return sorted(gpu["name"] for gpu in result["gpus"].get("gpus", []))


def _problems(step: Mapping[str, Any]) -> list[str]:
    """Those that a step found, or the one that ended it."""
    return [*step.get("problems", []), *([step["problem"]] if "problem" in step else [])]


def _check(name: str, problems: Iterable[str], good: str) -> dict[str, Any]:
    said = "; ".join(problems)
    return {"name": name, "ok": not said, "detail": said or good}


def _checks(
    result: Mapping[str, Any], others: list[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    measured = result["gpus"]
    gpus = measured.get("gpus", [])
    problems = _problems(measured)
    if not problems and len(gpus) != wanted["gpu_count"]:
        problems = [f"{len(gpus)} of {wanted['gpu_count']} GPUs were measured"]
    yield _check("results", problems, f"{len(gpus)} GPUs compute the same, bit by bit")
    for figure, title in FIGURES.items():
        values = {gpu["index"]: gpu[figure] for gpu in gpus if gpu.get(figure)}
        known = [gpu[figure] for other in others for gpu in other["gpus"].get("gpus", []) if gpu.get(figure)]
        if values:
            yield _check(title, _slow(values, known), _span(values.values()))
    reduced = measured.get("all_reduce", {})
    if wanted["gpu_count"] > 1 and not problems:
        known = [other["gpus"].get("all_reduce", {}).get("bus_gb_s", 0) for other in others]
        yield _against("all-reduce, bus GB/s", reduced.get("bus_gb_s", 0), known, "all_reduce")
    dcgm = result.get("dcgm")
    if dcgm is not None:
        said = [*dcgm.get("failed", []), *_problems(dcgm)]
        passed = dcgm.get("passed", 0)
        yield _check("DCGM diagnostics", said if said or passed else ["no test passed"], f"{passed} tests passed")
    disk = result["disk"]
    if "problem" in disk:
        yield _check("disk", _problems(disk), "")
    else:
        for figure, title in {"write_gb_s": "disk, write GB/s", "read_gb_s": "disk, read GB/s"}.items():
            yield _against(title, disk[figure], [other["disk"].get(figure, 0) for other in others], "disk")
    yield _network(result["network"])


def _network(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Only whether there is a way to the hub."""
    if "not_measured" in seen:
        return _check("network", [], f"not measured: {seen['not_measured']}")
    figure = seen.get("download_gb_s", 0)
    problems = _problems(seen) or ([] if figure else ["nothing was measured"])
    return _check("network", problems, f"{figure:g} GB/s from the hub")


def _slow(values: Mapping[int, float], known: list[float]) -> Iterator[str]:
    """GPUs below the median of their node, or of the fleet."""
    for words, median in (("of the node", _median(values.values())), ("of the fleet", _median(known))):
        for index, value in values.items():
            if median is not None and value < median * (1 - TOLERANCE["gpu"]):
                yield f"GPU {index} has {value:g}, and the median {words} is {median:g}"


def _against(name: str, value: float, known: Iterable[float], kind: str) -> dict[str, Any]:
    median = _median(value for value in known if value)
    if median is None:
        return _check(
            name, [] if value else ["nothing was measured"], f"{value:g}, and no {FEWEST} nodes to compare with"
        )
    low = value < median * (1 - TOLERANCE[kind])
    return _check(
        name,
        [f"{value:g}, and the median of the fleet is {median:g}"] if low else [],
        f"{value:g}, the median of the fleet is {median:g}",
    )


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if len(known) >= FEWEST else None


def _span(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"acceptance_checks": acceptance_checks, "accepted_results": accepted_results}
