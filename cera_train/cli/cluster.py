"""Sweeps through submitit: a lost job does not end the wait for the others, and the wait is
optional. Hydra's launcher waits by `job.results()` and offers no hook, so this replaces two names
of submitit: `Job.results`, and `SlurmJob.watcher`, which reads the states of jobs."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import print_line

ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
    "GONE",  # squeue has forgotten it: a job that ended stays there for MinJobAge seconds
)
"""States of a Slurm job that never runs again. A preempted job may be requeued."""

FILTERS = ("ACCOUNT", "LICENSES", "NAMES", "PARTITION", "QOS", "USERS")
"""Environment variables SQUEUE_NAME that filter jobs, besides SQUEUE_STATES."""

LONGEST_PAUSE = 60  # the most seconds between two queries of Slurm's queue. submitit starts with 2.


class QueueWatcher(SlurmInfoWatcher):
    """Reads states from squeue. submitit reads them from sacct, which has none on a cluster without
    accounting: the wait for a cancelled job would never end."""

    def _make_command(self) -> list[str] | None:
        # A job that squeue hides, by a user's filter or in a hidden partition, would seem to have
        # ended.
        unfiltered = ["env", *(f"--unset=SQUEUE_{name}" for name in FILTERS)]
        options = ["--me", "--all", "--array", "--states=all", "--noheader", "--format=%i|%T"]
        return [*unfiltered, "squeue", *options] if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The states of jobs, from lines `JOB|STATE`."""
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.split("|") for line in text.split())
        return {
            job: {"State": states.get(job, "GONE")} for job in self._registered - self._finished
        }

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        return self.get_state(job_id, mode) in ENDED


@functools.cache
def replace_waiting(detach: bool) -> None:
    """Replaces how Hydra's launcher waits for jobs in this process; detached, it waits for none
    once all are submitted."""
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every failed query
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
