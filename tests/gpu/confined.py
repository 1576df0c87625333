"""What an engine does with several GPUs, without the capabilities that its container lacks.

    setpriv --no-new-privs --bounding-set=-all,+dac_override --inh-caps=-all python3 tests/gpu/confined.py

Prints one JSON object: the capabilities of the processes, and whether NCCL summed over all GPUs (also by direct peer
access and with cuMem handles), and whether one process has read another's memory by CUDA IPC. Needs torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 1 << 24  # floats, 64 MiB


def capabilities() -> dict[str, str]:
    rows = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {name: rows[name] for name in ("CapEff", "CapBnd", "NoNewPrivs")}


def worker(rank: int, count: int, cumem: str, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", NCCL_CUMEM_ENABLE=cumem)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=count)
    values = torch.full((SIZE,), float(rank + 1), device="cuda")
    dist.all_reduce(values)
    torch.cuda.synchronize()
    answers.put((rank, float(values[0]) == count * (count + 1) / 2, capabilities()))
    dist.destroy_process_group()


def reader(tensors: Any, answers: Any) -> None:
    answers.put(float(tensors.get().sum()))


def main() -> None:
    count = torch.cuda.device_count()
    context = mp.get_context("spawn")
    found: dict[str, Any] = {"gpus": count, "device": torch.cuda.get_device_name(0), "torch": torch.__version__}
    for cumem in ("0", "1"):
        answers = context.SimpleQueue()
        mp.spawn(worker, args=(count, cumem, answers), nprocs=count)
        seen = [answers.get() for _ in range(count)]
        found[f"nccl_cumem_{cumem}"] = all(right for _, right, _ in seen)
        found["capabilities"] = seen[0][2]
    tensors, answers = context.Queue(), context.Queue()
    process = context.Process(target=reader, args=(tensors, answers))
    process.start()
    shared = torch.ones(SIZE, device=f"cuda:{count - 1}")
    tensors.put(shared)
    found["cuda_ipc"] = answers.get(timeout=120) == SIZE
    process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
