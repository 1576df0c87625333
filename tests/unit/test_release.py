"""Filters of a release: flags, ids and plans."""

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.glm.fleet.plugins.filter import release

ENGINE: dict[str, Any] = {
    "name": "vllm",
    "images": {570: "vllm/vllm-openai:glm52-cu129", 580: "vllm/vllm-openai:glm52"},
    "flags": {
        "model": "--model",
        "served_model_names": "--served-model-name",
        "host": "--host",
        "port": "--port",
        "shutdown_timeout": "--shutdown-timeout",
    },
    "listed_names": "all",
    "context": {
        "flag": "--max-model-len",
        "longer_env": "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        "even_blocks": {"size": 64, "fixed_in": "0.27"},
    },
    "refused_flags": {"--enable-open-door": "anybody comes in"},
    "refused_env": {"OPEN_DOOR": "anybody comes in"},
    "releases": {"first": "0.23", "last": "0.33"},
    "loaders": {"default": {}, "fast": {"--load-format": "fast", "--kv-cache-dtype": "bf16"}},
    "host_cache": {"flag": "--kv-offloading-size", "of": "node", "switch": ""},
    "cuda_compat_env": {"OWN_CUDA": "1"},
    "reserved": {"--port": "glm_engine_port"},
    "aliases": {"--tp": "--tensor-parallel-size", "-tp": "--tensor-parallel-size"},
    "repeated_flags": ["--middleware"],
}
PROFILE: dict[str, Any] = {
    "flags": {"--tensor-parallel-size": 8, "--trust-remote-code": True, "--kv-cache-dtype": "fp8"}
}


def settings(names: tuple[str, ...] = ("glm",), **changes: Any) -> dict[str, Any]:
    return {
        "model": "/models/m",
        "served_model_names": list(names),
        "host": "127.0.0.1",
        "port": 8001,
        "shutdown_timeout": 120,
        "extra_args": {},
        "extra_env": {},
        **changes,
    }


def flags(**changes: Any) -> list[str]:
    return release.engine_flags(ENGINE, PROFILE, settings(**changes))[10:]


def problems(**changes: Any) -> list[str]:
    return release.engine_problems(ENGINE, PROFILE, settings(**changes))


def test_flags_in_order() -> None:
    assert release.engine_flags(ENGINE, PROFILE, settings(names=("a", "b"))) == [
        "--model",
        "/models/m",
        "--served-model-name",
        "a",
        "b",
        "--host",
        "127.0.0.1",
        "--port",
        "8001",
        "--shutdown-timeout",
        "120",
        "--tensor-parallel-size",
        "8",
        "--trust-remote-code",
        "--kv-cache-dtype",
        "fp8",
    ]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            {"--kv-cache-dtype": "fp8_e4m3"},
            ["--tensor-parallel-size", "8", "--trust-remote-code", "--kv-cache-dtype", "fp8_e4m3"],
        ),
        (
            {"--kv_cache_dtype": "fp8_e4m3"},
            ["--tensor-parallel-size", "8", "--trust-remote-code", "--kv_cache_dtype", "fp8_e4m3"],
        ),
        ({"-tp": 4}, ["-tp", "4", "--trust-remote-code", "--kv-cache-dtype", "fp8"]),
        ({"--trust-remote-code": False}, ["--tensor-parallel-size", "8", "--kv-cache-dtype", "fp8"]),
    ],
)
def test_extra_flags_take_the_place_of_the_profiles(extra: dict[str, Any], expected: list[str]) -> None:
    assert flags(extra_args=extra) == expected


