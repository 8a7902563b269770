"""Sweeps through submitit, whose jobs Hydra's launcher waits for: a lost job does not end the wait, and there need not
be one."""

from __future__ import annotations

import logging
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import FailedJobError, UncompletedJobError

from cera_train.words import say


def wait_for_jobs(wanted: bool) -> None:
    """Sets what Hydra's submitit launcher, which asks each job for its results, gets in this process.

    Args:
        wanted: False: it returns when all jobs are submitted.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every look where Slurm keeps no accounts
    wait = submitit.Job.results

    def results(job: submitit.Job) -> list[Any]:
        if not wanted:
            say("submitted", f"job {job.job_id}")
            return [JobReturn(status=JobStatus.COMPLETED)]
        try:
            return wait(job)
        except (FailedJobError, UncompletedJobError):  # killed or cancelled: what it left tells how far it is
            return [JobReturn(status=JobStatus.COMPLETED)]

    submitit.Job.results = results
