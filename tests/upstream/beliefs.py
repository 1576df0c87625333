"""What the project believes of the engines, out of its own data files, and whether a release holds it."""

from __future__ import annotations

import ast
import fnmatch
import functools
import gc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import readers
import yaml
from archives import Package, Unreadable
from packaging.version import Version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "plugins/module_utils"))  # glm_node, which engine-launch imports
EXTRA = yaml.safe_load((HERE / "beliefs.yml").read_text())
ENGINES = ("vllm", "sglang")


@dataclass(frozen=True, order=True)
class Belief:
    engine: str
    kind: str
    name: str
    origin: str  # the project's own file


@dataclass(frozen=True)
class Answer:
    """found, missing, unread (the reader does not know the release's layout) or explained."""

    belief: Belief
    release: str
    outcome: str
    detail: str

    def __str__(self) -> str:
        return f"{self.release}: {self.belief.kind} {self.belief.name}: {self.outcome}: {self.detail}"


def data(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def all_beliefs(engine: str) -> list[Belief]:
    return sorted(set(_beliefs(engine)))


def _beliefs(engine: str) -> Iterator[Belief]:
    path = ROOT / f"engines/{engine}.yml"
    own, said = data(path), relative(path)
    aliases = own.get("aliases", {})
    for name in _flags_in({key: value for key, value in own.items() if key != "aliases"}):
        yield Belief(engine, "flag", name, said)
    for short, name in aliases.items():
        yield Belief(engine, "alias", f"{short} = {name}", said)
    variables = {own["context"]["longer_env"]}.union(
        *(own.get(key, {}) for key in ("env", "refused_env", "cuda_compat_env"))
    )
    for flags in own.get("loaders", {}).values():
        yield from (
            Belief(engine, "value", f"{flag} {value}", said) for flag, value in flags.items() if isinstance(value, str)
        )
    if not own["flags"]["model"]:
        yield Belief(engine, "positional argument", "model", said)
    yield from (Belief(engine, "variable", name, said) for name in variables)
    metrics = own["metrics"]
    for key, value in metrics.items():
        for name in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            if ":" in name:
                yield Belief(engine, "metric", name, said)
            elif key == "path":
                yield Belief(engine, "path", name, said)
    for name in (own["health_path"], own["models_path"], *EXTRA["also"]["paths"]):
        yield Belief(engine, "path", name, said)
    yield from (Belief(engine, "phase", item["pattern"], said) for item in own["log"]["phases"])
    yield from (
        Belief(engine, "noise", part, said) for pattern in own["log"]["noise"] for part in alternatives(pattern)
    )
    for profile in sorted((ROOT / f"engines/{engine}/profiles").glob("*.yml")):
        content, said = data(profile), relative(profile)
        for flag, value in content["flags"].items():
            yield Belief(engine, "flag", flag, said)
            if isinstance(value, str):
                yield Belief(engine, "value", f"{flag} {value}", said)
        yield from (Belief(engine, "variable", name, said) for name in content["env"])
    yield from _benchmark(engine)
    yield from _named_by_the_code(engine)
    yield from _imports(engine)


def _flags_in(value: Any) -> Iterator[str]:
    """Every flag in a data file, whether it is a key or a value."""
    if isinstance(value, str):
        if re.fullmatch(r"--[a-z][\w.-]*", value):
            yield value
    elif isinstance(value, dict):
        for part in (*value, *value.values()):
            yield from _flags_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _flags_in(part)


def _benchmark(engine: str) -> Iterator[Belief]:
    path = ROOT / f"engines/{engine}/benchmark.yml"
    client, said = data(path), relative(path)
    for argument in client["arguments"]:
        if argument.startswith("--"):
            option, _, value = argument.partition("=")
            yield Belief(engine, "benchmark option", option, said)
            if value.startswith("/"):
                yield Belief(engine, "path", value, said)
            elif re.fullmatch(r"[a-z][\w-]*", value):
                yield Belief(engine, "benchmark value", f"{option} {value}", said)
    for name in client["figures"].values():
        yield Belief(engine, "benchmark figure", name, said)
    for metric in client["latencies"].values():
        for statistic in client["statistics"].values():
            yield Belief(engine, "benchmark figure", f"{statistic}_{metric}_ms", said)


def _named_by_the_code(engine: str) -> Iterator[Belief]:
    """What roles, plugins and templates name: variables, metrics, and the paths of the checks and of the edge."""
    for folder in ("roles", "plugins", "templates", "playbooks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".yml", ".j2", "") and "__pycache__" not in path.parts:
                text = path.read_text(errors="replace")
                for name in re.findall(rf"\b{engine.upper()}_[A-Z0-9_]+\b", text):
                    yield Belief(engine, "variable", name, relative(path))
                for name in re.findall(rf"\b{engine}:[a-z_]+\b", text):
                    # A histogram is made by its name alone.
                    yield Belief(engine, "metric", re.sub("_(bucket|count|sum)$", "", name), relative(path))
    path = ROOT / "plugins/modules/verify_endpoint.py"
    for name in paths_of_the_checks(path):
        yield Belief(engine, "path", name, relative(path))


def paths_of_the_checks(path: Path) -> set[str]:
    """What the checks ask for and expect an answer of."""
    asked = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Call, ast.Tuple)):
            parts = node.args if isinstance(node, ast.Call) else node.elts
            words = [readers.literal(part) for part in parts]
            for verb, word in zip(words, words[1:]):
                if verb in ("GET", "POST") and word and word.startswith("/"):
                    asked.add(word)
    return asked