def test_kinds_of_values() -> None:
    extra = {
        "--middleware": ["a", "b"],
        "--allowed-origins": ["x", "y"],
        "--hf-overrides": {"b": 1, "a": [True]},
        "--gpu-memory-utilization": 0.9,
    }
    assert flags(extra_args=extra)[5:] == [
        "--middleware",
        "a",
        "--middleware",
        "b",
        "--allowed-origins",
        "x",
        "y",
        "--hf-overrides",
        '{"a": [true], "b": 1}',
        "--gpu-memory-utilization",
        "0.9",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"extra_args": {"--tp": 8, "--tensor-parallel-size": 8}},
            "glm_engine_extra_args: --tp and --tensor-parallel-size are the same flag: keep one of them",
        ),
        (
            {"extra_args": {"--max_model_len": 128, "--max-model-len": 128}},
            "glm_engine_extra_args: --max_model_len and --max-model-len are the same flag: keep one of them",
        ),
        ({"extra_args": {"--port": 1}}, "glm_engine_extra_args: --port is not for here: set glm_engine_port"),
        (
            {"extra_args": {"--por": 1}},
            "glm_engine_extra_args: --por, short for --port, is not for here: set glm_engine_port",
        ),
        (
            {"extra_args": {"max-model-len": 1}},
            "glm_engine_extra_args: 'max-model-len' is not a flag: write it as --name",
        ),
        ({"names": ()}, "glm_served_model_name: there is no name: set one that clients ask for"),
        ({"names": ("a", " ")}, "glm_served_model_name: ' ' is no name: remove it, or write a text"),
        ({"names": ("a", 5)}, "glm_served_model_name: 5 is no name: remove it, or write a text"),
        ({"names": ("a", "b", "a")}, "glm_served_model_name: a is there twice: keep one of them"),
        ({"extra_env": {"A-B": "1"}}, "glm_engine_extra_env: 'A-B' is not a name of an environment variable"),
        (
            {"extra_env": {"A": "1\n2"}},
            "glm_engine_extra_env: the value of A holds a line break, which an environment file cannot",
        ),
        (
            {"extra_args": {"--enable_open_door": True}},
            "glm_engine_extra_args: --enable-open-door is refused: anybody comes in: remove it",
        ),
        (
            {"extra_args": {"--enable_open": True}},
            "glm_engine_extra_args: --enable-open, short for --enable-open-door, is refused: anybody comes in: "
            "remove it",
        ),
        (
            {"extra_env": {"OPEN_DOOR": True}},
            "glm_engine_extra_env: OPEN_DOOR is refused: anybody comes in: remove it",
        ),
        *(
            (
                {"extra_env": {"OPEN_DOOR": value}},
                "glm_engine_extra_env: OPEN_DOOR is refused: anybody comes in: remove it",
            )
            for value in (" 1", 1, "2", "True ", "yes")
        ),
        (
            {"extra_args": {"--max-model-len": 200_000}},
            "glm_engine_extra_args: --max-model-len 200000 is an odd number of blocks of 64 tokens (3125), under which "
            "vllm before 0.27 dies: set 200064",
        ),
        (
            {"extra_args": {"--max-model-len": "131k"}, "image": "vllm/vllm-openai:v0.26.0"},
            "glm_engine_extra_args: --max-model-len 131k is an odd number of blocks of 64 tokens (2047), under which "
            "vllm before 0.27 dies: set 131072",
        ),
        (
            {"weights_loader": "slow"},
            "glm_weights_loader: vllm has no loader slow: set one of default, fast",
        ),
    ],
)
def test_refusals_are_one_line(changes: dict[str, Any], message: str) -> None:
    assert problems(**changes) == [message]
    with pytest.raises(AnsibleFilterError, match="^" + message.partition(":")[0]):
        flags(**changes)


def test_one_line_a_flag_quoted_for_a_shell() -> None:
    words = [
        "--model",
        "/models/m",
        "--trust-remote-code",
        "--names",
        "a",
        "b c",
        "--json",
        '{"a": -1}',
        "--seed",
        "-1",
    ]
    assert release.command_lines(words) == [
        "--model /models/m",
        "--trust-remote-code",
        "--names a 'b c'",
        """--json '{"a": -1}'""",
        "--seed -1",
    ]


@pytest.mark.parametrize(
    ("branch", "image"), [(570, "glm52-cu129"), ("575", "glm52-cu129"), (580, "glm52"), (595, "glm52")]
)
def test_image_by_driver(branch: int, image: str) -> None:
    assert release.engine_image(ENGINE, branch) == f"vllm/vllm-openai:{image}"


def test_image_of_a_driver_that_is_too_old() -> None:
    with pytest.raises(AnsibleFilterError, match="no image for driver 535: it needs 570 or newer"):
        release.engine_image(ENGINE, 535)


PARTS = {"image_digest": "sha256:1", "weights_sha256": "2", "run": "exec docker run", "env": "A=1"}


def test_an_id_is_stable_and_follows_every_part() -> None:
    known = release.release_id(PARTS)
    assert known == "32e68b5073fa"
    assert release.release_id(dict(reversed(PARTS.items()))) == known
    others = {release.release_id({**PARTS, name: part + "x"}) for name, part in PARTS.items()}
    assert len(others | {known}) == 5


def test_an_id_needs_every_part() -> None:
    with pytest.raises(AnsibleFilterError, match="needs its weights_sha256"):
        release.release_id({**PARTS, "weights_sha256": ""})


