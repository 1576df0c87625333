"""What /proc tells of other processes."""

from __future__ import annotations

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.processes import parse_container_id


def test_container_of_a_process() -> None:
    inner, outer = "a" * 64, "b" * 64
    assert parse_container_id(f"0::/system.slice/docker-{inner}.scope\n") == inner
    nested = f"0::/docker/{outer}/system.slice/docker-{inner}.scope\n"
    assert parse_container_id(nested, f"0::/docker/{outer}/init.scope\n") == inner
    assert parse_container_id(f"0::/docker/{outer}/system.slice/x.service\n", f"0::/docker/{outer}\n") is None
