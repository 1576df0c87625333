"""Filters that make a release: what is wrong with its settings, its command line, its id, and what a node needs."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ansible.errors import AnsibleFilterError

# Ansible loads a filter by its file and puts no folder of a project's own on the path.
from ansible_collections.glm.fleet.plugins.plugin_utils.findings import FIRST_BRANCH_OF_CUDA, GIB, Finding, versions

UNIT = "glm-engine.service"
Flags = list[list[str]]  # one list of words a flag


def engine_image(engine: Mapping[str, Any], driver_branch: int | str) -> str:
    """The image for a driver branch: that of the newest branch not above it."""
    images = {int(branch): str(image) for branch, image in engine["images"].items()}
    fitting = [branch for branch in images if branch <= int(driver_branch)]
    if not fitting:
        raise AnsibleFilterError(
            f"{engine['name']} has no image for driver {driver_branch}: it needs {min(images)} or newer"
        )
    return images[max(fitting)]


def cuda_compat_env(engine: Mapping[str, Any], cuda: str | None, driver_branch: int | str) -> dict[str, str]:
    """What an image needs to run on its own CUDA libraries, where its CUDA is too new for the driver branch.

    In front of a driver that is new enough these libraries would be the older ones, with which CUDA does not start. An
    image that does not say its CUDA counts as one for the newest that is known.
    """
    major = versions(cuda)[0] if cuda else max(FIRST_BRANCH_OF_CUDA)
    fits = major in FIRST_BRANCH_OF_CUDA and FIRST_BRANCH_OF_CUDA[major] <= int(driver_branch)
    return {} if fits else dict(engine["cuda_compat_env"])


def context_findings(
    engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any], model_length: int | None
) -> list[dict[str, str]]:
    """Whether the engine is asked for a longer context than the model's. `settings` is as for engine_flags."""
    flag, variable = engine["context"]["flag"], engine["context"]["longer_env"]
    value, where = _chosen(engine, profile, settings, flag)
    length = tokens(value)
    environment = {**(profile.get("env") or {}), **(settings.get("extra_env") or {})}
    allowed = str(environment.get(variable, "")).lower() in ("1", "true")
    if not length or not model_length or length <= model_length or allowed:
        return []
    return [
        Finding(
            "context_length",
            f"{where} asks for more context than the model has (found {flag} {length}, wanted at most {model_length})",
            f"set {flag} in glm_engine_extra_args, or {variable}=1 in glm_engine_extra_env to try it nevertheless",
        ).as_dict()
    ]


def host_cache_findings(
    engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any], memory: int, gpus: int
) -> list[dict[str, str]]:
    """Whether the KV cache in the node's memory leaves half of it to the rest, such as the weights' page cache."""
    flag, parts = engine["host_cache"]["flag"], gpus if engine["host_cache"]["of"] == "gpu" else 1
    value, where = _chosen(engine, profile, settings, flag)
    most = memory // 2 // GIB
    size = re.fullmatch(r"\d+(\.\d+)?", str(value))  # the engine's own parser refuses anything else
    switch = engine["host_cache"]["switch"]
    on, switched = _chosen(engine, profile, settings, switch) if switch else (None, "")
    if on not in (None, False) and not (size and float(size[0])):
        return [
            Finding(
                "host_cache",
                f"{switched} wants KV cache in the node's memory without a limit (found {switch} without {flag}, "
                f"wanted at most {most} GiB in all)",
                f"set {flag}: {most // parts} in glm_engine_extra_args, or {switch}: false to keep none there",
            ).as_dict()
        ]
    if not size or float(size[0]) * parts <= most:
        return []
    each = f"{value} GiB" + (f" for each of {parts} GPUs" if parts > 1 else "")
    return [
        Finding(
            "host_cache",
            f"{where} wants more KV cache in the node's memory than half of it (found {flag} {each}, wanted at most "
            f"{most} GiB in all)",
            f"set {flag}: {most // parts} in glm_engine_extra_args, or false to keep none there",
        ).as_dict()
    ]


