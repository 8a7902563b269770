"""`launch.together=N` on a cluster: submitit's launchers, of which each job trains several jobs of the sweep."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher

from cera_train.cli.composition import without_hydra
from cera_train.cli.start import errors_in_one_line
from cera_train.cli.together import Together, choose_packs
from cera_train.cli.train import TRAIN
from cera_train.common.errors import UserError

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
        with errors_in_one_line(TRAIN):
            packs = self._packs(job_overrides)
        joined = [join(job_overrides[number] for number in pack) for pack in packs]
        returns: dict[int, JobReturn] = {}
        for pack, returned in zip(packs, super().launch(joined, initial_job_idx), strict=True):
            is_pack = len(pack) > 1 and returned.return_value is not None  # None: it was lost, or is not waited for
            returns |= zip(pack, returned.return_value if is_pack else [returned] * len(pack), strict=True)
        return [returns[number] for number in range(len(job_overrides))]

    def _packs(self, job_overrides: Sequence[Sequence[str]]) -> list[list[int]]:
        """The numbers of the jobs that go to the cluster as one."""
        wanted = self.config.launch.together
        size = 1 if wanted is None else int(wanted)
        if size == 1:
            return [[number] for number in range(len(job_overrides))]
        compose = self.hydra_context.config_loader.load_sweep_config
        configs = {}
        for number, overrides in enumerate(job_overrides):
            with contextlib.suppress(UserError):  # it goes alone, and fails in its job
                configs[number] = without_hydra(compose(self.config, list(overrides)))
        numbers = list(configs)
        packs = choose_packs(list(configs.values()), lambda _: size)
        alone = [[number] for number in range(len(job_overrides)) if number not in configs]
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
