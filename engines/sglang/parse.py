"""Reads its arguments as `sglang.launch_server` would: exit status 2, and argparse's own words, where it does not take
them.

Runs within the image. Exit status 3: this release has its parser elsewhere, and nothing can be told.
"""

import argparse
import sys

try:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="sglang.launch_server")
    ServerArgs.add_cli_args(parser)
except Exception as problem:
    print(problem, file=sys.stderr)
    sys.exit(3)
parser.parse_args(sys.argv[1:])
