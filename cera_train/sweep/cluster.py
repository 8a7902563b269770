"""Sweeps through submitit, whose jobs Hydra's launcher waits for: a lost job does not end the wait, and there need not
be one."""

from __future__ import annotations

import functools
import logging
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import FailedJobError, UncompletedJobError

from cera_train.common.terminal import print_line


@functools.cache
def replace_waiting(detach: bool) -> None:
    """Sets what Hydra's launcher gets in this process when it asks a job of submitit for its results.

    Args:
        detach: nothing, so that the launcher returns when all jobs are submitted.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every look where Slurm keeps no accounts
    wait = submitit.Job.results

    def results(job: submitit.Job) -> list[Any]:
        if detach:
            print_line("submitted", f"job {job.job_id}")
            return [JobReturn(status=JobStatus.COMPLETED)]
        try:
            return wait(job)
        except (FailedJobError, UncompletedJobError):  # killed, cancelled, or never begun
            print_line("lost", f"job {job.job_id}; what it said is in {job.paths.folder}")
            return [JobReturn(status=JobStatus.COMPLETED)]

    submitit.Job.results = results
