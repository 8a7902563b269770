"""Sweeps through submitit: a lost job does not end the wait for the others, and there need be no
wait.

Hydra's launcher waits by `job.results()` and offers no hook. So `submitit.Job.results` is replaced,
and with it `SlurmJob.watcher`, which knows the states of jobs: the two names of submitit that this
project replaces."""

import functools
import logging
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from cera_train.common.terminal import print_line

ENDED = (
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "REVOKED",
        "TIMEOUT",
    ),
    "GONE",  # squeue has forgotten it: a job that ended stays there for MinJobAge seconds
)
"""States of a Slurm job that never runs again. One that is preempted may be requeued."""

LONGEST_PAUSE = 60  # seconds between two looks into Slurm's queue, at most. submitit starts with 2.


class QueueWatcher(SlurmInfoWatcher):
    """Reads states from squeue. submitit reads them from sacct, which knows none where the cluster
    keeps no accounts: the wait for a cancelled job would not end."""

    def _make_command(self) -> list[str] | None:
        command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]
        return command if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The states of jobs from a line `JOB|STATE` each."""
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.split("|") for line in text.split())
        return {
            job: {"State": states.get(job, "GONE")} for job in self._registered - self._finished
        }

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        return self.get_state(job_id, mode) in ENDED


@functools.cache
def replace_waiting(detach: bool) -> None:
    """Replaces what Hydra's launcher waits for in this process; detached, for no job once all are
    submitted."""
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every query that fails
    SlurmJob.watcher = QueueWatcher(LONGEST_PAUSE)
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
