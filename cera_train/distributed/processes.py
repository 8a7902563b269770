"""Rank and size of a command's process group, from its launcher's environment variables. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

# Variables in which launchers set the rank; Accelerate reads the same.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0


def is_one_of_several() -> bool:
    """Whether others wait for this process."""
    return any(name in os.environ for name in RANKS) and os.environ.get("WORLD_SIZE") != "1"


def is_launched() -> bool:
    """Whether a launcher started this process: then it starts no others."""
    # `accelerate launch` sets no rank for a single process
    return any(name in os.environ for name in (*RANKS, "ACCELERATE_MIXED_PRECISION"))


def join_slurm_step(environment: MutableMapping[str, str]) -> None:
    """Sets torch's variables from Slurm's, where srun started this process as one of several tasks."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in environment:
        return
    local = int(environment["SLURM_LOCALID"])
    gpus = environment.get("CUDA_VISIBLE_DEVICES")
    # node[003-007,9]: the first host
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    # The port follows from the job, so that jobs on one node use different ports.
    for name, value in {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": local % len(gpus.split(",")) if gpus else local,  # a task that sees one GPU counts it as 0
        "LOCAL_WORLD_SIZE": re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])[0],
        "MASTER_ADDR": environment.get("MASTER_ADDR", host),
        "MASTER_PORT": environment.get("MASTER_PORT", 20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }.items():
        environment[name] = str(value)
    # Accelerate would share out the whole node's cores.
    environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))