def refused_paths() -> dict[str, str]:
    """What the edge keeps from clients, as regular expressions: by its configuration, and by the checks' defaults."""
    module = ROOT / "plugins/modules/verify_endpoint.py"
    found = {}
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if key is not None and readers.literal(key) == "refused_paths":
                    names = [text for text in readers.strings(value) if text.startswith("/")]
                    found.update({f"^{re.escape(name)}$": relative(module) for name in names})
    edge = ROOT / "templates/haproxy.cfg.j2"
    for pattern in re.findall(r"^ *acl .* -m reg .*?(\^/\S+)$", edge.read_text(), re.MULTILINE):
        found.update({part: relative(edge) for part in alternatives(pattern)})
    return found


def places(engine: str) -> dict[str, tuple[str, ...]]:
    """What parse.py takes of the engine, and the modules in which it looks for each: see its PLACES."""
    path = ROOT / f"engines/{engine}/parse.py"
    value = readers.assigned(ast.parse(path.read_text()), "PLACES")
    assert value is not None, f"{path} has no PLACES"
    found: dict[str, tuple[str, ...]] = ast.literal_eval(value)
    return found


def _imports(engine: str) -> Iterator[Belief]:
    for name in places(engine):
        yield Belief(engine, "import", name, f"engines/{engine}/parse.py")


def alternatives(pattern: str) -> list[str]:
    """A regular expression without its bars: one for each of the texts between them, those in groups included."""
    parts = _between_bars(pattern)
    if len(parts) > 1:
        return [one for part in parts for one in alternatives(part)]
    for start, end in sorted(_groups(pattern)):
        inner = pattern[start:end]
        if len(_between_bars(inner)) > 1 and re.search(r"[a-zA-Z]{2}", inner):
            return [
                one for part in _between_bars(inner) for one in alternatives(f"{pattern[:start]}{part}{pattern[end:]}")
            ]
    return [pattern]


def _marks(pattern: str) -> Iterator[tuple[int, str]]:
    """The brackets and bars that mean something: neither escaped nor in a set."""
    index = 0
    while index < len(pattern):
        if pattern[index] == "[":
            index = pattern.index("]", index + 2)
        elif pattern[index] in "()|":
            yield index, pattern[index]
        index += 2 if pattern[index] == "\\" else 1


def _between_bars(pattern: str) -> list[str]:
    cuts, depth = [-1], 0
    for index, mark in _marks(pattern):
        depth += {"(": 1, ")": -1, "|": 0}[mark]
        if mark == "|" and depth == 0:
            cuts.append(index)
    return [pattern[start + 1 : end] for start, end in zip(cuts, [*cuts[1:], len(pattern)])]


def _groups(pattern: str) -> Iterator[tuple[int, int]]:
    """Where the inside of each group begins and ends."""
    open_at = []
    for index, mark in _marks(pattern):
        if mark == "(":
            open_at.append(index + 1)
        elif mark == ")":
            yield open_at.pop(), index


def words_of(pattern: str) -> list[str]:
    """A plain text of each alternative, by which the files are chosen that may write it."""
    found = []
    for part in alternatives(pattern):
        told = part.split("(?P<percent>")[0]  # what follows is the progress bar's, not the line's
        plain = re.sub(r"\\([.\-/:()])", r"\1", re.sub(r"\\[a-zA-Z]|[()]", "\0", told))
        found.append(
            max(re.findall(r"[\w. /'-]+", re.sub(r"\.[*+?]+|\[[^]]*\]|.[?*]", "\0", plain)), key=len, default="")
        )
    return [word for word in found if len(word) > 3]


