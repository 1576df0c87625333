"""Role report: what it writes, rendered by Ansible itself, and the filters behind it."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.filter import report as plugin

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "report"
NODES = json.loads((FIXTURES / "nodes.json").read_text(encoding="utf-8"))
KEY = "sk-not-to-be-reported"

PLAY = """
- hosts: nodes
  gather_facts: false
  vars: {report_served_model_name: glm-5.2-fp8, report_started: '2026-07-01T10:00:00Z'}
  tasks:
    - ansible.builtin.include_vars: {file: SETTINGS, name: known}
    - ansible.builtin.import_role: {name: glm.fleet.report, tasks_from: node}
      when: inventory_hostname in known
      vars: VARS
    - ansible.builtin.import_role: {name: glm.fleet.report}
      run_once: true
      delegate_to: localhost
      become: false
"""
NAMES = ("engine", "profile", "image", "image_digest", "model", "model_revision", "driver", "release", "state")
VARS = {
    f"report_{name}": f"{{{{ known[inventory_hostname].{name} }}}}"
    for name in (*NAMES, "outage", "checks", "benchmark")
}
VARS["report_weights"] = "{{ known[inventory_hostname].weights | default({}) }}"
VARS["report_notes"] = "{{ known[inventory_hostname].notes | default([]) }}"


class Page(HTMLParser):
    """Notes what a page would load and whether its tags close."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe"}:
            self.loads.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def ansible(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the play above over three nodes that are never contacted."""
    inventory = directory / "inventory" / "lab"
    (inventory / "keys").mkdir(parents=True, exist_ok=True)
    (inventory / "keys" / "api-keys.txt").write_text(KEY + "\n", encoding="utf-8")
    hosts: dict[str, Any] = {"b200-1": {"ansible_host": "198.18.0.11"}, "b200-2": {}, "b200-3": {}}
    (inventory / "hosts.yml").write_text(json.dumps({"nodes": {"hosts": hosts}}), encoding="utf-8")
    settings = directory / "settings.json"
    settings.write_text(json.dumps(NODES), encoding="utf-8")
    play = directory / "play.yml"
    play.write_text(PLAY.replace("SETTINGS", str(settings)).replace("VARS", json.dumps(VARS)), encoding="utf-8")
    program = str(Path(sys.executable).parent / "ansible-playbook")
    command = [program, str(play), "-i", str(inventory), "-e", f"report_directory={directory / 'results'}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    directory = tmp_path_factory.mktemp("report")
    return ansible(directory), directory


def written(directory: Path, name: str) -> str:
    return (directory / "results" / name).read_text(encoding="utf-8")


def test_json_is_as_agreed(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    report = json.loads(written(run[1], "report.json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report["finished"])
    report["finished"] = "2026-07-01T11:00:00Z"
    golden = FIXTURES / "report.json"
    assert report == json.loads(golden.read_text(encoding="utf-8"))


def test_a_node_that_is_not_ok_fails_the_run_in_one_line(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = run
    assert done.returncode == 2, done.stdout + done.stderr
    assert "b200-2: 1 of 16 checks failed: tool_call; b200-3: the run ended for this node before" in done.stdout
    assert "b200-1:" not in done.stdout.split("not ok:")[1].split("See ")[0]


def test_the_end_says_how_to_call_it(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    text = run[0].stdout
    assert "1 of 3 nodes ok" in text
    assert "http://198.18.0.11:8000/v1/models" in text
    assert "head -n 1" in text
    assert "api-keys.txt" in text


def test_what_was_not_checked_is_said_everywhere(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, directory = run
    said = "the engine's arguments were not checked before the start"
    assert f"b200-1: {said}" in done.stdout
    assert f"Note: {said}, IMAGE could not read them: status 3, <no parser> \\| here" in written(directory, "report.md")
    assert said in written(directory, "report.html").replace("&#39;", "'")
    assert json.loads(written(directory, "report.json"))["nodes"]["b200-1"]["ok"] is True


def test_where_the_weights_came_from_is_said_everywhere(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, directory = run
    shares = "12.5 % from the hub, 75.0 % from peers, 12.5 % from http://mirror.example/glm?<a|b>"
    assert f"Weights:  755.6 GB to 1 node, {shares}" in done.stdout
    markdown = written(directory, "report.md")
    assert f"Weights: 755.6 GB to 1 node, {shares}." in markdown
    assert markdown.count("| weights | 755.6 GB in 14 min, 12.5 % from the hub,") == 1  # of the node that fetched
    page = html.unescape(written(directory, "report.html"))
    assert f"755.6 GB to 1 node, {shares}<" in page and f"<dd>755.6 GB in 14 min, {shares}</dd>" in page
    report = json.loads(written(directory, "report.json"))
    assert report["nodes"]["b200-1"]["weights"] == NODES["b200-1"]["weights"]
    assert "weights" not in report["nodes"]["b200-2"]


def test_the_weights_of_all_nodes_are_summed_up() -> None:
    nodes = {
        "a": {"weights": {"bytes": 300, "seconds": 10.0, "sources": {"hub": 300}}},
        "b": {"weights": {"bytes": 300, "seconds": 20.0, "sources": {"hub": 100, "an earlier revision": 200}}},
        "c": {},
    }
    assert plugin.report_weights(nodes, ["a", "b", "c", "d"]) == {
        "nodes": 2,
        "bytes": 600,
        "sources": {"hub": 400, "an earlier revision": 200},
        "percent": {"hub": 66.7, "an earlier revision": 33.3},
    }
    assert plugin.report_weights(nodes, ["c"]) == {}
    assert plugin.weights_words(plugin.report_weights(nodes, nodes)).startswith("600 B to 2 nodes, 66.7 % from the hub")
    merged = plugin.report_merge(nodes, "", ["c"], "", "x")
    assert "weights" not in merged and merged["schema"] == 1


def test_a_note_of_many_nodes_is_said_once() -> None:
    nodes = {f"n{number}": {"notes": ["not checked"]} for number in range(5)}
    assert plugin.report_notes(nodes, ["n0", "n1"]) == ["n0, n1: not checked"]
    assert plugin.report_notes({**nodes, "old": {}}, [*nodes, "old"]) == ["5 nodes: not checked"]


def test_no_key_is_reported(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, directory = run
    for text in (done.stdout, done.stderr, *(written(directory, f"report.{kind}") for kind in ("json", "md", "html"))):
        assert KEY not in text


def test_html_parses_and_loads_nothing(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    source = written(run[1], "report.html")
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    assert page.loads == []
    assert "url(" not in source
    assert "@import" not in source
    text = " ".join(page.texts)
    assert all(name in text for name in ("b200-1", "b200-2", "b200-3"))
    assert text.count("SGLang (by order)") >= 4
    assert '<b>"Paris & rain"</b>' in text  # what a model said is text, not markup
    assert source.count("<svg") == 4


def test_all_that_a_node_said_is_escaped() -> None:
    """The rest is made by the template itself: its own words, lengths and numbers."""
    own = r"{{ ('| ' |[a-z]+ }}|y \+ |row\.(p99_)?width|loop\.index|[a-z.]+ \| length|.*report_verdict)"
    source = (ROOT / "templates/report.html.j2").read_text()
    said = [expression for expression in re.findall(r"{{.*?}}", source) if "| escape" not in expression]
    assert [expression for expression in said if not re.match(own, expression)] == []


def test_markdown_has_a_row_for_each_node(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    text = written(run[1], "report.md")
    for row in ("| b200-1 | yes | 16 of 16 |", "| b200-2 | **no** | 15 of 16 |", "| b200-3 | **no** | 0 of 0 |"):
        assert row in text
    assert "| Output | 1,303 tok/s | 1,454 tok/s | 1,264 tok/s |" in text


def test_a_limited_run_keeps_the_other_nodes(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, directory = run
    before = json.loads(written(directory, "report.json"))["nodes"]
    done = ansible(directory, "--limit", "b200-1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(written(directory, "report.json"))["nodes"] == before


def test_a_check_run_writes_nothing(tmp_path: Path) -> None:
    done = ansible(tmp_path, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"checks": []}, "the node was not verified"),
        ({"failure": {"host": "", "text": "gateway", "fix": "port 8000 is taken"}}, "gateway: port 8000 is taken"),
        ({"benchmark": {**NODES["b200-1"]["benchmark"], "completed": 510, "failed": 2}}, "2 failed requests"),
    ],
)
def test_ok_needs_everything(change: dict[str, Any], reason: str) -> None:
    assert plugin.report_node(NODES["b200-1"])["ok"] is True
    entry = plugin.report_node({**NODES["b200-1"], **change})
    assert entry["ok"] is False
    assert reason in entry["reason"]


@pytest.mark.parametrize(
    ("outage", "seconds", "words"),
    [
        ("", None, "no engine served before"),
        (None, None, "no engine served before"),
        (0.0, 0.0, "none"),
        ("35.24", 35.2, "35.2 s"),
    ],
)
def test_outage(outage: Any, seconds: float | None, words: str) -> None:
    entry = plugin.report_node({**NODES["b200-1"], "outage": outage})
    assert entry["outage_s"] == seconds
    assert plugin.report_outage(entry) == words


def test_merge_drops_nodes_that_left_the_inventory_and_survives_a_damaged_report() -> None:
    entry = plugin.report_node(NODES["b200-1"])
    before = json.dumps({"schema": 1, "nodes": {"gone": entry, "kept": entry}})
    merged = plugin.report_merge({"new": entry}, before, ["kept", "new"], "", "2026-07-01T11:00:00Z")
    assert list(merged["nodes"]) == ["kept", "new"]
    assert list(plugin.report_merge({"new": entry}, "{", ["new"], "", "x")["nodes"]) == ["new"]
    again = plugin.report_merge({}, json.dumps({**merged, "started": "a", "finished": "b"}), ["kept", "new"], "", "x")
    assert (again["started"], again["finished"], again["nodes"]) == ("a", "b", merged["nodes"])


def test_endpoints_of_all_kinds() -> None:
    hosts: dict[str, dict[str, Any]] = {
        "a": {"ansible_host": "198.18.0.1"},
        "b": {"ansible_host": "2001:db8::1", "glm_tls_certificate_file": "b.pem", "glm_port": "443"},
        "c.example": {"ansible_host": "198.18.0.3", "glm_acme_names": ["llm.example.com", "www.example.com"]},
    }
    assert plugin.report_endpoints(list(hosts), hosts) == [
        "http://198.18.0.1:8000",
        "https://[2001:db8::1]:443",
        "https://llm.example.com:8000",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (1454.07, "tok/s", "1,454 tok/s"),
        (45.44, "tok/s", "45.4 tok/s"),
        (5403.88, "ms", "5.40 s"),
        (19.38, "ms", "19.4 ms"),
    ],
)
def test_quantities_read_well(value: float, unit: str, words: str) -> None:
    assert plugin.quantity(value, unit) == words


def test_an_engine_that_is_down_is_said_so() -> None:
    entry = plugin.report_node({**NODES["b200-1"], "outage": 0.0, "down": True})
    assert plugin.report_outage(entry) == "since its stop, and it is still down"
    assert plugin.report_interrupted({"b200-1": entry}, ["b200-1", "b200-2"]) == ["b200-1"]


def test_the_terminal_names_a_few_nodes_and_counts_many() -> None:
    nodes: dict[str, dict[str, Any]] = {f"n{number}": {"outage_s": 10.0 + number} for number in range(5)}
    assert plugin.report_outages(nodes, ["n0", "n1"]) == ["n0 did not serve for 10.0 s", "n1 did not serve for 11.0 s"]
    assert plugin.report_outages(nodes, list(nodes)) == ["5 nodes did not serve for 10.0 to 14.0 s each"]
    nodes["n3"] = {"outage_s": 0.0, "down": True}
    down = ["n3 does not serve since its stop", "n4 did not serve for 14.0 s"]
    assert plugin.report_outages(nodes, ["n3", "n4"]) == down
    assert plugin.report_first(["a", "b"]) == "a, b"
    assert plugin.report_first(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"
