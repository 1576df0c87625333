"""Reads its arguments as `vllm serve` would: exit status 2, and argparse's own words, where it does not take them.

Runs within the image. Exit status 3: this release has its parser elsewhere, and nothing can be told.
"""

import sys

try:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # before August 2026
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
except Exception as problem:
    print(problem, file=sys.stderr)
    sys.exit(3)
arguments = parser.parse_args(sys.argv[1:])
arguments.chat_template = None  # a file, perhaps of the weights, which are not here
try:
    validate_parsed_serve_args(arguments)
except Exception as problem:  # arguments that do not go together
    if not isinstance(problem, (TypeError, ValueError)) and type(problem).__name__ != "VLLMValidationError":
        print(problem, file=sys.stderr)
        sys.exit(3)
    parser.error(str(problem))
