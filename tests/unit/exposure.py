"""How much a unit could do that it need not, by systemd's own measure."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

MOST = 3.5  # of 10; what systemd calls OK ends at 4.9


def exposure(unit: Path) -> float:
    """The level that `systemd-analyze security` gives to a unit file."""
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1])
