"""Runs last: what all the clients of the other tests have seen together."""

from __future__ import annotations

from fleet import Fleet

ENOUGH = 10_000


def test_the_clients_were_many_and_none_was_failed(fleet: Fleet, first: str) -> None:
    assert fleet.total["sent"] >= ENOUGH
    assert (fleet.total["failed"], fleet.total["cut"]) == (0, 0)
