"""submitit's launchers, which send no finished job to the cluster, and with `launch.together=N` several jobs as one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher

from cera_train.cli.composition import without_hydra
from cera_train.cli.start import errors_in_one_line
from cera_train.cli.together import Together, choose_packs
from cera_train.cli.train import TRAIN
from cera_train.common.errors import UserError
from cera_train.common.terminal import print_line
from cera_train.sweep.folder import folder_of_job
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.table import State, job_status

BETWEEN_JOBS = ";"
"""Between the overrides of jobs that one job of the cluster trains."""


def join(jobs: Iterable[Sequence[str]]) -> list[str]:
    """The overrides of several jobs as those of one."""
    first, *others = jobs
    return [*first, *(word for job in others for word in (BETWEEN_JOBS, *job))]


class Packing:
    """Lets each job of a cluster train `launch.together` jobs of the sweep, by `Together`. Mixed into a launcher of
    submitit's, which passes overrides on to the node as one list."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        returns = self._finished(job_overrides)
        missing = {number: job for number, job in enumerate(job_overrides) if number not in returns}
        if returns:
            print_line("finished", f"{len(returns):,} of {len(job_overrides):,} jobs, which are not submitted again")
        if missing:  # submitit's launchers expect a job
            with errors_in_one_line(TRAIN):
                packs = self._packs(missing)
            joined = [join(job_overrides[number] for number in pack) for pack in packs]
            for pack, returned in zip(packs, super().launch(joined, initial_job_idx), strict=True):
                is_pack = len(pack) > 1 and returned.return_value is not None  # None: lost, or not waited for
                returns |= zip(pack, returned.return_value if is_pack else [returned] * len(pack), strict=True)
        return [returns[number] for number in range(len(job_overrides))]

    def _finished(self, job_overrides: Sequence[Sequence[str]]) -> dict[int, JobReturn]:
        """What finished jobs returned, by number: they would take a place in the queue for nothing."""
        if self.config.train.extend:
            return {}
        sweep, returns = Path(self.config.hydra.sweep.dir), {}
        record = SweepRecord.read(sweep / RECORD)
        for number, overrides in enumerate(job_overrides):
            status = job_status(sweep, folder_of_job(sweep, list(overrides), record.swept), metric=record.best_by)
            if status.state == State.finished:
                returns[number] = JobReturn(status=JobStatus.COMPLETED, _return_value=status.value)
        return returns

    def _packs(self, jobs: dict[int, Sequence[str]]) -> list[list[int]]:
        """The numbers of the jobs that go to the cluster as one."""
        wanted = self.config.launch.together
        size = 1 if wanted is None else int(wanted)
        if size == 1:
            return [[number] for number in jobs]
        compose = self.hydra_context.config_loader.load_sweep_config
        configs = {}
        for number, overrides in jobs.items():
            with contextlib.suppress(UserError):  # it goes alone, and fails in its job
                configs[number] = without_hydra(compose(self.config, list(overrides)))
        numbers = list(configs)
        packs = choose_packs(list(configs.values()), lambda _: size)
        alone = [[number] for number in jobs if number not in configs]
        return [[numbers[place] for place in pack.jobs] for pack in packs] + alone

    def __call__(self, sweep_overrides: list[str], *arguments: Any) -> JobReturn:
        """Runs on the node."""
        if BETWEEN_JOBS not in sweep_overrides:
            return super().__call__(sweep_overrides, *arguments)
        _, number, _, singletons = arguments
        Singleton.set_state(singletons)
        launcher = Together()
        launcher.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        words = itertools.groupby(sweep_overrides, key=lambda word: word == BETWEEN_JOBS)
        jobs = [list(overrides) for is_between, overrides in words if not is_between]
        return JobReturn(status=JobStatus.COMPLETED, _return_value=launcher.launch(jobs, number))


class SubmititLocalLauncher(Packing, LocalLauncher):
    """Jobs in processes on this machine."""


class SubmititSlurmLauncher(Packing, SlurmLauncher):
    """Jobs of Slurm."""
