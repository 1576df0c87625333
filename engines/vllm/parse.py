"""Reads its arguments as `vllm serve` would: exit status 2, and argparse's own words, where it does not take them.

Runs within the image; it needs no GPU. Exit status 3: nothing can be told, this release has its parser elsewhere.
"""

import importlib
import sys

# Where each thing is, newest release first: 0.33, 0.32, before. tests/upstream looks it up in the releases' source.
PLACES = {
    "make_arg_parser": (
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "validate_parsed_serve_args": (
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "FlexibleArgumentParser": ("vllm.utils.argparse_utils",),
    "ToolParserManager": ("vllm.tool_parsers",),
    "ReasoningParserManager": ("vllm.reasoning",),
    "current_platform": ("vllm.platforms",),
}


def take(name):
    for module in PLACES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as problem:
            if not module.startswith(str(problem.name)):  # it is there, and something that it needs is not
                raise
    raise ImportError(f"this release of vLLM has no {' and no '.join(PLACES[name])}")


def check_names(parser, arguments):
    """The server looks at the names of the parsers only when the model is loaded."""
    for option, manager, plugin in (
        ("tool_call_parser", "ToolParserManager", "tool_parser_plugin"),
        ("reasoning_parser", "ReasoningParserManager", "reasoning_parser_plugin"),
    ):
        name = getattr(arguments, option, None)
        if name and not getattr(arguments, plugin, None):  # a plugin's names are known once it has run
            known = take(manager).list_registered()
            if name not in known:
                flag = "--" + option.replace("_", "-")
                parser.error(f"argument {flag}: invalid choice: {name!r} (choose from {', '.join(sorted(known))})")


def main():
    try:
        platform = take("current_platform")
        # Without a GPU vLLM knows no device and gives up before it reads anything; GLM-5.2 runs on this one alone.
        if not platform.device_type:
            platform.device_type = "cuda"
        validate = take("validate_parsed_serve_args")
        parser = take("make_arg_parser")(take("FlexibleArgumentParser")(prog="vllm serve"))
        arguments = parser.parse_args(sys.argv[1:])
        check_names(parser, arguments)
        arguments.chat_template = None  # a file, perhaps of the weights, which are not here
        try:
            validate(arguments)
        except Exception as problem:  # arguments that do not go together
            if not isinstance(problem, (TypeError, ValueError)) and type(problem).__name__ != "VLLMValidationError":
                raise
            parser.error(str(problem))
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
