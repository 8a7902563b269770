"""The processes that share a run: their rank and number, from a launcher's environment variables;
and how one command starts a process for each GPU, by torch's elastic launcher. A process that
torchrun, `accelerate launch` or srun started starts no others. No torch at module level: commands
need the rank, and processes a signal handler, before torch is imported."""

import logging
import os
import pkgutil
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any

from cera_train.common.errors import UserError, explain
from cera_train.common.libraries import heavy_imports
from cera_train.common.signals import (
    SIGNALS,
    STOPPED,
    Interrupted,
    Interruption,
    signal_children,
    stop_at_once,
)
from cera_train.settings.distributed import ProcessesConfig

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which processes find each other. Of a launcher, as are RANKS."""


def launched_rank() -> int | None:
    """The rank that a launcher set for this process; None without a launcher."""
    rank = os.environ.get("RANK")
    return None if rank is None else int(rank)


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return not launched_rank()


def is_one_of_several() -> bool:
    """Whether others wait for this process."""
    return launched_rank() is not None and os.environ.get("WORLD_SIZE") != "1"


def join_slurm_step(environment: MutableMapping[str, str]) -> None:
    """Sets torch's variables from Slurm's if srun started this process as one of several tasks."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in environment:
        return
    local = int(environment["SLURM_LOCALID"])
    gpus = environment.get("CUDA_VISIBLE_DEVICES")
    # node[003-007,9]: the first host
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    # Jobs on one node, and steps of a job, use different ports.
    port = (
        20_000
        + (int(environment["SLURM_JOB_ID"]) + 997 * int(environment.get("SLURM_STEP_ID", 0)))
        % 20_000
    )
    for name, value in {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": local % len(gpus.split(","))
        if gpus
        else local,  # a task that sees one GPU counts it as 0
        "LOCAL_WORLD_SIZE": re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])[0],
        "MASTER_ADDR": environment.get("MASTER_ADDR", host),
        "MASTER_PORT": environment.get("MASTER_PORT", port),
    }.items():
        environment[name] = str(value)
    # Accelerate would divide all cores of the node among the tasks.
    environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))


def leave_slurm_step() -> None:
    """Lets process 0 of a Slurm step leave last, and raises SystemExit with status 0 in the others.

    At the first status that is not 0, `srun --kill-on-bad-exit` ends the tasks that are still
    leaving by SIGTERM. It returns the highest status, which would be 143: a batch script that
    requeues a saved run would not. A task that a signal ended at once, as while it loads, keeps its
    status: the others may wait for it."""
    is_alone = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1 or not is_one_of_several()
    if is_alone or STOPPED:
        return
    if not is_main_process():
        raise SystemExit(0)
    time.sleep(PEER_SECONDS)


# --- several from one command ---------------------------------------------------------------------

LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset)|ProcessGroup", re.IGNORECASE)
"""Errors of the communication library, caused by another process."""

# seconds that a process waits for the end of others: before it fails because another did, since the
# launcher reports the first failure, and before it leaves a Slurm step
PEER_SECONDS = 5


def in_processes(function: Callable[[Any], dict[str, Any]], config: Any) -> dict[str, Any]:
    """Calls `function(config)` in `launch.processes` processes: the result and a UserError are the
    same as in one. Any other error becomes a RuntimeError with its traceback.

    Args:
        function: one of a module, which every process imports. Only process 0 writes and prints.
        config: settings with a section `launch`.
    """
    try:
        # A launcher started this process: `accelerate launch` sets no rank for a single one.
        if launched_rank() is not None or "ACCELERATE_MIXED_PRECISION" in os.environ:
            return beside_others(function, config)
        processes = processes_to_start(config.launch)
        return function(config) if processes == 1 else start_processes(function, config, processes)
    except Interrupted as interrupted:
        interrupted.hand_over()
        leave_slurm_step()
        raise


def processes_to_start(config: ProcessesConfig) -> int:
    """The number of processes: the config's, else one for each GPU. Raises UserError if there are
    GPUs, but fewer than that."""
    import torch

    gpus = torch.cuda.device_count()
    processes = max(1, gpus) if config.processes == "auto" else int(config.processes)
    if 0 < gpus < processes:
        raise UserError(
            f"launch.processes={processes}, but this machine shows {gpus} GPUs: lower it, or set "
            f"auto."
        )
    return processes


def start_processes(
    function: Callable[[Any], dict[str, Any]], config: Any, processes: int
) -> dict[str, Any]:
    """Starts the processes and waits for them; returns the result of process 0."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported below
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    target = f"{function.__module__}:{function.__qualname__}"
    with (
        tempfile.TemporaryDirectory() as logs,
        Interruption(pass_on=signal_children) as interruption,
    ):
        elastic = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            # Signals are passed on, and the processes end once they have saved.
            signals_to_handle="",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            return elastic_launch(elastic, work)(target, config)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            ends = {1, *(128 + number for number in SIGNALS), *(-number for number in SIGNALS)}
            if (
                interruption.signal is not None
                and failure.exitcode in ends
                and isinstance(failure.message, str)
            ):
                raise Interrupted(interruption.signal) from None
            raise error_of(rank, failure) from None


def processors() -> int:
    """How many this process may use, where the system says so, else all."""
    may_use = getattr(os, "sched_getaffinity", None)
    return len(may_use(0)) if may_use else os.cpu_count() or 1


def work(target: str, config: Any) -> Any:
    """Calls a function in one of the processes that `in_processes` started.

    Args:
        target: MODULE:FUNCTION. It is imported here, since signals are not handled while the
            arguments are unpickled.
    """
    os.setpgrp()  # only the parent gets a terminal's Ctrl-C, and passes it on
    for number in SIGNALS:  # until the function handles them, such as while it loads
        signal.signal(number, stop_at_once)
    with heavy_imports():
        import torch

        function = pkgutil.resolve_name(target)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, processors() // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        result = beside_others(function, config)
    except Exception as error:
        if (message := explain(error)) is not None:
            # The launcher passes on the type and the text of an error.
            raise UserError(message) from None
        raise
    finally:
        sys.stdout.flush()
    if torch.distributed.is_initialized():  # not if the run was already finished
        torch.distributed.destroy_process_group()
    return result


def beside_others(function: Callable[[Any], Any], config: Any) -> Any:
    """Calls a function in one of several processes."""
    try:
        return function(config)
    except UserError:
        raise
    except Exception as error:
        if not LOST_PEER.search(str(error)):
            raise
        if re.search("timed? ?out", str(error), re.IGNORECASE):
            raise UserError(
                f"process {launched_rank()} (counted from 0) waited for another that hangs, longer "
                "than distributed.timeout. Look at the machines; the same command resumes from the "
                "last checkpoint."
            ) from error
        time.sleep(PEER_SECONDS)
        raise


def error_of(rank: int, failure: Any) -> Exception:
    """The error of the first process that failed, from the report of torch's launcher."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        cause = {
            "SIGKILL": ": the machine may be out of memory",
            # NCCL ends a process that waits too long this way
            "SIGABRT": ": it may have waited for another longer than distributed.timeout",
        }.get(name, "")
        return UserError(
            f"process {rank} was killed by {name}{cause}. The same command resumes from what is "
            f"saved."
        )
    if isinstance(failure.message, str):  # it exited by itself and left no error
        return RuntimeError(f"process {rank} ended with status {failure.exitcode} and no error.")
    kind, _, text = failure.message["message"].partition(": ")
    if kind == UserError.__name__:
        return UserError(text)
    return RuntimeError(
        f"process {rank} failed with {kind}: {text}\n{failure.message['extraInfo']['py_callstack']}"
    )
