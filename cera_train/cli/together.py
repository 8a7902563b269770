"""`hydra/launcher=together`, and `launch.together=N` on a cluster: Hydra's launchers that train jobs of a sweep on one
base. What a job leaves is what it leaves by any other launcher."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from cera_train.cli.start import errors_in_one_line
from cera_train.cli.train import TRAIN, fail, prepare, run, without_hydra
from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.common.terminal import print_line
from cera_train.config import Config
from cera_train.distributed.processes import is_one_of_several
from cera_train.sweep.folder import Job
from cera_train.sweep.together import Group, describe_groups, groups_of

BETWEEN_JOBS = ";"
"""Between the overrides of jobs that one job of a cluster trains."""


@dataclass
class Prepared:
    """A job of a sweep before it trains, and what came of it."""

    job: Job
    config: Config | None
    """None: it failed already."""
    perplexity: float | None = None


class Together(Launcher):
    """Trains, in this process, the jobs that can share a base together, and each of the others alone."""

    def __init__(self, **_: Any) -> None:
        """Hydra passes the settings, of which there are none."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs jobs; returns their perplexities, None for one that failed."""
        setup_globals()
        with errors_in_one_line(TRAIN):
            if is_one_of_several():
                raise UserError("jobs that train together share one process: start one of a machine.")
            returns = [self._compose(list(job), initial_job_idx + place) for place, job in enumerate(job_overrides)]
            jobs = [returned.return_value for returned in returns]
            ready = [job for job in jobs if job.config is not None]
            for members in group([job.config for job in ready], self._most):
                train_group([ready[number] for number in members.jobs])
        for returned, job in zip(returns, jobs, strict=True):
            returned.return_value = job.perplexity
        return returns

    def _compose(self, overrides: list[str], number: int) -> JobReturn:
        """A job, composed and checked as by Hydra's own launcher."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=prepare_job,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _most(self, configs: Sequence[Config]) -> int:
        """How many of these jobs train at once."""
        wanted = configs[0].launch.together
        if wanted is not None and wanted != "auto":
            return int(wanted)
        with heavy_imports():
            from cera_train.planning.together import arms_that_fit

        return arms_that_fit(configs)


def prepare_job(composed: DictConfig) -> Prepared:
    """The checked config of a job; a mistake is its own."""
    job = Job.current(HydraConfig.get())
    job.clear()
    try:
        return Prepared(job, prepare(composed, job))
    except Exception as error:
        fail(job, error)
        return Prepared(job, None)


def group(configs: Sequence[Config], most: Callable[[Sequence[Config]], int]) -> list[Group]:
    """Jobs in groups that share a base, printed in a line. Raises UserError where `launch.together` asks for groups,
    and there are none."""
    groups = groups_of(configs, most)
    text = describe_groups(groups)
    wanted = {config.launch.together for config in configs} - {None, "auto", "1"}
    if wanted and len(configs) > 1 and len(groups) == len(configs):
        raise UserError(f"launch.together={wanted.pop()}: {text}. Leave it out.")
    print()
    print_line("together", text)
    return groups


def train_group(jobs: Sequence[Prepared]) -> None:
    """Trains jobs on one base, and keeps what came of each."""
    print()
    print_line("jobs" if len(jobs) > 1 else "job", ", ".join(f"{job.job.number} {job.job.name}" for job in jobs))
    with heavy_imports():
        from cera_train.distributed.signals import Interrupted
        from cera_train.training.train import train_together
    try:
        if len(jobs) == 1:  # on every GPU
            jobs[0].perplexity = run(jobs[0].config)
            return
        outcomes = train_together([job.config for job in jobs])
    except Interrupted as interrupted:
        interrupted.hand_over()
        raise
    except Exception as error:  # of the base or the rows, which they share
        outcomes = [error] * len(jobs)
    for job, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, Exception):
            fail(job.job, outcome)
        else:
            job.perplexity = outcome["eval/perplexity"]


def join(jobs: Iterable[Sequence[str]]) -> list[str]:
    """The overrides of several jobs as those of one."""
    first, *others = jobs
    return [*first, *(word for job in others for word in (BETWEEN_JOBS, *job))]


class Packing:
    """Lets each job of a cluster train `launch.together` jobs of the sweep, by `Together`. Mixed into a launcher of
    submitit's, which passes overrides on to the node as one list."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
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
        groups = group(list(configs.values()), lambda _: size)
        numbers = list(configs)
        packs = [[numbers[place] for place in group.jobs] for group in groups]
        return packs + [[number] for number in range(len(job_overrides)) if number not in configs]

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


def packing(launcher: type[Launcher]) -> type[Launcher]:
    return type(f"Submitit{launcher.__name__}", (Packing, launcher), {})


def launchers() -> list[type[Launcher]]:
    """The launchers of ours; those of a cluster where submitit's are installed."""
    Plugins.instance()  # executes the modules of plugins, also those that were imported before
    try:
        from hydra_plugins.hydra_submitit_launcher import submitit_launcher
    except ImportError:
        return [Together]
    return [Together, *(packing(getattr(submitit_launcher, name)) for name in ("LocalLauncher", "SlurmLauncher"))]
