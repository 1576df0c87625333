"""An engine's metrics: how they are summed."""

from __future__ import annotations

import pytest
from ansible_collections.glm.fleet.plugins.module_utils.glm_node import metrics

TEXT = """\
# HELP requests In flight.
# TYPE requests gauge
requests{endpoint="/v1/messages",method="POST"} 2.0
requests{endpoint="/v1/chat/completions",method="POST"} 1.0
requests{endpoint="/health",method="GET"} 4.0
# TYPE tokens_total counter
tokens_total 7.0 1700000000
# TYPE never counter
"""


def test_samples_are_summed_by_name() -> None:
    assert metrics.samples(TEXT) == {"requests": 7.0, "tokens_total": 7.0, "never": 0.0}


@pytest.mark.parametrize(
    ("selector", "value"),
    [
        ("requests", 7.0),
        ('requests{method="POST"}', 3.0),
        ('requests{method="PUT"}', 0.0),
        ('requests{verb="POST"}', 7.0),  # the label has another name by now
        ("tokens_total", 7.0),
        ("request", 0.0),
        ('request{method="POST"}', 0.0),
        ("", 0.0),
    ],
)
def test_a_selector_takes_a_part(selector: str, value: float) -> None:
    assert metrics.total(TEXT, selector) == value
