"""Plugins of one name: a module, and the action plugin that calls it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(kind: str, name: str) -> ModuleType:
    """kind: modules or action."""
    spec = importlib.util.spec_from_file_location(f"{name}_{kind}", ROOT / "plugins" / kind / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
