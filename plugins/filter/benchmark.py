"""The figures of a benchmark under one set of names, whichever client measured them."""

from __future__ import annotations

from typing import Any

WORKLOAD = ("input_len", "output_len", "num_prompts", "max_concurrency")


def _number(raw: dict[str, Any], name: str) -> float | None:
    value = raw.get(name)
    return round(float(value), 3) if isinstance(value, (int, float)) else None


def benchmark_result(
    raw: dict[str, Any],
    client: dict[str, Any],
    workload: dict[str, Any],
    reference: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A client's raw result under the report's names; what it did not measure is null.

    client: the engine's benchmark.yml. workload: lengths, counts and seed that were used. reference: published tables,
    and the workload that they are of.
    """
    figures = client["figures"]
    prompts = int(workload["num_prompts"])
    completed = int(raw.get(figures["completed"]) or 0)
    # A client that does not count failures still says how many requests it completed.
    failed = raw.get(figures.get("failed"))
    output = _number(raw, figures["output_tok_s"])
    result: dict[str, Any] = {
        "workload": {**{name: int(workload[name]) for name in WORKLOAD}, "seed": int(workload["seed"])},
        "client": client["client"],
        "duration_s": _number(raw, figures["duration_s"]),
        "completed": completed,
        "failed": prompts - completed if failed is None else int(failed),
        "output_tok_s": output,
        "total_tok_s": _number(raw, figures["total_tok_s"]),
        # As the guide reckons it: the engine's rate divided by the requests at a time.
        "per_user_tok_s": None if output is None else round(output / int(workload["max_concurrency"]), 3),
    }
    for name, metric in client["latencies"].items():
        result[name] = {
            statistic: _number(raw, f"{prefix}_{metric}_ms") for statistic, prefix in client["statistics"].items()
        }
    same = reference is not None and all(int(workload[name]) == int(reference["workload"][name]) for name in WORKLOAD)
    result["reference"] = list(reference["tables"]) if reference is not None and same else []
    return result


def benchmark_finding(result: dict[str, Any]) -> str:
    """Why a benchmark counts as failed, in one line; empty where it does not."""
    prompts = result["workload"]["num_prompts"]
    if result["failed"] > 0 or result["completed"] < prompts:
        return (
            f"benchmark: {result['completed']} of {prompts} requests were answered and {result['failed']} failed, "
            "so the figures do not count: see journalctl -u glm-engine at that time"
        )
    if not result["output_tok_s"]:
        return f"benchmark: {result['client']} reported no output tokens: see journalctl -u glm-benchmark"
    return ""


def benchmark_regression(result: dict[str, Any], baseline: float | None, most: float) -> str:
    """Why a node counts as too slow beside the others, in one line; empty where it does not."""
    rate = result["output_tok_s"]
    if not baseline or rate >= baseline * (1 - most):
        return ""
    return (
        f"benchmark: {rate:.0f} output tokens a second, {1 - rate / baseline:.0%} fewer than the fleet's "
        f"{baseline:.0f} (allowed {most:.0%}): see what differs on this node, or set glm_rollout_max_regression"
    )


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "benchmark_result": benchmark_result,
            "benchmark_finding": benchmark_finding,
            "benchmark_regression": benchmark_regression,
        }
