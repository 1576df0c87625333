"""What a release's own source says: its flags, variables, metrics, log lines, paths, parser names and benchmark client.

Read by `ast`: a name in a comment or in a text is not found. A file that has gone or changed its shape is Unreadable.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from archives import Package, Unreadable

VERBS = {"get", "post", "put", "delete", "route", "api_route", "websocket", "add_api_route", "add_route", "Mount"}
LOGGERS = re.compile(r"^(info|warning|error|critical|exception|log)(_once|_on_rank0)?$|^print|rank0|^_?log(_\w+)?$")
BARS = {"tqdm", "trange", "set_description"}
# tqdm's own bar, where the engine gives none.
BAR = "{desc}: {percentage:3.0f}%|###   | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
BAR_VALUES = {"percentage": 45.0, "n_fmt": 9, "total_fmt": 20, "elapsed": "00:04", "remaining": "00:05"}
# What runs on other hardware than the nodes', whose lines no node writes.
OTHER_DEVICES = re.compile(r"(^|[/_])(cpu|npu|xpu|tpu|hpu|musa|mps|mlx|rocm|aiter)([/_.]|$)")
MOST = 20  # lines that one call may stand for
PLACEHOLDER = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?[sdifgxr]")


@dataclass(frozen=True)
class Found:
    """Where a belief was found, as FILE:LINE."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


# A flag: its names, its choices (None: any value) and where it stands.
@dataclass(frozen=True)
class Flag:
    names: tuple[str, ...]
    choices: frozenset[str] | None
    where: Found


def called(node: ast.AST) -> str:
    """The last part of what is called: add_argument of parser.add_argument(...)."""
    return called_name(node.func) if isinstance(node, ast.Call) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((item.value for item in call.keywords if item.arg == name), None)


