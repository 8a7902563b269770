"""What the figures belong to: `python -m benchmarks.gpu.machine` prints it as JSON. In a separate process, since asking
CUDA takes memory of the GPU as long as the asking process lives."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu.place import ROOT

PACKAGES = (
    *("torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate", "trl"),
    *("flash-attn", "unsloth"),
)


def describe() -> dict[str, Any]:
    """GPUs, driver and versions."""
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "gpus": [gpu.name for gpu in gpus],
        "memory": [gpu.total_memory for gpu in gpus],
        "capability": [f"{gpu.major}.{gpu.minor}" for gpu in gpus],
        "driver": driver() if gpus else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
    }


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask() -> dict[str, Any]:
    """The same, in a process that ends."""
    done = subprocess.run([sys.executable, "-m", __name__], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


if __name__ == "__main__":
    print(json.dumps(describe()))
