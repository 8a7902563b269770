"""`hydra/launcher=together`: Hydra's launcher that trains jobs of a sweep on one base. What a job leaves is what it
leaves by any other launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from cera_train.cli.start import errors_in_one_line
from cera_train.cli.train import TRAIN, fail, prepare, run
from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.common.terminal import print_line
from cera_train.distributed.processes import is_one_of_several
from cera_train.settings.run import Config
from cera_train.sweep.folder import Job
from cera_train.training.together import Pack, describe_packs, pack_jobs


@dataclass
class Prepared:
    """A job of a sweep before it trains, and what came of it."""

    job: Job
    config: Config | None
    """None: it failed already."""
    metric: float | None = None
    """Its `sweep.metric`."""


class Together(Launcher):
    """Trains, in this process, the jobs that can share a base together, and each of the others alone."""

    def __init__(self, **_: Any) -> None:
        """Hydra passes the settings, of which there are none."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs jobs; returns their `sweep.metric`, None for one that failed."""
        setup_globals()
        with errors_in_one_line(TRAIN):
            if is_one_of_several():
                raise UserError("jobs that train together share one process: start one of a machine.")
            returns = [self._compose(list(job), initial_job_idx + place) for place, job in enumerate(job_overrides)]
            jobs = [returned.return_value for returned in returns]
            ready = [job for job in jobs if job.config is not None]
            for pack in choose_packs([job.config for job in ready], self._most):
                train_pack([ready[number] for number in pack.jobs])
        for returned, job in zip(returns, jobs, strict=True):
            returned.return_value = job.metric
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


def choose_packs(configs: Sequence[Config], most: Callable[[Sequence[Config]], int]) -> list[Pack]:
    """Jobs in packs that share a base, printed in a line. Raises UserError where `launch.together` wants packs, and
    every job trains alone."""
    packs = pack_jobs(configs, most)
    text = describe_packs(packs)
    wanted = {config.launch.together for config in configs} - {None, "auto", "1"}
    if wanted and len(configs) > 1 and len(packs) == len(configs):
        raise UserError(f"launch.together={wanted.pop()}: {text}. Leave it out.")
    print()
    print_line("together", text)
    return packs


def train_pack(jobs: Sequence[Prepared]) -> None:
    """Trains jobs on one base, and keeps what came of each."""
    print()
    print_line("jobs" if len(jobs) > 1 else "job", ", ".join(f"{job.job.number} {job.job.name}" for job in jobs))
    with heavy_imports():
        from cera_train.distributed.signals import Interrupted
        from cera_train.training.train import train_together
    try:
        if len(jobs) == 1:  # on every GPU
            jobs[0].metric = run(jobs[0].config)
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
            job.metric = outcome.get(job.config.sweep.metric)


def launchers() -> list[type[Launcher]]:
    """Our launchers; those of a cluster where submitit's are installed."""
    Plugins.instance()  # executes the modules of plugins, those that were imported before too
    try:
        from cera_train.cli.cluster import SubmititLocalLauncher, SubmititSlurmLauncher
    except ImportError:
        return [Together]
    return [Together, SubmititLocalLauncher, SubmititSlurmLauncher]
