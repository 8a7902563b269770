"""The versions and the machine of a run."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

import torch

from cera_train.model.precision import Precision
from cera_train.runs.results import Environment

PACKAGES = ("cera-train", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def environment(processes: int, base_fingerprint: str, updates: int, precision: Precision) -> Environment:
    """environment.json of a run that begins here and now.

    Args:
        base_fingerprint: tells base models of one shape apart.
        updates: of the whole run.
    """
    return Environment(
        command=sys.argv,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: version(name) for name in PACKAGES},
        gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        cpu_threads=torch.get_num_threads(),
        processes=processes,
        base_fingerprint=base_fingerprint,
        updates=updates,
        details={"precision": precision.record},
    )
