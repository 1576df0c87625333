"""The program that runs apt-get with its progress told to systemd, against a stand-in of apt-get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "roles/nvidia_driver/files/apt-progress"
APT = """#!/bin/bash
[ "$1" = -o ] || exit 64
exec 9>&"${2##*=}"
echo "dlstatus:1:12.5:Retrieving file 1 of 3 (2min 3s remaining)" >&9
echo "pmstatus:nvlsm:40.4:Unpacking nvlsm (amd64)" >&9
echo "pmstatus:no number" >&9
%s
"""


def run(tmp_path: Path, ending: str, step: str = "install") -> subprocess.CompletedProcess[str]:
    apt = tmp_path / "apt-get"
    apt.write_text(APT % ending)
    apt.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    command = [sys.executable, str(PROGRAM), step, str(apt), "install", "nvlsm"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=30)


def test_progress(tmp_path: Path) -> None:
    done = run(tmp_path, "exit 0")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "downloading: Retrieving file 1 of 3 (2min 3s remaining), 12 %",
        "installing: Unpacking nvlsm (amd64), 40 %",
    ]
    assert done.stderr == ""


def test_what_dpkg_says_comes_before_what_apt_says(tmp_path: Path) -> None:
    ending = (
        "echo 'pmerror:/var/cache/x_1%3a2_amd64.deb:60:No space left on device: /usr/x' >&9\n"
        "echo 'E: Sub-process /usr/bin/dpkg returned an error code (1)' >&2; exit 100"
    )
    done = run(tmp_path, ending)
    assert done.returncode == 100
    assert done.stderr.splitlines()[-1] == (
        "glm: error: /var/cache/x_1%3a2_amd64.deb: No space left on device: /usr/x; "
        "E: Sub-process /usr/bin/dpkg returned an error code (1)"
    )


def test_a_download_installs_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, '[ "${@: -1}" = --download-only ] || exit 9', "download").returncode == 0
    assert run(tmp_path, '[ "${@: -1}" = --download-only ] || exit 9').returncode == 9


def test_a_failure_without_words(tmp_path: Path) -> None:
    done = run(tmp_path, "exit 3")
    assert (done.returncode, done.stderr.splitlines()[-1].split("/")[0]) == (3, "glm: error: ")
    assert done.stderr.rstrip().endswith("ended with 3")
