"""Reads its arguments as `sglang.launch_server` would: exit status 2, and argparse's own words, where it does not take
them, the names of the parsers included.

Runs within the image; it needs no GPU. Exit status 3: nothing can be told, this release has its parser elsewhere.
"""

import argparse
import importlib
import sys

# tests/upstream looks it up in the releases' source.
PLACES = {"ServerArgs": ("sglang.srt.server_args",)}


def main():
    parser = argparse.ArgumentParser(prog="sglang.launch_server")
    try:
        for name, (module,) in PLACES.items():
            getattr(importlib.import_module(module), name).add_cli_args(parser)
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 3
    parser.parse_args(sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
