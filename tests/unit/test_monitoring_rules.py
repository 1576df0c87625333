"""The rules of the monitoring: what fires, what is quiet, and that every name in them is one that a scrape has."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.glm.fleet.plugins.plugin_utils.xids import REFUSE, XIDS

ROOT = Path(__file__).resolve().parents[2]
RULES = sorted((ROOT / "roles/monitoring/files/rules").glob("*.yml"))
TESTS = sorted((ROOT / "tests/monitoring").glob("*.test.yml"))
SCRAPES = sorted((ROOT / "tests/fixtures/metrics").glob("*.prom"))
PROMTOOL = shutil.which("promtool") or "promtool"  # tests/programs brings it
SEVERITIES = {"critical", "warning", "info"}
# What a scrape does not have: Prometheus writes it, and the labels of a target.
OWN_METRICS = {"up"}
TARGET_LABELS = {"job", "instance", "role", "engine", "profile"}
WORDS = {
    *("and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"),
    *("sum", "min", "max", "count", "avg", "quantile", "abs", "absent", "clamp_min", "rate", "increase", "time"),
    *("vector", "histogram_quantile", "label_replace", "avg_over_time", "min_over_time", "max_over_time"),
    "sum_over_time",
}  # fmt: skip
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in load(path)["groups"]:
            yield from group["rules"]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDS = {rule["record"] for rule in rules() if "record" in rule}
CASES = [case for path in TESTS for case in load(path)["tests"]]


def names_in(expression: str) -> set[str]:
    """Every metric that a PromQL expression reads."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b\d[\d.]*[smhd]?\b", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", text)) - WORDS


def scraped() -> dict[str, set[tuple[str, str]]]:
    """By the names in all scrapes, the labels and their values."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in SCRAPES:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                name, _, rest = line.partition("{") if "{" in line else line.partition(" ")
                found.setdefault(name, set()).update(re.findall(r'(\w+)="([^"]*)"', rest if "{" in line else ""))
    return found


def metrics_of(case: dict[str, Any]) -> set[str]:
    return {series["series"].partition("{")[0] for series in case["input_series"]}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_every_alert_does_as_its_tests_say(path: Path) -> None:
    done = subprocess.run([PROMTOOL, "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    done = subprocess.run([PROMTOOL, "check", "rules", *RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_test_that_fires_and_one_that_is_quiet(alert: str) -> None:
    fires = [case for case in CASES if case["name"].split()[:2] == [alert, "fires"]]
    quiet = [case for case in CASES if case["name"].split()[:3] == [alert, "is", "quiet"]]
    assert fires, "no test makes it fire"
    assert quiet, "no test leaves it quiet"
    for case in fires + quiet:
        (check,) = case["promql_expr_test"]
        assert f'ALERTS{{alertname="{alert}",alertstate="firing"}}' in check["expr"], case["name"]
        assert bool(check["exp_samples"]) == (case in fires), case["name"]
    # A near thing: it sees no fewer metrics than one that fires.
    seen = set().union(*map(metrics_of, quiet))
    assert any(metrics_of(case) <= seen for case in fires)


def test_no_test_is_of_an_alert_that_is_gone() -> None:
    assert {case["name"].split()[0] for case in CASES} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in SEVERITIES
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.split(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): text
                for title, text in zip(headings[1::2], headings[2::2])}  # fmt: skip
    assert f"`{alert}`" in sections[anchor]


def test_the_words_of_the_alerts_are_filled_in(tmp_path: Path) -> None:
    """promtool shows what came where nothing was expected."""
    cases = [
        {key: value for key, value in case.items() if key != "promql_expr_test"}
        | {"alert_rule_test": [{"alertname": case["name"].split()[0], "eval_time": check["eval_time"]}]}
        for case in CASES
        for check in case["promql_expr_test"]
        if check["exp_samples"]
    ]
    document = {"rule_files": [str(path) for path in RULES], "evaluation_interval": "1m", "tests": cases}
    path = tmp_path / "words.test.yml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    done = subprocess.run([PROMTOOL, "test", "rules", path], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    texts = re.findall(r'(?:summary|description)="((?:[^"\\]|\\.)*)"', said)
    assert len(texts) >= 2 * len(ALERTS), said
    for text in texts:
        assert not re.search(r"<no value>|error expanding|\{\{|NaN|  | of ?$| of (is|has|are) ", text), text


def test_every_metric_of_the_rules_is_in_a_scrape() -> None:
    known = scraped()
    for rule in rules():
        for name in names_in(rule["expr"]) - OWN_METRICS - RECORDS:
            assert name in known, f"{rule.get('alert') or rule['record']}: {name}"


def test_every_label_that_a_rule_selects_by_is_in_a_scrape() -> None:
    known = scraped()
    for rule in rules():
        for name, matchers in SELECTOR.findall(rule["expr"]):
            for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
                if name in known and label not in TARGET_LABELS:
                    values = {seen for other, seen in known[name] if other == label}
                    where = f"{rule.get('alert') or rule['record']}: {name}, {label}"
                    # A node is in one phase at a time.
                    assert value in values if operator == "=" and label != "phase" else values, where


def test_what_is_recorded_is_read_by_that_name() -> None:
    """A name with a word too much, such as :rate1m, would be an empty answer and no error."""
    read = {name for rule in rules() for name in names_in(rule["expr"]) if name.startswith("glm:")}
    assert read <= RECORDS


def test_the_names_are_found_in_an_expression() -> None:
    expression = (
        'sum by (le, a) (rate(x:y_total{b="c or d",e=~"f.*"}[5m])) / 2 > 0.9 and on (z) clamp_min(w, 0) offset 10m'
        " or time() - v < 3 * 86400"
    )
    assert names_in(expression) == {"x:y_total", "w", "v"}


def test_the_fatal_xids_are_those_that_refuse_a_node() -> None:
    codes = re.findall(r"== (\d+)", ALERTS["GlmGpuXidFatal"]["expr"])
    assert sorted(map(int, codes)) == [code for code, kind in XIDS.items() if kind.action == REFUSE]


def test_the_alerts_know_no_engine() -> None:
    """What differs between the engines is in the recording rules alone."""
    named = {alert for alert, rule in ALERTS.items() if re.search(r"vllm|sglang", rule["expr"])}
    assert named == set()
