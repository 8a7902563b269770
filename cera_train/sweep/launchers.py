"""Where the jobs of a sweep run: the launchers of Hydra's plugins, changed to skip finished
jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus

from cera_train.common.terminal import print_line
from cera_train.distributed.processes import is_main_process
from cera_train.sweep.folder import RECORD, State, SweepRecord, job_name, job_status

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:  # the extra `slurm`: without it Hydra finds no file of this launcher
    SlurmLauncher = object


class MissingJobs:
    """Launches the jobs that have no result. Mixed into a launcher."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Returns what every job returned, in order."""
        sweep = Path(self.config.hydra.sweep.dir)
        record = SweepRecord.read(sweep / RECORD)
        finished = {}
        missing = []
        for number, overrides in enumerate(job_overrides):
            status = job_status(sweep, job_name(overrides, record.swept), metric=record.metric)
            if status.is_over:
                # A diverged job returned no value.
                value = status.value if status.state == State.finished else None
                finished[number] = JobReturn(status=JobStatus.COMPLETED, _return_value=value)
            else:
                missing.append(overrides)
        if finished and is_main_process():
            print_line(
                "finished",
                f"{len(finished):,} of {len(job_overrides):,} jobs, which are not started again",
            )
        launched = iter(super().launch(missing, initial_job_idx) if missing else ())
        return [
            finished[number] if number in finished else next(launched)
            for number in range(len(job_overrides))
        ]


class Local(MissingJobs, BasicLauncher):
    """Runs jobs one after the other, in this process."""


class SubmititSlurm(MissingJobs, SlurmLauncher):
    """Submits jobs to Slurm, and waits for them unless `launch.detach=true`.

    Args:
        setup: lines of the batch script before `srun`.
    """

    def __init__(self, setup: Sequence[str] | None = None, **params: Any) -> None:
        # A process that fails ends the others, which would wait for it.
        setup = ["export SLURM_KILL_BAD_EXIT=1", *(setup or [])]
        super().__init__(setup=setup, **params)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        # imports submitit: a fifth of a second
        from cera_train.sweep.cluster import refusals_in_one_line, replace_waiting

        replace_waiting(self.config.launch.detach)
        with refusals_in_one_line():
            return super().launch(job_overrides, initial_job_idx)
