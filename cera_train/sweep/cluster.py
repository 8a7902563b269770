"""Sweeps through submitit: a lost job does not end the wait for the others, and there need be no wait.

Hydra's launcher waits by `job.results()` and offers no hook, so `submitit.Job.results` is replaced: the one name of
submitit that this project replaces."""

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
    """Replaces what Hydra's launcher waits for in this process; detached, for no job once all are submitted."""
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every query where Slurm keeps no accounts
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
