"""Reads its arguments as `vllm serve` would: exit status 2, and argparse's own words, where it does not take them.

Runs within the image. Exit status 3: this release has its parser elsewhere, and nothing can be told.
"""

import sys

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
except Exception as problem:
    print(problem, file=sys.stderr)
    sys.exit(3)
arguments = parser.parse_args(sys.argv[1:])
try:
    validate_parsed_serve_args(arguments)
except (TypeError, ValueError) as problem:  # arguments that do not go together
    parser.error(str(problem))
