"""The plan by which nodes bring a checkpoint: all of it, evenly, and with heirs for whatever a node leaves."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.shares import Plan

# As the real checkpoint's: 141 shards of about 5.36 GB, and small files.
SIZES = [5_360_000_000 + 1_000_000 * (n % 7) for n in range(141)] + [20_000_000, 9_000, 1_500]


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 64, 141, 256])
def test_every_file_has_one_owner_and_the_bytes_are_balanced(nodes: int) -> None:
    plan = Plan(SIZES, nodes)
    assert sorted(itertools.chain(*plan.shares)) == list(range(len(SIZES)))
    load = [sum(SIZES[file] for file in share) for share in plan.shares]
    assert max(load) - min(load) <= max(SIZES)


def test_one_node_brings_everything_from_the_hub() -> None:
    plan = Plan(SIZES, 1)
    everything = range(len(SIZES))
    assert sorted(plan.duties(0, everything, (), ())) == list(everything)
    assert plan.pick(0, everything, {}, ()) is None


def test_the_plan_is_the_same_each_time() -> None:
    assert Plan(SIZES, 8).shares == Plan(list(SIZES), 8).shares


@pytest.mark.parametrize("nodes", [2, 5, 8, 200])
def test_a_file_falls_to_each_node_in_turn(nodes: int) -> None:
    plan = Plan(SIZES, nodes)
    for file in (0, 17, 143):
        heirs = list(plan.heirs(file))
        assert heirs[0] == plan.owner[file]
        assert sorted(heirs) == list(range(nodes))


def test_each_file_is_one_nodes_duty_whoever_is_gone() -> None:
    plan = Plan(SIZES, 8)
    everything = set(range(len(SIZES)))
    nobody: set[int] = set()
    for gone in (nobody, {3}, {0, 1, 2}, {1, 2, 3, 4, 5, 6, 7}):
        duties = [plan.duties(node, everything, (), gone) for node in range(8) if node not in gone]
        assert sorted(itertools.chain(*duties)) == sorted(everything)


def test_what_a_lost_owner_leaves_is_shared_by_all_others() -> None:
    plan = Plan(SIZES, 8)
    left = plan.shares[3]
    taken = [len(plan.duties(node, left, (), {3})) for node in range(8) if node != 3]
    assert sum(taken) == len(left) and max(taken) - min(taken) <= 1


def test_what_peers_hold_is_not_asked_of_the_hub() -> None:
    plan = Plan(SIZES, 8)
    everything = set(range(len(SIZES)))
    assert plan.duties(2, everything, everything, ()) == []
    half = set(range(0, len(SIZES), 2))
    assert not half & set(plan.duties(2, everything, half, ()))


def test_nodes_begin_with_different_owners() -> None:
    plan = Plan(SIZES, 8)
    first = {plan.owner[plan.order(node)[0]] for node in range(8)}
    assert first == set(range(8))
    assert all(plan.owner[plan.order(node)[0]] != node for node in range(8))


def test_a_busy_peer_is_passed_over() -> None:
    plan = Plan(SIZES, 4)
    holders = {file: [plan.owner[file]] for file in range(len(SIZES))}
    missing = set(range(len(SIZES))) - set(plan.shares[0])
    file, peer = plan.pick(0, missing, holders, ()) or (-1, -1)
    assert peer == plan.owner[file] == 1
    file, peer = plan.pick(0, missing, holders, {1}) or (-1, -1)
    assert peer == plan.owner[file] == 2
    assert plan.pick(0, missing, holders, {1, 2, 3}) is None


def test_those_who_ask_for_one_file_are_spread_over_its_holders() -> None:
    plan = Plan([1000], 9)
    holders = {0: [0, 3, 6]}
    asked = [plan.pick(node, {0}, holders, ()) for node in range(9) if node not in holders[0]]
    assert {peer for _, peer in filter(None, asked)} == {0, 3, 6}


def test_no_node_is_no_plan() -> None:
    with pytest.raises(ValueError, match="needs a node"):
        Plan(SIZES, 0)
