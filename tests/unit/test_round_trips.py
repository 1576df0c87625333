"""round_trips: the figures that it makes of the workers' lines."""

import json

from ansible_collections.glm.fleet.plugins.callback import round_trips


def lines(*trips: tuple[str, str, str], action: str = "command") -> list[str]:
    return [json.dumps([*trip, action]) + "\n" for trip in trips]


def test_the_lines_become_figures_a_node_and_task() -> None:
    trips = lines(("n2", "2", "Ping"), ("n1", "1", "Copy"), ("n1", "1", "Ping"), ("n1", "1", "Copy"))
    assert round_trips.summarise(trips) == {
        "n1": {"round_trips": 3, "waits": 0, "tasks": {"Copy": 2, "Ping": 1}},
        "n2": {"round_trips": 1, "waits": 0, "tasks": {"Ping": 1}},
    }


def test_a_delegated_task_counts_for_the_host_that_it_goes_to() -> None:
    trips = lines(("", "1", "Drain"), ("n1", "1", "Ping"), ("", "9", "Drain"))
    assert round_trips.summarise(trips) == {
        "n1": {"round_trips": 2, "waits": 0, "tasks": {"Drain": 1, "Ping": 1}},
        "9": {"round_trips": 1, "waits": 0, "tasks": {"Drain": 1}},
    }


def test_a_host_that_tasks_are_only_delegated_to_has_its_name() -> None:
    figures = round_trips.summarise(lines(("", "9", "Drain")), {"9": "gateway"})
    assert figures == {"gateway": {"round_trips": 1, "waits": 0, "tasks": {"Drain": 1}}}


def test_a_long_unit_that_is_followed_on_is_a_wait() -> None:
    trips = lines(
        ("n1", "1", "Pull"),
        ("n1", "1", "Pull"),
        ("n1", "1", "Pull"),
        ("n1", "1", "Copy"),
        action="glm.fleet.systemd_job",
    )
    figures = round_trips.summarise(trips)["n1"]
    assert (figures["round_trips"], figures["waits"]) == (4, 2)


def test_nothing_counted_is_no_node() -> None:
    assert round_trips.summarise([]) == {}
