"""cuda-context with the testbed's libcuda, whose errors are those of a node that cannot serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/preflight/files/cuda-context"
SOURCE = ROOT / "molecule/shared/apt/files/libnvidia-compute/usr/lib/x86_64-linux-gnu/libcuda.so.1.c"


def run(directory: Path, count: int = 0) -> tuple[int, str]:
    """The program is given to python3 as text, as the role does."""
    command = [sys.executable, "-c", PROGRAM.read_text(), str(count)]
    env = {**os.environ, "LD_LIBRARY_PATH": str(directory)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


def library(directory: Path, text: str) -> None:
    """Another libcuda: what each line returns."""
    (directory / "cuda.c").write_text(text)
    compiler = shutil.which("cc")
    assert compiler, "a C compiler makes the stand-in"
    out = str(directory / "libcuda.so.1")
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", out, str(directory / "cuda.c")], check=True)


def test_each_gpu_gets_a_context(tmp_path: Path) -> None:
    library(tmp_path, SOURCE.read_text().replace('"/dev/nvidia%d"', '"/dev/fd/%d"').replace("minor < 16", "minor < 3"))
    assert run(tmp_path, 3) == (0, "a CUDA context on each of 3 GPUs")
    assert run(tmp_path, 8) == (1, "CUDA sees 3 of 8 GPUs")


def test_what_cuda_answers_is_said(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    library(
        tmp_path,
        SOURCE.read_text()
        .replace('"/dev/nvidia%d"', '"/dev/fd/%d"')
        .replace("minor < 16", "minor < 3")
        .replace("/etc/nvidia-stand-in/cuda", str(fault)),
    )
    fault.write_text("802\n")
    assert run(tmp_path, 3) == (1, "cuInit: error 802, system not yet initialized")
    fault.write_text("999 2\n")
    assert run(tmp_path, 3) == (1, "cuDevicePrimaryCtxRetain on GPU 2: error 999, unknown error")


def test_a_container_without_the_driver_is_named(tmp_path: Path) -> None:
    code, said = run(tmp_path)
    assert code == 1 and said.startswith("the driver's libcuda.so.1 is not in the container: ")
