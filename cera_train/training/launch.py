"""A training run in one process a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cera_train.common.settings import to_plain
from cera_train.data.prepare import prepare_data
from cera_train.distributed.launch import in_processes
from cera_train.distributed.processes import is_main_process
from cera_train.model.weights import load_tokenizer
from cera_train.runs.folder import RunFolder
from cera_train.runs.hub import push
from cera_train.settings.run import Config
from cera_train.training.session import settle
from cera_train.training.train import finished_result, train


def launch(config: Config) -> dict[str, Any]:
    """`train`, in `launch.processes` processes, and the upload of what it left."""
    result = in_processes(train, config, prepare)
    if is_main_process():
        push(config)
    return result


def prepare(config: Config) -> dict[str, Any] | None:
    """Checks the folder and tokenises the rows, once for all processes; returns the result of a finished run."""
    path = Path(config.output_dir) / config.name
    config, _ = settle(config, path)
    with RunFolder(path, to_plain(config)) as folder:
        folder.check_may_run(config.train.resume)
        if (result := finished_result(folder)) is not None:
            return result
        prepare_data(config.data, load_tokenizer(config.model))
    return None