def node(
    current: str | None,
    previous: str | None = None,
    active: str = "active",
    state: tuple[str, str, str | None] | None = None,
) -> dict[str, Any]:
    return {
        "release": {"current": current, "previous": previous, "ids": ["new", "old", "older"]},
        "units": {release.UNIT: {"active": active}},
        "state": dict(zip(("phase", "release", "previous"), state)) if state else None,
    }


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        # action, verified, fallback, previous, earlier, noted
        (node(None, active="inactive"), ("switch", "", "", "", "", False)),
        (node("new", "old", state=("serving", "new", "old")), ("none", "new", "", "old", "old", True)),
        (node("new", "old", "failed", ("serving", "new", "old")), ("start", "new", "", "old", "old", False)),
        (node("old", "older", state=("serving", "old", "older")), ("switch", "old", "old", "old", "older", False)),
        # cut off on the way to it
        (node("old", "older", state=("stopping", "new", "old")), ("switch", "old", "old", "old", "older", False)),
        (node("new", "old", "activating", ("starting", "new", "old")), ("start", "old", "old", "old", "", False)),
        (node("new", "old", state=("verifying", "new", "old")), ("none", "old", "old", "old", "", False)),
        # cut off on the way to another one, which never was verified
        (node("older", "old", state=("starting", "older", "old")), ("switch", "old", "old", "old", "", False)),
        # failed before, with nothing to go back to
        (node(None, active="inactive", state=("failed", "new", None)), ("switch", "", "", "", "", False)),
        # verified once, failed later, and runs
        (node("new", "old", state=("failed", "new", "new")), ("none", "new", "", "old", "old", False)),
        # what was verified is gone
        (node("gone", state=("serving", "gone", None)), ("switch", "gone", "", "", "", False)),
        # the state file was lost
        (node("old", "older"), ("switch", "old", "old", "old", "older", False)),
        (node("new", "old"), ("none", "new", "", "old", "old", False)),
    ],
)
def test_plan(situation: dict[str, Any], expected: tuple[Any, ...]) -> None:
    plan = release.release_plan(situation, "new")
    assert tuple(plan[key] for key in ("action", "verified", "fallback", "previous", "earlier", "noted")) == expected


def test_plan_of_a_node_of_which_nothing_is_known() -> None:
    assert release.release_plan({"release": None, "units": {}, "state": None}, "new")["action"] == "switch"


def test_links() -> None:
    assert release.release_links({"current": "new", "previous": ""}, "/opt/glm") == [
        {"path": "/opt/glm/current", "target": "releases/new"}
    ]


LONG = {"--max-model-len": 2_000_000}


@pytest.mark.parametrize(
    ("profile", "args", "env", "model", "where"),
    [
        ({}, {}, {}, 1_048_576, None),
        (LONG, {}, {}, 1_048_576, "the profile"),
        (LONG, {}, {}, None, None),
        (LONG, {"--max_model_len": 131_000}, {}, 1_048_576, None),
        ({}, {"--max_model_len": "2M"}, {}, 1_048_576, "glm_engine_extra_args"),
        ({}, {"--max-model-len": 1_048_576}, {}, 1_048_576, None),
        ({}, {"--max-model-len": "auto"}, {}, 1_048_576, None),
        (LONG, {}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": 1}, 1_048_576, None),
        (LONG, {}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": 0}, 1_048_576, "the profile"),
    ],
)
def test_a_context_beyond_the_models(
    profile: dict[str, Any], args: dict[str, Any], env: dict[str, Any], model: int | None, where: str | None
) -> None:
    settings = {"extra_args": args, "extra_env": env}
    findings = release.context_findings(ENGINE, {"flags": profile}, settings, model)
    assert [finding["line"].split(" asks ")[0] for finding in findings] == (
        [f"context_length: {where}"] if where else []
    )
    assert all("--max-model-len" in finding["line"] for finding in findings)


@pytest.mark.parametrize(
    ("text", "number"),
    [("131072", 131072), (7, 7), ("128k", 128_000), ("128K", 131_072), ("1.5m", 1_500_000), ("-1", None), (None, None)],
)
def test_tokens(text: Any, number: int | None) -> None:
    assert release.tokens(text) == number


def test_listed_names() -> None:
    assert release.listed_names(["a", "b"], {"listed_names": "all"}) == ["a", "b"]
    assert release.listed_names(["a", "b"], {"listed_names": "first"}) == ["a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_args": {"--max-model-len": 131_072}},
        {"extra_args": {"--max-model-len": 1_048_576}},
        {"extra_args": {"--max-model-len": 200_000}, "image": "vllm/vllm-openai:v0.33.0"},
        {"extra_args": {"--enable-open-door": False}},
        {"extra_args": {"--enable-open": False}},
        {"extra_args": {"--enable-open-door-mat": True}},
        *({"extra_env": {"OPEN_DOOR": value}} for value in ("0", 0, False, " False", "", None)),
        {"weights_loader": "fast"},
    ],
)
def test_what_is_not_refused(changes: dict[str, Any]) -> None:
    assert problems(**changes) == []


