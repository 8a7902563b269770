"""Sweeps through submitit: a lost job does not end the wait for the others, and the wait is
optional. Hydra's launcher waits by `job.results()` and offers no hook, so this replaces
`submitit.Job.results`."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmExecutor

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import print_line


@functools.cache
def replace_waiting(detach: bool) -> None:
    """Replaces how Hydra's launcher waits for jobs in this process; detached, it waits for none
    once all are submitted."""
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every failed query
    wait = submitit.Job.results

    def results(job: submitit.Job) -> list[Any]:
        if detach:
            print_line("submitted", f"job {job.job_id}")
            return [JobReturn(status=JobStatus.COMPLETED)]
        try:
            return wait(job)
        except (FailedJobError, UncompletedJobError):  # killed, cancelled, or never begun
            print_line("lost", f"job {job.job_id}; its output is in {job.paths.folder}")
            return [JobReturn(status=JobStatus.COMPLETED)]

    submitit.Job.results = results


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Raises UserError where jobs cannot be submitted."""
    require(
        SlurmExecutor.affinity() > 0,
        "hydra/launcher: there is no srun here: start the command where Slurm is installed.",
    )
    try:
        yield
    except FailedJobError as error:  # of sbatch: `results` above catches those of jobs
        reason = str(error).strip().rpartition("\n")[2].removeprefix("sbatch: error: ")
        raise UserError(
            f"hydra/launcher: sbatch submitted no job: {reason}. Change hydra.launcher.NAME=..."
        ) from error
