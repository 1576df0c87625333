"""round_trips: the figures that it makes of the workers' lines."""

import round_trips


def test_the_lines_become_figures_a_node_and_task() -> None:
    lines = ['["n2", "Ping"]\n', '["n1", "Copy"]\n', '["n1", "Ping"]\n', '["n1", "Copy"]\n']
    assert round_trips.summarise(lines) == {
        "n1": {"round_trips": 3, "tasks": {"Copy": 2, "Ping": 1}},
        "n2": {"round_trips": 1, "tasks": {"Ping": 1}},
    }


def test_nothing_counted_is_no_node() -> None:
    assert round_trips.summarise([]) == {}