def test_what_a_profile_opens_is_refused_there_and_a_user_may_close_it() -> None:
    line = "the profile: {} is refused: anybody comes in: remove it"
    profile = {"flags": {"--enable-open-door": True}, "env": {"OPEN_DOOR": "1"}}
    wanted = [line.format("--enable-open-door"), line.format("OPEN_DOOR")]
    assert release.engine_problems(ENGINE, profile, settings()) == wanted
    closed = settings(extra_args={"--enable-open-door": False}, extra_env={"OPEN_DOOR": "0"})
    assert release.engine_problems(ENGINE, profile, closed) == []


def test_the_model_is_positional_where_its_flag_is_deprecated() -> None:
    engine = {**ENGINE, "flags": {**ENGINE["flags"], "model": ""}}
    assert release.engine_flags(engine, PROFILE, settings())[:3] == ["/models/m", "--served-model-name", "glm"]


def test_a_loader_adds_its_flags_and_a_user_has_the_last_word() -> None:
    line = " ".join(flags(weights_loader="fast", extra_args={"--load-format": "auto"}))
    assert line == "--tensor-parallel-size 8 --trust-remote-code --kv-cache-dtype bf16 --load-format auto"


@pytest.mark.parametrize(
    ("value", "of", "memory", "line"),
    [
        (None, "node", 1, None),
        (False, "node", 1, None),
        (1024, "node", 2900, None),
        (128, "gpu", 2900, None),
        (
            1024,
            "node",
            512,
            "host_cache: glm_engine_extra_args wants more KV cache in the node's memory than half of it (found "
            "--kv-offloading-size 1024 GiB, wanted at most 256 GiB in all): set --kv-offloading-size: 256 in "
            "glm_engine_extra_args, or false to keep none there",
        ),
        (
            128,
            "gpu",
            512,
            "host_cache: glm_engine_extra_args wants more KV cache in the node's memory than half of it (found "
            "--kv-offloading-size 128 GiB for each of 8 GPUs, wanted at most 256 GiB in all): set "
            "--kv-offloading-size: 32 in glm_engine_extra_args, or false to keep none there",
        ),
    ],
)
def test_kv_cache_in_the_nodes_memory(value: Any, of: str, memory: int, line: str | None) -> None:
    engine = {**ENGINE, "host_cache": {**ENGINE["host_cache"], "of": of}}
    chosen = {"extra_args": {"--kv-offloading-size": value}}
    found = release.host_cache_findings(engine, PROFILE, chosen, memory * 1024**3, 8)
    assert [finding["line"] for finding in found] == ([line] if line else [])


@pytest.mark.parametrize(
    ("extra", "limited"),
    [
        ({"--cache-on": True}, False),
        ({"--cache-on": True, "--kv-offloading-size": 0}, False),
        ({"--cache-on": True, "--kv-offloading-size": False}, False),
        ({"--cache-on": True, "--kv-offloading-size": 32}, True),
        ({"--cache-on": False}, True),
        ({}, True),
    ],
)
def test_kv_cache_in_the_nodes_memory_has_a_limit(extra: dict[str, Any], limited: bool) -> None:
    engine = {**ENGINE, "host_cache": {"flag": "--kv-offloading-size", "of": "gpu", "switch": "--cache-on"}}
    found = release.host_cache_findings(engine, PROFILE, {"extra_args": extra}, 512 * 1024**3, 8)
    line = (
        "host_cache: glm_engine_extra_args wants KV cache in the node's memory without a limit (found --cache-on "
        "without --kv-offloading-size, wanted at most 256 GiB in all): set --kv-offloading-size: 32 in "
        "glm_engine_extra_args, or --cache-on: false to keep none there"
    )
    assert [finding["line"] for finding in found] == ([] if limited else [line])


@pytest.mark.parametrize(
    ("cuda", "branch", "needed"),
    [
        ("13.0.1", 570, True),
        ("13.0.1", "580", False),
        ("12.9", 570, False),
        ("12.9", 580, False),
        ("14.0", 580, True),
        (None, 570, True),
        ("", 580, False),
    ],
)
def test_an_images_own_cuda_is_for_an_older_driver_alone(cuda: str | None, branch: Any, needed: bool) -> None:
    assert release.cuda_compat_env(ENGINE, cuda, branch) == ({"OWN_CUDA": "1"} if needed else {})


@pytest.mark.parametrize(
    ("image", "known"),
    [
        ("vllm/vllm-openai:glm52-cu129", True),
        ("vllm/vllm-openai@sha256:" + "1" * 64, True),
        ("registry:5000/vllm/vllm-openai:v0.33.2-cu130", True),
        ("vllm/vllm-openai:v0.23.0", True),
        ("vllm/vllm-openai:v0.34.0", False),
        ("registry:5000/vllm/vllm-openai:v0.22.1@sha256:" + "1" * 64, False),
    ],
)
def test_a_release_that_was_not_read_is_warned_of(image: str, known: bool) -> None:
    assert [finding["id"] for finding in release.release_findings(ENGINE, image)] == [] if known else ["engine_release"]