def release_findings(engine: Mapping[str, Any], reference: str) -> list[dict[str, str]]:
    """Whether the image's tag names a release that the engine's file was not written from."""
    version, known = image_version(reference), engine["releases"]
    first, last = versions(known["first"]), versions(known["last"])
    if not version or (first <= version and version[: len(last)] <= last):
        return []
    return [
        Finding(
            "engine_release",
            f"engines/{engine['name']}.yml was not written from this release of the engine (found {reference}, wanted "
            f"{known['first']} to {known['last']})",
            "try it on one node first: its flags, metrics and log may differ",
        ).as_dict()
    ]


def tokens(value: Any) -> int | None:
    """A number of tokens as the engines read it, such as 131072, 128k (thousands) or 128K (1024); else None."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", str(value).strip())
    if not match:
        return None
    factor = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    return int(float(match[1]) * factor.get(match[2], 1))


def listed_names(names: Sequence[str], engine: Mapping[str, Any]) -> list[str]:
    """Those of the served names that the engine is started with and lists."""
    return list(names[:1] if engine["listed_names"] == "first" else names)


def shown_metrics(engine: Mapping[str, Any]) -> list[str]:
    """The names of the metrics that the engine shows from its start on, without the labels of a selection."""
    late = ("path", *engine["late_metrics"])
    values = [value for key, value in engine["metrics"].items() if key not in late]
    names = [name for value in values for name in ([value] if isinstance(value, str) else value)]
    return [name.partition("{")[0] for name in names]


def engine_problems(engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the flags and the environment, one line each. `settings` is as for engine_flags."""
    names = list(settings.get("served_model_names") or [])
    extra_env = settings.get("extra_env") or {}
    return (
        _flag_problems(engine, profile.get("flags") or {}, "the profile")
        + _flag_problems(engine, settings.get("extra_args") or {}, "glm_engine_extra_args")
        + _missing_flags(engine, profile, settings)
        + _refused(engine, profile, settings)
        + _odd_window(engine, profile, settings)
        + _loader_problems(engine, settings)
        + _name_problems(names)
        + [
            f"glm_engine_extra_env: {name!r} is not a name of an environment variable"
            for name in extra_env
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name))
        ]
        + [
            f"glm_engine_extra_env: the value of {name} holds a line break, which an environment file cannot"
            for name, value in extra_env.items()
            if "\n" in str(value)
        ]
    )


