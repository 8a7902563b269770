"""A training run in one process a GPU."""

from __future__ import annotations

from typing import Any

from cera_train.distributed.launch import in_processes
from cera_train.distributed.processes import is_main_process
from cera_train.runs.push import push
from cera_train.settings.run import Config
from cera_train.training.train import train


def launch(config: Config) -> dict[str, Any]:
    """`train`, in `launch.processes` processes, and the upload of what it left."""
    result = in_processes(train, config)
    if is_main_process():
        push(config)
    return result
