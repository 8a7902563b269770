"""From one command to one process a GPU, by torch's elastic launcher. A process that torchrun, `accelerate launch` or
srun started works as it is."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from cera_train.common.errors import UserError
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.distributed.processes import is_launched
from cera_train.distributed.signals import SIGNALS, Interrupted, Interruption, signal_children
from cera_train.distributed.team import Hung
from cera_train.distributed.worker import beside_others, read_mistake, work
from cera_train.settings.distributed import ProcessesConfig

Result = dict[str, Any]


class ProcessFailed(RuntimeError):
    """A process ended with an error that is not the user's to mend; the message holds its traceback."""


def in_processes(function: Callable[[Any], Result], config: Any, prepare: Callable[[Any], Result | None]) -> Result:
    """`function(config)`, in `launch.processes` processes: same result, and same errors, or
    ProcessFailed.

    Args:
        function: one of a module, which every process imports. Only process 0 writes and prints.
        config: settings with a section `launch`.
        prepare: called before other processes start, so that a mistake is reported once. A result that it returns is
            the result: nothing is left to do.
    """
    try:
        if is_launched():
            return beside_others(function, config)
        processes = processes_to_start(config.launch)
        if processes == 1:
            return function(config)
        quiet_libraries()
        done = prepare(config)
        return start_processes(function, config, processes) if done is None else done
    except Interrupted as interrupted:
        interrupted.hand_over()
        raise


def processes_to_start(config: ProcessesConfig) -> int:
    """One process a GPU, or as many as the config sets; UserError where there are GPUs, but fewer than that."""
    gpus = torch.cuda.device_count()
    processes = max(1, gpus) if config.processes == "auto" else int(config.processes)
    if 0 < gpus < processes:
        raise UserError(f"launch.processes={processes}, but this machine shows {gpus} GPUs: lower it, or set auto.")
    return processes


def start_processes(function: Callable[[Any], Result], config: Any, processes: int) -> Result:
    """Starts the processes and waits for them; returns the result of process 0."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported below
    target = f"{function.__module__}:{function.__qualname__}"
    variables = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
    }
    with (
        _environment({name: value for name, value in variables.items() if name not in os.environ}),
        tempfile.TemporaryDirectory() as logs,
        tempfile.TemporaryDirectory() as mistakes,
        Interruption(pass_on=signal_children) as interruption,
    ):
        elastic = ElasticConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle="",  # they are passed on, and the processes end when they have saved
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            return elastic_launch(elastic, work)(target, config, mistakes)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            ends = {1, *(128 + number for number in SIGNALS), *(-number for number in SIGNALS)}
            if interruption.signal is not None and failure.exitcode in ends and isinstance(failure.message, str):
                raise Interrupted(interruption.signal) from None
            raise _as_error(rank, failure, Path(mistakes)) from None


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started inside it."""
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _as_error(rank: int, failure: Any, mistakes: Path) -> Exception:
    """The error of the first process that failed."""
    if (message := read_mistake(mistakes, rank)) is not None:
        return UserError(message)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        cause = ": the machine may be out of memory" if name == "SIGKILL" else ""
        return UserError(f"process {rank} was killed by {name}{cause}. The same command goes on from what is saved.")
    if isinstance(failure.message, str):  # it ended itself and left no error
        return ProcessFailed(f"process {rank} ended with status {failure.exitcode} and no error.")
    kind, _, text = failure.message["message"].partition(": ")
    if kind == Hung.__name__:
        return UserError(text)
    return ProcessFailed(f"process {rank} failed with {kind}: {text}\n{failure.message['extraInfo']['py_callstack']}")