def engine_flags(engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The engine's arguments, in order.

    `settings` holds model, served_model_names, host, port, shutdown_timeout, weights_loader and extra_args, whose flags
    replace the profile's or are added; false takes one away.
    """
    return [word for words in _flags(engine, profile, settings) for word in words]


def command_lines(arguments: list[str]) -> list[str]:
    """Arguments quoted for a shell, one line a flag with its values."""
    lines: Flags = []
    for word in map(str, arguments):
        if lines and not re.match(r"--?[A-Za-z]", word) and lines[-1][0].startswith("-"):
            lines[-1].append(word)
        else:
            lines.append([word])
    return [shlex.join(words) for words in lines]


def release_id(parts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for everything a node serves from."""
    for name in ("image_digest", "weights_sha256", "run", "env"):
        if not str(parts.get(name) or "").strip():
            raise AnsibleFilterError(f"a release needs its {name}")
    canonical = json.dumps({str(name): str(part) for name, part in parts.items()}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def paths_under(names: list[str], directory: str) -> list[dict[str, str]]:
    """Directories as file_set takes them."""
    return [{"path": f"{directory}/{name}"} for name in names]


def release_links(releases: Mapping[str, str], directory: str) -> list[dict[str, str]]:
    """Links to releases as file_set takes them; a name without a release is left out."""
    chosen = {name: release for name, release in releases.items() if release}
    return [{"path": f"{directory}/{name}", "target": f"releases/{release}"} for name, release in chosen.items()]


def release_plan(node: Mapping[str, Any], release: str) -> dict[str, Any]:
    """What brings a node to a release, from its node_info.

    action: none, start (the links are right, the engine is down) or switch.
    verified: the last release that was verified here.
    fallback: the same, where a failure of `release` can go back to it, else empty.
    current: what the node points to now.
    previous, earlier: what it shall name as previous once `release` serves, or once the fallback serves again.
    noted: the state file says already that `release` serves.
    """
    links: Mapping[str, Any] = node.get("release") or {}
    state: Mapping[str, Any] = node.get("state") or {}
    unit: Mapping[str, Any] = (node.get("units") or {}).get(UNIT) or {}
    current, previous = str(links.get("current") or ""), str(links.get("previous") or "")
    if not state:
        verified = current
    elif state.get("phase") == "serving":
        verified = str(state.get("release") or "")
    else:  # an earlier run failed, or was cut off, on its way to state.release
        verified = str(state.get("previous") or "")
    fallback = verified if verified != release and verified in (links.get("ids") or []) else ""
    at_release = "none" if unit.get("active") == "active" else "start"
    action = at_release if current == release else "switch"
    return {
        "action": action,
        "verified": verified,
        "fallback": fallback,
        "current": current,
        "previous": fallback or (previous if previous != release else ""),
        "earlier": previous if previous not in (release, fallback) else "",
        "noted": action == "none" and state.get("phase") == "serving" and state.get("release") == release,
    }


def _flags(engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]) -> Flags:
    problems = engine_problems(engine, profile, settings)
    if problems:
        raise AnsibleFilterError("; ".join(problems))
    names = engine["flags"]
    model = [names["model"], settings["model"]] if names["model"] else [settings["model"]]
    own = {
        names["served_model_names"]: listed_names(settings["served_model_names"], engine),
        names["host"]: settings["host"],
        names["port"]: settings["port"],
    }
    if names.get("shutdown_timeout"):
        own[names["shutdown_timeout"]] = settings["shutdown_timeout"]
    chosen = {
        _canonical(engine, flag): (flag, value)
        for part in _parts(engine, profile, settings).values()
        for flag, value in part.items()
    }
    repeated = engine.get("repeated_flags") or []
    flags = [*own.items(), *chosen.values()]
    return [model, *(words for flag, value in flags for words in _words(str(flag), value, repeated))]


def _parts(
    engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The flags by where they are from; later ones win."""
    return {
        "the profile": profile.get("flags") or {},
        "glm_weights_loader": (engine.get("loaders") or {}).get(settings.get("weights_loader"), {}),
        "glm_engine_extra_args": settings.get("extra_args") or {},
    }


def _chosen(
    engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any], flag: str
) -> tuple[Any, str]:
    """A flag's value, and where it is from."""
    value, where = None, "the profile"
    for source, part in _parts(engine, profile, settings).items():
        for name, given in part.items():
            if _canonical(engine, name) == flag:
                value, where = given, source
    return value, where


def _words(flag: str, value: Any, repeated: list[str]) -> Flags:
    if value is None or value is False:
        return []
    if value is True:
        return [[flag]]
    if isinstance(value, Mapping):
        return [[flag, json.dumps(_plain(value), sort_keys=True)]]
    if isinstance(value, (list, tuple)):
        values = [str(item) for item in value]
        return [[flag, item] for item in values] if flag in repeated else [[flag, *values]]
    return [[flag, str(value)]]


def _plain(value: Any) -> Any:
    """Ansible's own string and mapping types made plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _canonical(engine: Mapping[str, Any], flag: str) -> str:
    """One spelling for each flag: the engines read --max_model_len as --max-model-len."""
    name, dot, rest = str(flag).partition(".")
    name = name if not name.startswith("--") else "--" + name[2:].replace("_", "-")
    aliases: Mapping[str, str] = engine.get("aliases") or {}
    return f"{aliases.get(name, name)}{dot}{rest}"


def _means(flag: str, name: str) -> bool:
    """Whether an engine may take a flag for the one of this name: argparse knows one by its beginning, too."""
    return flag == name or (flag.startswith("--") and name.startswith(flag))


def _flag_problems(engine: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> list[str]:
    reserved: Mapping[str, str] = engine.get("reserved") or {}
    seen: dict[str, str] = {}
    problems = []
    for flag in map(str, flags):
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*", flag):
            problems.append(f"{where}: {flag!r} is not a flag: write it as --name")
            continue
        canonical = _canonical(engine, flag)
        for name in filter(partial(_means, canonical), reserved):
            shown = flag if canonical == name else f"{flag}, short for {name},"
            problems.append(f"{where}: {shown} is not for here: set {reserved[name]}")
        if canonical in seen:
            problems.append(f"{where}: {seen[canonical]} and {flag} are the same flag: keep one of them")
        seen[canonical] = flag
    return problems


def _missing_flags(engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Flags that the deployment needs and that the profile lacks, or that a user has taken away."""
    problems = []
    for flag, reason in (engine.get("required_flags") or {}).items():
        value, where = _chosen(engine, profile, settings, flag)
        if value in (None, False):
            problems.append(f"{where}: {engine['name']} needs {flag}: {reason}: set it to true")
    return problems


def _refused(engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What would hand the node to whoever may send a request."""
    problems = []
    given = {_canonical(engine, flag) for part in _parts(engine, profile, settings).values() for flag in part}
    for name, reason in (engine.get("refused_flags") or {}).items():
        for flag in sorted(flag for flag in given if _means(flag, name)):
            value, where = _chosen(engine, profile, settings, flag)
            if value not in (None, False):
                shown = flag if flag == name else f"{flag}, short for {name},"
                problems.append(f"{where}: {shown} is refused: {reason}: remove it")
    sources = {"glm_engine_extra_env": settings.get("extra_env") or {}, "the profile": profile.get("env") or {}}
    for name, reason in (engine.get("refused_env") or {}).items():
        where, value = next(((where, part[name]) for where, part in sources.items() if name in part), ("", None))
        # The engines strip it, and each has its own words for yes.
        if value is not None and str(value).strip().lower() not in ("", "0", "false"):
            problems.append(f"{where}: {name} is refused: {reason}: remove it")
    return problems


def _odd_window(engine: Mapping[str, Any], profile: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    rule = engine["context"].get("even_blocks")
    value, where = _chosen(engine, profile, settings, engine["context"]["flag"])
    length, version = tokens(value), image_version(settings.get("image") or "")
    if not rule or not length or (version and version >= versions(rule["fixed_in"])):
        return []
    blocks = -(-length // rule["size"])
    if blocks % 2 == 0:
        return []
    return [
        f"{where}: {engine['context']['flag']} {value} is an odd number of blocks of {rule['size']} tokens ({blocks}), "
        f"under which {engine['name']} before {rule['fixed_in']} dies: set {(blocks + 1) * rule['size']}"
    ]


def _loader_problems(engine: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    loader, known = settings.get("weights_loader"), engine.get("loaders") or {}
    if loader is None or loader in known:
        return []
    return [f"glm_weights_loader: {engine['name']} has no loader {loader}: set one of {', '.join(sorted(known))}"]


def image_version(reference: str) -> tuple[int, ...]:
    """The release that an image's tag names, such as (0, 33, 0); empty where it names none."""
    match = re.search(r":v?(\d+(?:\.\d+)+)[^:/@]*(?:@.*)?$", reference)
    return versions(match[1]) if match else ()


def _name_problems(names: list[Any]) -> list[str]:
    if not names:
        return ["glm_served_model_name: there is no name: set one that clients ask for"]
    unfit = [name for name in names if not isinstance(name, str) or not name.strip()]
    twice = sorted({name for name in names if isinstance(name, str) and name.strip() and names.count(name) > 1})
    return [f"glm_served_model_name: {name!r} is no name: remove it, or write a text" for name in unfit] + [
        f"glm_served_model_name: {name} is there twice: keep one of them" for name in twice
    ]


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        return {
            "command_lines": command_lines,
            "context_findings": context_findings,
            "cuda_compat_env": cuda_compat_env,
            "engine_flags": engine_flags,
            "engine_image": engine_image,
            "engine_problems": engine_problems,
            "host_cache_findings": host_cache_findings,
            "listed_names": listed_names,
            "paths_under": paths_under,
            "release_findings": release_findings,
            "release_id": release_id,
            "release_links": release_links,
            "release_plan": release_plan,
            "shown_metrics": shown_metrics,
        }
