"""What is judged of instances before they are given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

AT_WORK = ("stopping", "starting", "verifying", "rolling_back")


def instance_ids(names: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The ids of hosts by the inventory plugin, since two instances may have one name; else the names themselves."""
    known = {name: hostvars[name] for name in names if name in hostvars}
    return [str(known.get(name, {}).get("lambda_id") or name) for name in names]


def give_back_problems(
    names: Sequence[str], instances: Iterable[Mapping[str, Any]], hostvars: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """One line for each whose host cannot be asked whether it serves: the host must be the instance.

    instances: in the order of the names
    """
    lines = []
    for name, instance in zip(names, instances):
        if name not in hostvars:
            lines.append(f"{name} is no host of the inventory, so it cannot be asked whether it serves")
        elif (address := hostvars[name].get("ansible_host", name)) != instance.get("ip"):
            lines.append(f"{name} is {address} in the inventory, and {instance.get('ip', 'without address')} at Lambda")
    return lines


def why_not_idle(
    status: Mapping[str, Any], node: str, backends: Mapping[str, Mapping[str, Any]], gateways: Iterable[str]
) -> str:
    """Why a node may not be given back, in one line; empty for one that serves nothing.

    status: by glm.fleet.node_status
    backends: by gateway the servers that it knows; one that was not reached is missing
    """
    unseen = [gateway for gateway in gateways if gateway not in backends]
    offers = [gateway for gateway, known in backends.items() if known.get(node, {}).get("rotation") == "in"]
    held = sum(known.get(node, {}).get("sessions", 0) for known in backends.values()) + (status["in_flight"] or 0)
    phase, runs = status["phase"], status["unit"] == "active"
    own = not backends and runs and (status["edge"] or {}).get(node, {}).get("rotation") == "in"
    reasons = {
        f"{', '.join(unseen)} cannot be asked whether it offers the node": unseen,
        f"{', '.join(offers)} offers it": offers,
        f"it has {held} requests in flight": held,
        f"a rollout is at work on it (phase {phase})": phase in AT_WORK,
        f"its engine runs (phase {phase or 'unknown'})": runs and phase != "draining",
        "its own edge offers it": own,
    }
    return next((reason for reason, found in reasons.items() if found), "")


class FilterModule:
    """Ansible's interface to the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "instance_ids": instance_ids,
            "give_back_problems": give_back_problems,
            "why_not_idle": why_not_idle,
        }
