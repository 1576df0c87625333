"""What the project believes of the engines, looked up in the source of the releases of releases.txt."""

from __future__ import annotations

import functools
import re

import archives
import beliefs
import pytest
import readers

RELEASES = [(name, version) for name, version in archives.pins() if name in beliefs.ENGINES]
KINDS = {engine: sorted({belief.kind for belief in beliefs.all_beliefs(engine)}) for engine in beliefs.ENGINES}
# None of these may be found, in any release.
FALSE = {
    ("flag", "--no-such-flag"),
    ("flag", "--speculative-config.no_such_field"),
    ("alias", "--host = --port"),
    ("value", "--tool-call-parser glm74"),
    ("value", "--reasoning-parser glm54"),
    ("value", "--kv-cache-dtype fp9"),
    ("variable", "VLLM_NO_SUCH_VARIABLE"),
    ("variable", "SGLANG_NO_SUCH_VARIABLE"),
    ("metric", "vllm:no_such_total"),
    ("metric", "sglang:no_such"),
    ("metric", 'sglang:http_requests_active{verb="POST"}'),
    ("path", "/v1/no_such"),
    ("noise", "the engine never writes this line"),
    ("benchmark option", "--no-such-option"),
    ("benchmark figure", "p98_no_such_ms"),
}


@pytest.fixture(scope="session", autouse=True)
def _fetched() -> None:
    """All of them before the first is read: where one cannot be fetched, each test says so at once."""
    for pin in archives.pins():
        archives.archive_of(*pin)


@functools.cache
def judged(name: str, version: str) -> beliefs.Judged:
    """The engine's own beliefs, and the false ones."""
    beside = [archives.pinned(*pin) for pin in archives.pins() if pin[0] not in beliefs.ENGINES]
    false = [beliefs.Belief(name, kind, text, "nowhere") for kind, text in sorted(FALSE)]
    return beliefs.judge(archives.pinned(name, version), beside, beliefs.all_beliefs(name) + false)


@pytest.mark.parametrize(
    ("name", "version", "kind"),
    [(name, version, kind) for name, version in RELEASES for kind in KINDS[name]],
)
def test_beliefs(name: str, version: str, kind: str) -> None:
    answers = [a for a in judged(name, version).answers if a.belief.kind == kind and a.belief.origin != "nowhere"]
    assert answers
    wrong = [f"{answer} ({answer.belief.origin})" for answer in answers if answer.outcome in ("missing", "unread")]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(("name", "version"), RELEASES)
def test_what_is_not_there_is_not_found(name: str, version: str) -> None:
    answers = [answer for answer in judged(name, version).answers if answer.belief.origin == "nowhere"]
    assert len(answers) == len(FALSE)
    assert [str(answer) for answer in answers if answer.outcome != "missing"] == []


@pytest.mark.parametrize("engine", beliefs.ENGINES)
def test_each_alternative_of_a_phase_is_written_by_a_release(engine: str) -> None:
    assert beliefs.never_logged(engine, [judged(*release) for release in RELEASES if release[0] == engine]) == []


def test_the_edge_refuses_paths_that_there_are() -> None:
    served = set().union(*(judged(*release).served for release in RELEASES))
    refused = beliefs.refused_paths()
    assert refused
    assert [name for name in refused if not any(re.search(name, path) for path in served)] == []


@pytest.mark.parametrize("version", [version for name, version in RELEASES if name == "vllm"])
def test_vllms_image_has_flashinfers_kernels(version: str) -> None:
    """Else FlashInfer would fetch them at the first start, which a node without a way out cannot."""
    dockerfile = archives.pinned("vllm", version).text("docker/Dockerfile")
    assert re.search(r"^[^#]*\bflashinfer download-(cubin|kernels)\b", dockerfile, re.M)


def test_no_explanation_is_out_of_date() -> None:
    """Each entry that is about a belief explains something that is missing without it."""
    used = {
        answer.detail for release in RELEASES for answer in judged(*release).answers if answer.outcome == "explained"
    }
    held = [belief for engine in beliefs.ENGINES for belief in beliefs.all_beliefs(engine)]
    entries = [entry for entry in beliefs.EXTRA["explained"] if any(beliefs.about(entry, belief) for belief in held)]
    assert [entry["name"] for entry in entries if entry["why"] not in used] == []


@pytest.mark.parametrize("engine", beliefs.ENGINES)
def test_the_pins_span_the_releases_that_the_engines_file_names(engine: str) -> None:
    pins = [version for name, version in RELEASES if name == engine]
    named = beliefs.data(beliefs.ROOT / f"engines/{engine}.yml")["releases"]
    assert pins[0].startswith(named["first"])
    assert pins[-1].startswith(named["last"])


def test_another_layout_is_told_from_what_is_missing() -> None:
    """Of an empty package nothing can be said."""
    for engine in beliefs.ENGINES:
        release = beliefs.Release(archives.Package(engine, "99.0", {f"{engine}/__init__.py": ""}), [])
        for kind, name in (("flag", "--host"), ("value", "--tool-call-parser glm47"), ("benchmark option", "--seed")):
            assert release.answer(beliefs.Belief(engine, kind, name, "nowhere")).outcome == "unread"


def test_a_name_in_a_comment_or_a_text_is_not_found() -> None:
    text = '# "/v1/models" vllm:requests\nTEXT = "/v1/models"\nlogger.info("vllm:requests at %s", "/v1/models")\n'
    package = archives.Package("vllm", "99.0", {"vllm/a.py": text, "vllm/envs.py": 'HELP = "VLLM_A"\n'})
    assert readers.http_paths(package) == {}
    assert readers.metric(package, "vllm:requests") is None
    assert readers.variable(package, "VLLM_A") is None


def test_a_metric_is_found_with_the_labels_that_it_has() -> None:
    text = 'Gauge(name="sglang:active", documentation="", labelnames=["endpoint", "method"])\n'
    package = archives.Package("sglang", "99.0", {"sglang/a.py": text})
    assert readers.metric(package, 'sglang:active{method="POST"}') is not None
    assert readers.metric(package, 'sglang:active{verb="POST"}') is None


def test_log_lines_are_filled_in_as_the_engine_would() -> None:
    text = (
        'BAR_FORMAT = "{desc}: {percentage:3.0f}% Completed | {n_fmt}"\n'
        "kind = {1: 'cuda graph'}\n"
        "def f(name='weights'):\n"
        "    tqdm(x, desc=f'Loading {name}', bar_format=BAR_FORMAT)\n"
        "    logger.info('took %.2f seconds ' 'on %s', 1, 2)\n"
        "    logger.info(f'Capture {kind[x]} begin')\n"
        "    logger.debug('never shown')\n"
        "    raise ValueError('See above')\n"
    )
    package = archives.Package("vllm", "99.0", {"vllm/a.py": text})
    lines = {line.text: line.raised for line in readers.log_lines(package, ["Loading"])}
    assert lines == {
        "Loading weights:  45% Completed | 9": False,
        "took 7 seconds on 7": False,
        "Capture cuda graph begin": False,
        "See above": True,
    }


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("one|two", ["one", "two"]),
        ("Capture .*(cuda|CUDA) graph|end", ["Capture .*(cuda) graph", "Capture .*(CUDA) graph", "end"]),
        ("KV (is (in|out)|VA)(/|$)", ["KV (is (in))(/|$)", "KV (is (out))(/|$)", "KV (VA)(/|$)"]),
        (r"a\|b|[(|]c", [r"a\|b", "[(|]c"]),
    ],
)
def test_alternatives(pattern: str, parts: list[str]) -> None:
    assert beliefs.alternatives(pattern) == parts