# Whether a release holds it -------------------------------------------------------------------------------------


class Release:
    """A release of an engine, with what is read of it once."""

    def __init__(self, package: Package, beside: list[Package]) -> None:
        self.package, self.engine, self.beside = package, package.name, beside

    @functools.cached_property
    def parser(self) -> readers.Parser:
        return readers.Parser(readers.FLAGS[self.engine](self.package))

    @functools.cached_property
    def parsers(self) -> dict[str, tuple[str, frozenset[str]]]:
        return readers.PARSERS[self.engine](self.package)

    @functools.cached_property
    def client(self) -> dict[str, Any]:
        return data(ROOT / f"engines/{self.engine}/benchmark.yml")

    @functools.cached_property
    def client_files(self) -> list[str]:
        return readers.benchmark_files(self.package, self.client["arguments"])

    @functools.cached_property
    def client_parser(self) -> readers.Parser:
        return readers.Parser(readers.benchmark_flags(self.package, self.client_files))

    @functools.cached_property
    def paths(self) -> dict[str, readers.Found]:
        return readers.http_paths(self.package)

    @functools.cached_property
    def log(self) -> Any:
        return project_log(self.engine)

    @functools.cached_property
    def lines(self) -> list[readers.Line]:
        own = data(ROOT / f"engines/{self.engine}.yml")["log"]
        words = [word for item in own["phases"] for word in words_of(item["pattern"])]
        noise = [
            word
            for belief in all_beliefs(self.engine)
            if belief.kind == "noise" and not explained(belief, self.package.version)
            for word in words_of(belief.name)
        ]
        return [line for package in (self.package, *self.beside) for line in readers.log_lines(package, words + noise)]

    def answer(self, belief: Belief) -> Answer:
        why = explained(belief, self.package.version)
        try:
            where = getattr(self, "_" + belief.kind.replace(" ", "_"))(belief.name)
        except Missing as read:
            return Answer(belief, str(self.package), "explained" if why else "missing", why or f"read {read}")
        except Unreadable as problem:
            return Answer(belief, str(self.package), "explained" if why else "unread", why or str(problem))
        return Answer(belief, str(self.package), "found", str(where))

    def _flag(self, name: str) -> readers.Found:
        base, _, key = name.partition(".")
        flag = self.parser.flag(base)
        if flag is None:
            raise Missing(some(self.parser.files))
        if key:
            config = "".join(part.capitalize() for part in base.strip("-").split("-"))
            path = readers.config_file(self.package, config)
            for item in readers.fields(readers.class_of(self.package, path, config)):
                if readers.field_name(item) == key.replace("-", "_"):
                    return readers.Found(path, item.lineno)
            raise Missing(path)
        return flag.where

    def _positional_argument(self, name: str) -> readers.Found:
        where = readers.positional(self.package, readers.vllm_cli(self.package), name)
        return found(where, readers.vllm_cli(self.package))

    def _alias(self, name: str) -> readers.Found:
        short, long = name.split(" = ")
        flag = self.parser.flag(short)
        if flag is None or flag != self.parser.flag(long):
            raise Missing(some(self.parser.files))
        return flag.where

    def _value(self, name: str) -> readers.Found | str:
        flag_name, value = name.split(" ", 1)
        if flag_name in self.parsers:
            path, known = self.parsers[flag_name]
            if value not in known:
                raise Missing(path)
            return path
        where = self._flag(flag_name)
        base, _, key = flag_name.partition(".")
        flag = self.parser.flag(base)
        choices = flag.choices if flag else None
        if key:
            config = "".join(part.capitalize() for part in base.strip("-").split("-"))
            choices = readers.config_choices(self.package, config, key)
        if choices is not None and value not in choices:
            raise Missing(f"{where}, which takes {', '.join(sorted(choices))}")
        return where

    def _variable(self, name: str) -> readers.Found:
        return found(
            readers.variable(self.package, name), "vllm/envs.py" if self.engine == "vllm" else "srt/environ.py"
        )

    def _metric(self, name: str) -> readers.Found:
        return found(readers.metric(self.package, name), "every file that has the name")

    def _path(self, name: str) -> readers.Found:
        return found(self.paths.get(name), "every file that serves a path")

    def _phase(self, pattern: str) -> readers.Found:
        """A line that the engine writes, which the program of the node takes for this phase and no earlier one."""
        shadow = ""
        for line in self.lines:
            match = re.search(pattern, line.text)
            if match and not line.raised:
                phase = next(item["phase"] for item in self.log.phases if item["pattern"] == pattern)
                seen = self.log.phase_of(line.text)
                if seen == phase.format(**match.groupdict()):
                    return line.where
                shadow = f"{line.where}: {line.text!r}, which an earlier pattern takes for {seen!r}"
        raise Missing(shadow or "every file that has its words")

    def _noise(self, part: str) -> readers.Found:
        where = next((line.where for line in self.lines if re.search(part, line.text)), None)
        return found(where, "every file that has its words")

    def has_alternative(self, part: str) -> bool:
        return any(re.search(part, line.text) for line in self.lines if not line.raised)

    def _benchmark_option(self, name: str) -> readers.Found:
        flag = self.client_parser.flag(name)
        if flag is None:
            raise Missing(some(self.client_files))
        return flag.where

    def _benchmark_value(self, name: str) -> readers.Found:
        option, value = name.split(" ", 1)
        flag = self.client_parser.flag(option)
        if flag is None or (flag.choices is not None and value not in flag.choices):
            raise Missing(some(self.client_files))
        return flag.where

    def _benchmark_figure(self, name: str) -> readers.Found:
        return found(readers.result_field(self.package, self.client_files, name), some(self.client_files))

    def _import(self, name: str) -> readers.Found:
        """A name that parse.py takes of the first module that has it."""
        modules = places(self.engine)[name]
        for module in modules:
            for path in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
                if path in self.package.files:
                    # As the program does: the first module that is there must have it.
                    return found(readers.module_name(self.package, path, name), path)
        raise Missing(f"none of {', '.join(modules)}, which are not there")


