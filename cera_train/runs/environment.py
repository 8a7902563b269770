"""environment.json: the versions and the machine of a run."""

from __future__ import annotations

from typing import Any

import torch


def environment() -> dict[str, Any]:
    """The versions and the machine a run used."""
    import platform
    import sys
    from importlib.metadata import version

    packages = ("cera-train", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
    }
