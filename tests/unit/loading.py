"""Loads what the tests cannot import by its name: programs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_file(path: Path, name: str) -> ModuleType:
    """The program as the module `name`."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    # A cache of it beside the program would count as one of the role's files.
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    loader.exec_module(loaded)
    sys.dont_write_bytecode = kept
    return loaded
