"""The monitoring: what is scraped, which settings and hosts are refused, and that its programs take their files."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.glm.fleet.plugins.filter import monitoring
from ansible_collections.glm.fleet.plugins.modules import monitoring_info

ROOT = Path(__file__).resolve().parents[2]
METRICS = ROOT / "tests/fixtures/metrics"
DEFAULTS = {"port": 8005, "engine": "vllm", "profile": "reference", "gpu": ""}
HOSTS: dict[str, dict[str, Any]] = {
    "node1": {"ansible_host": "10.0.0.1", "glm_node_address": "10.1.0.1"},
    "node2": {"ansible_host": "10.0.0.2", "glm_profile": "long", "glm_dcgm_exporter_image": "dcgm@sha256:1"},
    "gw1": {"ansible_host": "2001:db8::3", "glm_metrics_port": 9005},
}
TARGETS = monitoring.scrape_targets(HOSTS, ["node1", "node2"], ["gw1"], DEFAULTS)
NO_MAIL = {"to": "", "from": "", "smtp": "", "user": "", "password_file": ""}
MAIL = {"to": "ops@example.com", "from": "glm@example.com", "smtp": "mail:587", "user": "", "password_file": ""}
SETTINGS = {
    "days": 15, "gib": 0, "bind_address": "127.0.0.1", "webhook_url": "", "email": NO_MAIL, "token_file": __file__,
}  # fmt: skip
SEEN: dict[str, Any] = {
    "foreign": [], "rule_files": [], "own": [], "directory": "/var/lib/prometheus", "free": 100 << 30, "used": 0,
    "receiver": "", "installed": True,
}  # fmt: skip
RULES = monitoring.files_of(str(ROOT / "roles/monitoring/files/rules"), "/etc/prometheus/glm/rules")


def test_each_job_has_the_hosts_that_offer_it() -> None:
    names = {job: [target["labels"]["instance"] for target in found] for job, found in TARGETS.items()}
    everybody = ["node1", "node2", "gw1"]
    assert names == {"engine": ["node1", "node2"], "haproxy": everybody, "node": everybody, "gpu": ["node2"]}


def test_a_target_is_the_address_that_others_see_and_says_what_it_serves() -> None:
    first, second, gateway = TARGETS["haproxy"]
    assert first["targets"] == ["10.1.0.1:8005"] and gateway["targets"] == ["[2001:db8::3]:9005"]
    assert second["labels"] == {"instance": "node2", "role": "node", "engine": "vllm", "profile": "long"}
    assert gateway["labels"] == {"instance": "gw1", "role": "gateway"}


def test_a_job_without_targets_has_an_empty_file() -> None:
    files = monitoring.target_files({"gpu": []}, "/t")
    assert files == [{"path": "/t/gpu.json", "content": "[]"}]


def test_settings_that_are_right_are_let_through() -> None:
    assert monitoring.monitoring_problems(SETTINGS, "mon1", ["node1"]) == []
    assert monitoring.monitoring_problems({**SETTINGS, "email": MAIL, "webhook_url": "https://h/x"}, "m", []) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"days": 0}, "glm_monitoring_retention_days: 0 is no number of days: set 1 or more"),
        ({"gib": -1}, "glm_monitoring_retention_gib: -1 is no size"),
        ({"bind_address": "localhost"}, "glm_monitoring_bind_address: localhost is no IP address"),
        ({"token_file": "/nowhere"}, "glm_metrics_token_file: there is no file /nowhere on the controller"),
        ({"webhook_url": "hooks.example.com/x"}, "glm_alert_webhook_url: this is no URL: write http://HOST/PATH"),
        ({"webhook_url": "http://"}, "glm_alert_webhook_url: this is no URL"),
        ({"webhook_url": "https://h/a b"}, "glm_alert_webhook_url: this is no URL"),
        ({"email": {**MAIL, "smtp": "mail"}}, "glm_alert_smtp: 'mail' is no mail server: write HOST:PORT"),
        ({"email": {**MAIL, "from": ""}}, "glm_alert_email_from: '' is no address"),
        ({"email": {**MAIL, "user": "glm"}}, "glm_alert_smtp_password_file: there is no file '' on the controller"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(change: dict[str, Any], said: str) -> None:
    (line,) = monitoring.monitoring_problems({**SETTINGS, **change}, "mon1", ["node1"])
    assert line.startswith(said)


def test_a_secret_in_the_url_is_not_shown() -> None:
    (line,) = monitoring.monitoring_problems({**SETTINGS, "webhook_url": "htps://h/SECRET"}, "mon1", [])
    assert "SECRET" not in line


def test_a_node_cannot_watch_itself() -> None:
    (line,) = monitoring.monitoring_problems(SETTINGS, "node1", ["node1", "gw1"])
    assert line.startswith("this host watches the nodes, and cannot be one of them")


def test_a_host_that_they_fit_is_let_through() -> None:
    assert monitoring.monitoring_findings(SEEN, SETTINGS, TARGETS, RULES) == []


def test_a_retention_that_does_not_fit_is_refused() -> None:
    """By the formula in docs/monitoring.md: 14,200 series, four samples a minute, two bytes each, and 1 GiB."""
    series = 2 * 700 + 3 * 1000 + 3 * 3000 + 600 + 2 * 100
    assert monitoring.series_of(TARGETS) == series
    needed = series * 4 * 1440 * 15 * 2 + (1 << 30)
    assert monitoring.monitoring_findings({**SEEN, "free": needed}, SETTINGS, TARGETS, RULES) == []
    (line,) = monitoring.monitoring_findings({**SEEN, "free": needed - 1}, SETTINGS, TARGETS, RULES)
    assert line.startswith("glm_monitoring_retention_days: 15 days of about 14,200 series need")
    # What Prometheus has there already is room, too.
    assert monitoring.monitoring_findings({**SEEN, "free": needed - 1, "used": 1}, SETTINGS, TARGETS, RULES) == []
    bounded = {**SETTINGS, "days": 9999, "gib": 2}
    assert monitoring.monitoring_findings({**SEEN, "free": 3 << 30}, bounded, TARGETS, RULES) == []
    assert len(monitoring.monitoring_findings({**SEEN, "free": (3 << 30) - 1}, bounded, TARGETS, RULES)) == 1


@pytest.mark.parametrize(
    ("job", "files"), [("engine", ["vllm", "sglang"]), ("haproxy", ["haproxy-node", "haproxy-gateway"]),
                       ("node", ["node"]), ("gpu", ["dcgm"])],
)  # fmt: skip
def test_a_target_has_no_more_series_than_is_counted_with(job: str, files: list[str]) -> None:
    for name in files:
        lines = (METRICS / f"{name}.prom").read_text(encoding="utf-8").splitlines()
        assert sum(bool(line) and not line.startswith("#") for line in lines) <= monitoring.SERIES[job]


def test_the_sites_own_rules_may_not_have_our_names() -> None:
    text = "groups:\n  - name: glm-slo\n    rules:\n      - alert: 'GlmEngineDown'\n        expr: up == 0\n"
    seen = {**SEEN, "rule_files": [{"path": "/etc/prometheus/rules/site.yml", "content": text}]}
    assert monitoring.monitoring_findings(seen, SETTINGS, TARGETS, RULES) == [
        "/etc/prometheus/rules/site.yml defines the group glm-slo too: rename or remove it there",
        "/etc/prometheus/rules/site.yml defines the alert GlmEngineDown too: rename or remove it there",
    ]
    other = {"path": "/r", "content": text.replace("glm-slo", "site").replace("GlmEngineDown", "EngineDown")}
    assert monitoring.monitoring_findings({**SEEN, "rule_files": [other]}, SETTINGS, TARGETS, RULES) == []


def test_the_names_are_all_found_in_our_own_rules() -> None:
    for file, read in zip(RULES, monitoring.rule_names(RULES)):
        groups = yaml.safe_load(file["content"])["groups"]
        assert read["groups"] == [group["name"] for group in groups]
        assert read["alerts"] == [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def test_a_configuration_of_the_site_is_refused() -> None:
    (line,) = monitoring.monitoring_findings({**SEEN, "foreign": ["/etc/p.yml"]}, SETTINGS, TARGETS, RULES)
    assert line.startswith("/etc/p.yml is the site's own: set glm_monitoring_files")


def test_a_packages_own_configuration_and_ours_are_not_the_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {name: tmp_path / name for name in ("packaged", "ours", "theirs", "missing")}
    paths["packaged"].write_text("as it came\n")
    paths["ours"].write_text("# Written by the role monitoring.\n")
    paths["theirs"].write_text("as it came, with a line\n")
    known = {str(path): hashlib.md5(b"as it came\n").hexdigest() for path in paths.values()}
    monkeypatch.setattr(monitoring_info, "packaged", lambda: known)
    found = monitoring_info.foreign([str(path) for path in paths.values()], "Written by the role monitoring")
    assert found == [str(paths["theirs"])]


@contextmanager
def receiver(status: int) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    server.server_close()


def test_any_answer_of_the_receiver_is_one() -> None:
    for status in (200, 405):
        with receiver(status) as url:
            assert monitoring_info.silence(url) == ""
    assert "refused" in monitoring_info.silence(url)


def rendered(name: str, **changes: Any) -> str:
    values = {
        "ansible_managed": "Ansible managed", "__monitoring_mark": "Written by the role monitoring",
        "__monitoring_etc": "/etc/prometheus/glm", "__monitoring_token": "/etc/prometheus/glm/token",
        "__monitoring_address": "127.0.0.1", "__monitoring_listen": "127.0.0.1",
        "monitoring_site_rules": "/etc/prometheus/rules", "monitoring_targets": TARGETS, "monitoring_webhook_url": "",
        "monitoring_email": NO_MAIL, "monitoring_retention_days": 15, "monitoring_retention_gib": 0, **changes,
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"comment": lambda text: f"# {text}", "to_json": json.dumps}
    environment.globals["lookup"] = lambda _plugin, path: Path(path).read_text().strip()
    return environment.get_template(name).render(values)


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = rendered("prometheus.yml.j2").replace("/etc/prometheus/glm", str(tmp_path))
    (tmp_path / "token").write_text("token\n")
    for directory in ("rules", "targets"):
        (tmp_path / directory).mkdir()
    for file in [
        *monitoring.target_files(TARGETS, str(tmp_path / "targets")),
        *monitoring.files_of(str(ROOT / "roles/monitoring/files/rules"), str(tmp_path / "rules")),
    ]:
        Path(file["path"]).write_text(file["content"])
    (tmp_path / "prometheus.yml").write_text(text)
    command = [shutil.which("promtool") or "promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    assert {name: jobs[name]["metrics_path"] for name in TARGETS} == {
        "engine": "/engine", "haproxy": "/haproxy", "node": "/node", "gpu": "/gpu",
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["nobody", "webhook", "mail", "mail with a password"])
def test_alertmanager_takes_its_configuration(tmp_path: Path, variant: str) -> None:
    (tmp_path / "password").write_text('pass"word\n')
    variants: dict[str, dict[str, Any]] = {
        "nobody": {},
        "webhook": {"monitoring_webhook_url": 'https://hooks.example.com/a?b="c"'},
        "mail": {"monitoring_email": MAIL},
        "mail with a password": {
            "monitoring_email": {**MAIL, "user": "glm", "password_file": str(tmp_path / "password")}
        },
    }
    path = tmp_path / "alertmanager.yml"
    path.write_text(rendered("alertmanager.yml.j2", **variants[variant]))
    command = [shutil.which("amtool") or "amtool", "check-config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = yaml.safe_load(path.read_text())["receivers"]
    assert len(told) == 1 + (variant != "nobody")


def test_both_listen_where_they_are_told_to_and_keep_what_they_are_told_to() -> None:
    unit = rendered("prometheus-glm.conf.j2", __monitoring_listen="[::1]", monitoring_retention_gib=40)
    assert (
        "--web.listen-address=[::1]:9090 --storage.tsdb.retention.time=15d --storage.tsdb.retention.size=40GB" in unit
    )
    assert "retention.size" not in rendered("prometheus-glm.conf.j2")
    assert "--web.listen-address=127.0.0.1:9093 --cluster.listen-address= " in rendered("alertmanager-glm.conf.j2")