@dataclass(frozen=True)
class Judged:
    """What was found in a release. It holds none of its source, which is large."""

    release: str
    answers: list[Answer]
    alternatives: set[str]  # of the phases' patterns
    served: set[str]  # every path


def judge(package: Package, beside: list[Package], beliefs: list[Belief] | None = None) -> Judged:
    gc.disable()  # it would look through the syntax trees again and again, for a third of the time
    try:
        return _judge(package, beside, beliefs)
    finally:
        gc.enable()


def _judge(package: Package, beside: list[Package], beliefs: list[Belief] | None) -> Judged:
    release = Release(package, beside)
    answers = [release.answer(belief) for belief in beliefs or all_beliefs(package.name)]
    parts = [part for item in release.log.phases for part in alternatives(item["pattern"])]
    return Judged(
        str(package),
        answers,
        {part for part in parts if release.has_alternative(part)},
        set(release.paths),
    )


def never_logged(engine: str, judged: list[Judged]) -> list[str]:
    """Alternatives of the phases' patterns that none of these releases writes."""
    known = set().union(*(one.alternatives for one in judged))
    phases = data(ROOT / f"engines/{engine}.yml")["log"]["phases"]
    return [part for item in phases for part in alternatives(item["pattern"]) if part not in known]


class Missing(Exception):
    """Read and not there; its text says what was read."""


def found(where: readers.Found | None, read: str) -> readers.Found:
    if where is None:
        raise Missing(read)
    return where


def some(files: list[str]) -> str:
    """The first few, and how many more."""
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def project_log(engine: str) -> Any:
    """The phase detection of the program that runs on a node, with the engine's own patterns."""
    own = data(ROOT / f"engines/{engine}.yml")["log"]
    loader = importlib.machinery.SourceFileLoader(
        "engine_launch", str(ROOT / "roles/inference_service/files/engine-launch")
    )
    spec = importlib.util.spec_from_loader("engine_launch", loader)
    assert spec
    program = importlib.util.module_from_spec(spec)
    loader.exec_module(program)
    release = SimpleNamespace(
        phases=[(re.compile(item["pattern"]), item["phase"]) for item in own["phases"]],
        noise=[re.compile(pattern) for pattern in own["noise"]],
    )
    log = program.Log(release)
    log.phases = own["phases"]
    return log


def about(entry: dict[str, str], belief: Belief) -> bool:
    return (
        entry.get("engine", belief.engine) == belief.engine
        and entry["kind"] == belief.kind
        and fnmatch.fnmatchcase(belief.name, entry["name"])
    )


def explained(belief: Belief, version: Version) -> str:
    """Why a release need not hold a belief; empty where it must."""
    for entry in EXTRA["explained"]:
        if about(entry, belief) and Version(str(entry.get("since", "0"))) <= version <= Version(
            str(entry.get("until", "9999"))
        ):
            return str(entry["why"])
    return ""
