"""The devices that a run is planned on: their memory and speed."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

from cera_train.settings.run import GpuKind

GB = 1e9

GPU_MFU, CPU_MFU = 0.4, 0.45
"""Share of the peak speed that training reaches. On a GPU an assumption; on a CPU what SmolLM2-135M reached with CeRA
(with LoRA 0.38: its dropout runs over the whole input of a projection)."""

USABLE = 0.95
"""Usable share of a GPU's memory: CUDA itself and the gaps of torch's allocator take the rest."""


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    flops: float  # peak operations a second
    bandwidth: float  # bytes of memory that it reads in a second


GPUS = {
    GpuKind.h100: Device("H100", 80 * GB, 989e12, 3.35e12),
    GpuKind.a100: Device("A100", 80 * GB, 312e12, 2.04e12),
    GpuKind.l40s: Device("L40S", 48 * GB, 362e12, 0.86e12),
    GpuKind.rtx4090: Device("RTX 4090", 24 * GB, 165e12, 1.01e12),
}
"""Memory, dense bf16 speed and bandwidth by the vendor's data sheets (SXM cards, the A100 of 80 GB)."""

CPU_BANDWIDTH = 25e9
"""On two cores, SmolLM2-135M answers with 42 tokens a second."""


@functools.cache
def this_cpu(is_16bit: bool) -> Device:
    """This machine: its memory, and its peak speed at matrix products.

    One thread is measured for half a second, at its best, and multiplied by the threads: several at once would wait for
    other programs.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512, dtype=torch.bfloat16 if is_16bit else torch.float32)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        began = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * 512**3 / (time.perf_counter() - began))
    torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, best * threads, CPU_BANDWIDTH)
