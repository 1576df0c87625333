"""Prometheus, Alertmanager and the exporters of the distribution, over a fleet in use and its faults."""

from __future__ import annotations

from conftest import GATEWAY, NODES, WATCHER, Watched

# Seconds within which a fault that users feel has its alert.
SOON = 120


def test_every_target_answers(watched: Watched) -> None:
    assert set(watched.targets()) >= {
        *(f"{job} {node}" for node in NODES for job in ("engine", "haproxy", "node")),
        f"haproxy {GATEWAY}",
        f"node {GATEWAY}",
    }


def test_metrics_are_closed_to_all_but_the_watcher(watched: Watched) -> None:
    code = "curl -so /dev/null -w '%{http_code}' http://198.18.81.10:8005/engine"
    assert watched.run(WATCHER, code) == "401"
    assert watched.run("watched-2", code, check=False) in ("403", "000")


def test_a_second_run_changes_nothing(watched: Watched) -> None:
    for playbook in ("site.yml", "playbooks/monitoring.yml"):
        again = watched.play(playbook=playbook, seconds=600)
        assert (again.code, again.recap("changed")) == (0, 0), again.output[-3000:]


def test_a_healthy_rollout_raises_no_alert(watched: Watched) -> None:
    with watched.load("healthy rollout"):
        before = watched.alerts()
        run = watched.play(seconds=900, glm_engine_extra_env={"LIGHT_LOAD_SECONDS": "4", "LIGHT_TOKEN_SECONDS": "0.05"})
        assert run.code == 0, run.messages
        after = watched.alerts()
    assert (before, after) == (set(), set())
    fired = watched.ask_prometheus("query", query='max_over_time(ALERTS{alertstate="firing"}[30m])')["result"]
    assert [series["metric"]["alertname"] for series in fired] == []
    assert sum(watched.value("sum(rate(haproxy_frontend_http_requests_total[5m]))")) > 0


def test_an_engine_that_is_given_up_raises_its_alert(watched: Watched) -> None:
    """Three crashes leave a node down: nobody else would say so."""
    node = NODES[0]
    watched.run(
        node,
        "mkdir -p /run/systemd/system/glm-engine.service.d && "
        "printf '[Service]\\nExecStartPre=/bin/false\\n' > /run/systemd/system/glm-engine.service.d/broken.conf && "
        "systemctl daemon-reload && systemctl kill --signal=KILL glm-engine.service",
    )
    try:
        alert = f"GlmEngineDown {node}", f"GlmEngineGaveUp {node}"
        took = watched.wait(lambda: set(alert) & watched.alerts(), SOON)
        watched.wait(lambda: {"GlmEngineDown", "GlmEngineGaveUp"} & watched.delivered(), 60)
        print(f"an engine that is down: {took:.0f} s")
    finally:
        watched.run(
            node,
            "rm -r /run/systemd/system/glm-engine.service.d; systemctl daemon-reload; "
            "systemctl reset-failed glm-engine; systemctl start --no-block glm-engine",
        )
    watched.wait(lambda: not watched.alerts(), 300)


def test_a_node_that_is_gone_raises_its_alert(watched: Watched) -> None:
    watched.run(NODES[1], "systemctl stop haproxy")
    try:
        took = watched.wait(lambda: any(NODES[1] in alert for alert in watched.alerts()), SOON)
        print(f"a node that does not answer: {took:.0f} s: {watched.alerts()}")
    finally:
        watched.run(NODES[1], "systemctl start haproxy")
    watched.wait(lambda: not watched.alerts(), 300)


def test_the_exporters_cost_little(watched: Watched) -> None:
    """CPU of what this adds to a node: at most 1 % of a core over five minutes or more."""
    units = "prometheus-node-exporter.service glm-metrics.service"
    began, seconds = (
        f"systemctl show --property=CPUUsageNSec --value {units} | awk '/[0-9]/ {{sum += $1}} END {{print sum / 1e9}}'",
        60,
    )
    first = float(watched.run(NODES[0], began))
    last = float(watched.run(NODES[0], f"sleep {seconds}; {began}"))
    print(f"node-exporter: {(last - first) / seconds * 100:.2f} % of a core")
    assert (last - first) / seconds < 0.01


def test_a_host_that_is_a_node_is_refused(watched: Watched) -> None:
    inventory = watched.other_inventory(watched.playbook.scratch, "watcher: {ansible_host: 198.18.81.6}", "watched-1:")
    run = watched.play(inventory=inventory, playbook="playbooks/monitoring.yml")
    assert run.code != 0
    assert "watched-1" in run.messages[0]


def test_it_is_taken_back(watched: Watched) -> None:
    run = watched.play(seconds=600, glm_metrics=False)
    assert run.code == 0, run.messages
    listening = watched.run(NODES[0], "ss -ltn")
    assert ":8005 " not in listening
    assert ":9100 " not in listening