def strings(node: ast.AST | None) -> list[str]:
    """Every string constant under a node."""
    found = ast.walk(node) if node is not None else ()
    return [part.value for part in found if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def literal(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def class_of(package: Package, path: str, name: str) -> ast.ClassDef:
    for node in package.tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise Unreadable(f"{path} of {package} has no class {name}")


def function_of(package: Package, path: str, name: str) -> list[ast.FunctionDef]:
    found = [n for n in package.nodes(path) if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found:
        raise Unreadable(f"{path} of {package} has no function {name}")
    return found


def fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    return (item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))


def field_name(item: ast.AnnAssign) -> str:
    assert isinstance(item.target, ast.Name)
    return item.target.id


def assigned(tree: ast.Module, name: str) -> ast.expr | None:
    """What a module's own name stands for."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return getattr(node, "value", None)
    return None


def choices_of(tree: ast.Module, node: ast.expr | None, depth: int = 0) -> frozenset[str] | None:  # noqa: PLR0911  (a shape each)
    """The values of a Literal or a list, through the module's names for them; None where any is taken."""
    if node is None or depth > 8:
        return None
    if isinstance(node, ast.Name):
        return (
            None
            if node.id in ("str", "int", "bool", "float", "Any")
            else choices_of(tree, assigned(tree, node.id), depth + 1)
        )
    if isinstance(node, ast.BinOp):
        # `Literal[...] | str` is checked at the start: the names that the engine knows are those of the Literal.
        plain = [side for side in (node.left, node.right) if not _is_none(side) and called_name(side) != "str"]
        sides = [choices_of(tree, side, depth + 1) for side in plain] or [None]
        return None if any(side is None for side in sides) else frozenset().union(*(s for s in sides if s))
    if isinstance(node, ast.Subscript) and called_name(node.value) in ("Optional", "Annotated", "A", "SkipValidation"):
        inner = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
        return choices_of(tree, inner, depth + 1)
    if isinstance(node, ast.Subscript) and called_name(node.value) in ("Literal", "Union"):
        node = node.slice if isinstance(node.slice, ast.Tuple) else ast.Tuple(elts=[node.slice])
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        result: set[str] = set()
        for part in node.elts:
            text = literal(part)
            inner_choices = frozenset([text]) if text is not None else choices_of(tree, part, depth + 1)
            if inner_choices is None and not isinstance(part, ast.Constant):
                return None
            result |= inner_choices or frozenset()
        return frozenset(result)
    return None


def called_name(node: ast.AST) -> str:
    """The last part of a name."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


# Flags ----------------------------------------------------------------------------------------------------------


def added(package: Package, path: str, functions: Iterable[ast.AST]) -> Iterator[Flag]:
    """Options that are added by their names in the source."""
    tree = package.tree(path)
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and called(node) == "add_argument":
                names = tuple(text for text in map(literal, node.args) if text and text.startswith("-"))
                if names:
                    yield Flag(names, choices_of(tree, keyword(node, "choices")), Found(path, node.lineno))


def vllm_cli(package: Package) -> str:
    return package.first(*(f"vllm/entrypoints/{place}/cli_args.py" for place in ("common", "launchers", "openai")))


def vllm_flags(package: Package) -> list[Flag]:
    """`vllm serve`: the fields of FrontendArgs, and what EngineArgs adds by name with a config's field for each."""
    path, engine = vllm_cli(package), "vllm/engine/arg_utils.py"
    flags = list(added(package, path, function_of(package, path, "make_arg_parser")))
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        for item in fields(class_of(package, path, name)):
            dashed = field_name(item).replace("_", "-")
            names = (f"--{dashed}",) + ((f"--no-{dashed}",) if ast.unparse(item.annotation) == "bool" else ())
            flags.append(Flag(names, choices_of(package.tree(path), item.annotation), Found(path, item.lineno)))
    for name in ("EngineArgs", "AsyncEngineArgs"):
        for function in function_of(package, engine, "add_cli_args"):
            if function in class_of(package, engine, name).body:
                configs = _config_names(function)
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and called(node) == "add_argument":
                        names = tuple(text for text in map(literal, node.args) if text)
                        choices = _config_choices(package, node, configs)
                        flags.append(Flag(names, choices, Found(engine, node.lineno)))
    return flags


def positional(package: Package, path: str, name: str) -> Found | None:
    """A positional argument of make_arg_parser whose name begins so."""
    for function in function_of(package, path, "make_arg_parser"):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and called(node) == "add_argument" and node.args:
                said = literal(node.args[0]) or ""
                if said.startswith(name):
                    return Found(path, node.lineno)
    return None


def _config_names(function: ast.FunctionDef) -> dict[str, str]:
    """cache_kwargs: CacheConfig, of cache_kwargs = get_kwargs(CacheConfig)."""
    return {
        node.targets[0].id: called_name(node.value.args[0])
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and called(node.value) == "get_kwargs"
        if isinstance(node.value, ast.Call)
    }


def _config_choices(package: Package, call: ast.Call, configs: dict[str, str]) -> frozenset[str] | None:
    """The choices of the config's field that **cache_kwargs["cache_dtype"] stands for."""
    for item in call.keywords:
        part = item.value
        if item.arg is None and isinstance(part, ast.Subscript) and called_name(part.value) in configs:
            return config_choices(package, configs[called_name(part.value)], literal(part.slice) or "")
    return None


def config_file(package: Package, name: str) -> str:
    for path in package.holding(f"class {name}:", f"class {name}(", under="vllm/config/"):
        return path
    raise Unreadable(f"vllm/config/ of {package} has no class {name}")


def config_choices(package: Package, config: str, name: str) -> frozenset[str] | None:
    path = config_file(package, config)
    for item in fields(class_of(package, path, config)):
        if field_name(item) == name:
            return choices_of(package.tree(path), item.annotation)
    return None


def sglang_flags(package: Package) -> list[Flag]:
    """ServerArgs: what it adds by name, and its annotated fields, which newer releases keep in files of their own."""
    path = "sglang/srt/server_args.py"
    flags = list(added(package, path, function_of(package, path, "add_cli_args")))
    classes = [(path, node) for node in package.tree(path).body if isinstance(node, ast.ClassDef)]
    for file in package.holding("_NS_PATH", under="sglang/srt/arg_groups/fields/"):
        classes += [(file, node) for node in package.tree(file).body if isinstance(node, ast.ClassDef)]
    for file, node in classes:
        if file == path and node.name != "ServerArgs":
            continue
        flags += [flag for item in fields(node) if (flag := _declared(package, file, item))]
    return flags


def _declared(package: Package, path: str, item: ast.AnnAssign) -> Flag | None:
    """The flag of a field `name: A[type, "help" or Arg(...)]`, as its own add_cli_args_from_dataclass makes it."""
    note = item.annotation
    if not (isinstance(note, ast.Subscript) and called_name(note.value) in ("A", "Annotated")):
        return None
    parts = note.slice.elts if isinstance(note.slice, ast.Tuple) else []
    arg = next((part for part in parts[1:] if called(part) == "Arg"), None)
    if arg is None and not any(literal(part) is not None or isinstance(part, ast.JoinedStr) for part in parts[1:]):
        return None
    name, others, choices = f"--{field_name(item).replace('_', '-')}", [], None
    tree = package.tree(path)
    if isinstance(arg, ast.Call):
        if ast.unparse(keyword(arg, "no_cli") or ast.Constant(False)) == "True":
            return None
        name = literal(keyword(arg, "cli_name")) or name
        others = strings(keyword(arg, "aliases"))
        choices = choices_of(tree, keyword(arg, "choices"))
    return Flag((name, *others), choices or choices_of(tree, parts[0]), Found(path, item.lineno))


class Refused(Exception):
    """argparse does not take it."""


class Strict(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


class Parser:
    """The flags as argparse takes them, abbreviations included."""

    def __init__(self, flags: Iterable[Flag]) -> None:
        self._parser = Strict(add_help=False, conflict_handler="resolve")
        self._by_dest: dict[str, Flag] = {}
        self.files: list[str] = []
        for number, flag in enumerate(flags):
            self._by_dest[f"flag{number}"] = flag
            if flag.where.path not in self.files:
                self.files.append(flag.where.path)
            self._parser.add_argument(*flag.names, dest=f"flag{number}", nargs="?", const="-")

    def flag(self, name: str) -> Flag | None:
        """What the engine takes this for; None where it does not take it."""
        try:
            seen, rest = self._parser.parse_known_args([name])
        except Refused:  # an abbreviation of several
            return None
        taken = [dest for dest, value in vars(seen).items() if value is not None]
        return self._by_dest[taken[0]] if taken and not rest else None


# Parsers of tool calls and of reasoning --------------------------------------------------------------------------


def keys_of(package: Package, path: str, name: str) -> frozenset[str]:
    """The names in a dictionary, list or tuple `name`, of a module or of a class."""
    for node in package.nodes(path):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and called_name(target or node) == name and node.value:
            value = node.value
            parts = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            names = frozenset(text for text in map(literal, parts) if text)
            if names:
                return names
    raise Unreadable(f"{path} of {package} has no {name}")


def vllm_parsers(package: Package) -> dict[str, tuple[str, frozenset[str]]]:
    tools, reasoning = "vllm/tool_parsers/__init__.py", "vllm/reasoning/__init__.py"
    return {
        "--tool-call-parser": (tools, keys_of(package, tools, "_TOOL_PARSERS_TO_REGISTER")),
        "--reasoning-parser": (reasoning, keys_of(package, reasoning, "_REASONING_PARSERS_TO_REGISTER")),
    }


def sglang_parsers(package: Package) -> dict[str, tuple[str, frozenset[str]]]:
    tools = "sglang/srt/function_call/function_call_parser.py"
    reasoning = "sglang/srt/parser/reasoning_parser.py"
    return {
        "--tool-call-parser": (tools, keys_of(package, tools, "ToolCallParserEnum")),
        "--reasoning-parser": (reasoning, keys_of(package, reasoning, "DetectorMap")),
    }


# Environment variables -------------------------------------------------------------------------------------------


def variable(package: Package, name: str) -> Found | None:
    """Where a variable is declared (vLLM's and SGLang's own lists) or read, or set for the image."""
    lists = {"vllm": "vllm/envs.py", "sglang": "sglang/srt/environ.py"}
    package.tree(lists[package.name])  # unreadable where it has gone
    for path in package.holding(name):
        for node in package.nodes(path):
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.Dict) and path == lists["vllm"] and name in map(literal, node.keys):
                return Found(path, next(key.lineno for key in node.keys if key and literal(key) == name))
            if isinstance(node, ast.Assign) and path == lists["sglang"] and called_name(node.targets[0]) == name:
                return Found(path, line)
            reads = isinstance(node, ast.Call) and re.search(r"^getenv$|^get$|_env", called(node))
            if reads and isinstance(node, ast.Call) and node.args and literal(node.args[0]) == name:
                return Found(path, line)
            if isinstance(node, ast.Subscript) and called_name(node.value) == "environ" and literal(node.slice) == name:
                return Found(path, line)
    for path, text in package.files.items():
        match = re.search(rf"^ENV {name}=", text, re.MULTILINE) if "Dockerfile" in path else None
        if match:
            return Found(path, text.count("\n", 0, match.start()) + 1)
    return None


# Metrics ---------------------------------------------------------------------------------------------------------


def metric(package: Package, name: str) -> Found | None:
    """Where a metric is made, with the labels of `name{label="value"}`. A counter's name is shown with `_total`."""
    name, _, selection = name.partition("{")
    labels = set(re.findall(r"(\w+)=", selection))
    for path in package.holding(name.removesuffix("_total")):
        for node in package.nodes(path):
            if not isinstance(node, ast.Call) or not re.search(r"gauge|counter|histogram|summary", called(node), re.I):
                continue
            made = literal(keyword(node, "name")) or (literal(node.args[0]) if node.args else None) or ""
            if "counter" in called(node).lower():
                made = f"{made.removesuffix('_total')}_total"
            if made == name and labels <= set(strings(keyword(node, "labelnames"))):
                return Found(path, node.lineno)
    return None


# HTTP paths ------------------------------------------------------------------------------------------------------


def http_paths(package: Package) -> dict[str, Found]:
    """Every path that is served, and where."""
    found: dict[str, Found] = {}
    for path in package.holding("@router.", "@app.", "Mount(", "add_api_route(", "add_route(", "APIRouter("):
        for node in package.nodes(path):
            if isinstance(node, ast.Call) and called(node) in VERBS and node.args:
                name = literal(node.args[0]) or ""
                if name.startswith("/"):
                    found.setdefault(name, Found(path, node.lineno))
    return found


# Log lines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line as the source would write it, with 7 for what it fills in."""

    text: str
    where: Found
    raised: bool = False  # an error's text


def log_lines(package: Package, words: Iterable[str]) -> list[Line]:
    """The log lines, progress bars and errors of the files that hold one of the words."""
    bars = _bar_formats(package)
    lines = []
    for path in package.holding(*words):
        if OTHER_DEVICES.search(path):
            continue
        texts = _texts(package.nodes(path))
        errors = {id(part) for node in package.nodes(path) if isinstance(node, ast.Raise) for part in ast.walk(node)}
        for node in package.nodes(path):
            if not isinstance(node, ast.Call):
                continue
            where = Found(path, node.lineno)
            if called(node) in BARS:
                told = node.args[0] if called(node) == "set_description" and node.args else keyword(node, "desc")
                form = keyword(node, "bar_format")
                bar = bars.get(called_name(form), BAR) if form is not None else BAR
                for desc in _said(told, texts):
                    text = bar.format(desc=desc, rate_fmt="2.00it/s", l_bar="", bar="###", r_bar="", **BAR_VALUES)
                    lines.append(Line(text.strip(), where))
            elif LOGGERS.search(called(node)) or id(node) in errors:
                said = [text for argument in node.args for text in _said(argument, texts)]
                lines += [Line(PLACEHOLDER.sub("7", text), where, id(node) in errors) for text in said]
    return lines


def _bar_formats(package: Package) -> dict[str, str]:
    """The engine's own bars, by their names."""
    found = {}
    for path in package.holding("BAR_FORMAT ="):
        for node in package.tree(path).body:
            text = literal(node.value) if isinstance(node, ast.Assign) else None
            if isinstance(node, ast.Assign) and text:
                found[called_name(node.targets[0])] = text
    return found


def _texts(nodes: list[ast.AST]) -> dict[str, list[ast.expr]]:
    """What the names of a file may stand for: what is assigned to them, or a parameter's default."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs = [
                *zip(positional[len(positional) - len(node.defaults) :], node.defaults),
                *zip(node.kwonlyargs, node.kw_defaults),
            ]
            for argument, default in pairs:
                if default is not None:
                    found.setdefault(argument.arg, []).append(default)
    return found


def _said(node: ast.expr | None, texts: dict[str, list[ast.expr]], depth: int = 0) -> list[str]:  # noqa: PLR0911  (a shape each)
    """The texts that an expression may be, with 7 for each value; empty where it is no text."""
    if node is None or depth > 3:
        return []
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [
            _said(part.value, texts, depth + 1) or ["7"]
            if isinstance(part, ast.FormattedValue)
            else [literal(part) or ""]
            for part in node.values
        ]
        return ["".join(words) for words in itertools.islice(itertools.product(*parts), MOST)]
    if isinstance(node, ast.Subscript):  # graph_backend[device]: any text of that dictionary
        return [text for value in texts.get(called_name(node.value), []) for text in strings(value)]
    if isinstance(node, ast.Name):
        return [text for value in texts.get(node.id, []) for text in _said(value, texts, depth + 1)]
    if isinstance(node, ast.IfExp):
        return _said(node.body, texts, depth + 1) + _said(node.orelse, texts, depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return [PLACEHOLDER.sub("7", text) for text in _said(node.left, texts, depth + 1)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        right = _said(node.right, texts, depth + 1) or ["7"]
        return [left + end for left in _said(node.left, texts, depth + 1) for end in right]
    if isinstance(node, ast.Call) and called(node) == "format" and isinstance(node.func, ast.Attribute):
        return [re.sub(r"{[^}]*}", "7", text) for text in _said(node.func.value, texts, depth + 1)]
    return []


# Benchmark client ------------------------------------------------------------------------------------------------


def benchmark_files(package: Package, words: list[str]) -> list[str]:
    """The files of the client that the words `vllm bench serve` or `python3 -m sglang...` start."""
    if package.name == "vllm":
        package.first(f"vllm/entrypoints/cli/benchmark/{words[2]}.py")
        client = package.first(f"vllm/benchmarks/{words[2]}.py")
        return [client, *package.holding("add_argument", under="vllm/benchmarks/datasets")]
    client = package.first(words[words.index("-m") + 1].replace(".", "/") + ".py")
    imports = [node.module for node in package.tree(client).body if isinstance(node, ast.ImportFrom) and node.module]
    behind = [f"{name.replace('.', '/')}.py" for name in imports if name.startswith("sglang.benchmark")]
    return [client, *(path for path in behind if path in package.files)]


def benchmark_flags(package: Package, files: list[str]) -> list[Flag]:
    return [flag for path in files for flag in added(package, path, [package.tree(path)])]


def result_field(package: Package, files: list[str], name: str) -> Found | None:
    """Where the client puts a figure into its result: by its name, or by a name that is made of the metric's."""
    for path in files:
        known = set(strings(package.tree(path)))
        for node in package.nodes(path):
            keys: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                keys = list(node.keys)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            for key in keys:
                if key is not None and literal(key) == name:
                    return Found(path, key.lineno)
                if isinstance(key, ast.JoinedStr):
                    form = "".join(re.escape(literal(part) or "") or "(.+)" for part in key.values)
                    match = re.fullmatch(form, name)
                    if match and any(part in known for part in match.groups()):
                        return Found(path, key.lineno)
    return None


def module_name(package: Package, path: str, name: str) -> Found | None:
    """Where a module's own name comes from: defined, assigned, annotated or imported there."""
    for node in package.tree(path).body:
        named = [getattr(node, "name", ""), called_name(getattr(node, "target", node))]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            named = [called_name(target) for target in node.targets]
        elif isinstance(node, ast.If):  # if TYPE_CHECKING: what a module's __getattr__ gives
            named = [called_name(part.target) for part in node.body if isinstance(part, ast.AnnAssign)]
        if name in named:
            return Found(path, node.lineno)
    return None


FLAGS: dict[str, Callable[[Package], list[Flag]]] = {"vllm": vllm_flags, "sglang": sglang_flags}
PARSERS: dict[str, Callable[[Package], dict[str, tuple[str, frozenset[str]]]]] = {
    "vllm": vllm_parsers,
    "sglang": sglang_parsers,
}
