"""Puts the collection on the import path, as Ansible's loader does, and glm_node, which a role installs."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "plugins/module_utils")]
# For the programs that the tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[1], os.environ.get("PYTHONPATH")]))
