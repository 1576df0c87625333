"""Puts the project's plugins on the import path, as Ansible's loaders do."""

import sys
from pathlib import Path

import ansible.module_utils

ROOT = Path(__file__).resolve().parents[1]
ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))
for kind in ("modules", "module_utils", "filter", "callback"):
    sys.path.insert(0, str(ROOT / "plugins" / kind))
