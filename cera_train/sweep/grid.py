"""The jobs of a sweep: its grid, checked before the first job begins, and each job while it runs. A
sweep's state is what its jobs left on disk. The same command skips finished jobs, resumes
interrupted ones and runs missing ones. `config` is what Hydra composed for the sweep, with Hydra's
section. Imports no torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import folder_in_use, is_locked
from cera_train.common.settings import key_of, quoted
from cera_train.common.terminal import print_line
from cera_train.common.trust import redact_tree
from cera_train.data.rows import check_files
from cera_train.distributed.processes import is_main_process
from cera_train.model.path import check_model
from cera_train.runs.records import check_config
from cera_train.runs.results import DIVERGED
from cera_train.settings.run import Config
from cera_train.sweep.folder import (
    JOBS,
    RECORD,
    JobRecord,
    SweepMetric,
    SweepRecord,
    job_choices,
    job_name,
)

WRITER = "sweep"
"""The holder of the folder's lock, for messages. A study holds the lock while it runs, since it
chooses jobs by earlier results."""

ComposeJob = Callable[[Iterable[str]], Any]
"""compose(overrides) -> the checked config of a job; raises UserError for an impossible one."""


# --- the grid -------------------------------------------------------------------------------------


def _dimensions(config: DictConfig, params: Mapping[str, str] | None) -> list[Override]:
    """The dimensions of a sweep: those of its file, then the arguments, which replace dimensions of
    the same key."""
    params = (config.hydra.sweeper.get("params") or {}) if params is None else params
    words = [*(f"{key}={values}" for key, values in params.items()), *_arguments(config.hydra)]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return list({each.get_key_element(): each for each in parser.parse_overrides(words)}.values())


def _arguments(hydra_config: DictConfig) -> list[str]:
    """The overrides as typed: each job resolves the ${...} in them."""
    return OmegaConf.to_container(hydra_config.overrides.task, resolve=False)


def grid(config: DictConfig, params: Mapping[str, str] | None = None) -> list[list[str]]:
    """The overrides of every job that Hydra's basic sweeper runs, in its order. `params` are the
    dimensions, key -> values, instead of `hydra.sweeper.params`."""
    [jobs] = BasicSweeper.split_arguments(_dimensions(config, params), max_batch_size=None)
    return jobs


def job_composer(config: DictConfig, check: Callable[[DictConfig], Any]) -> ComposeJob:
    """compose(overrides) -> the checked config of a job, each composed once and passed through
    `check`."""
    loader = GlobalHydra.instance().config_loader()

    @functools.cache
    def compose(*overrides: str) -> Any:
        return check(loader.load_sweep_config(config, list(overrides)))

    return lambda overrides: compose(*overrides)


def check_jobs(sweep: Path, jobs: Mapping[str, list[str]], compose: ComposeJob) -> None:
    """Composes jobs, name -> overrides, until every value has appeared in a valid one, of the
    finished and of the others, and checks these. A value that is invalid only beside some others
    fails in those jobs, and the rest of the sweep runs.

    Raises:
        Exception: a UserError or Hydra's, if a value cannot be composed, or is invalid in every
            job; what `check_job` refuses.
    """
    seen = {False: set[str](), True: set[str]()}
    failed = dict[str, Exception]()
    for name, values in jobs.items():
        fine = seen[(sweep / name / "result.json").exists()]
        if fine.issuperset(values):
            continue
        try:
            run = compose(values)
        except UserError as error:
            for value in values:
                failed.setdefault(value, error)
            continue
        fine.update(values)
        check_job(run, sweep / name)
    for value, error in failed.items():
        if value not in seen[False] | seen[True]:
            raise error


def check_job(config: Config, folder: Path) -> None:
    """Raises UserError for a job that ended with another config, and is not started again; else for
    a model or files that are not there, before any job waits for its machine. The run checks the
    rest."""
    record = folder / "config.yaml"
    if (folder / "result.json").exists() or (folder / DIVERGED).exists():
        if record.exists():
            check_config(record, config)
        return
    check_model(config.model.path)
    for place, part in config.data.parts():
        with errors_at(place):
            check_files(part.train_files, "data.train_files")
            check_files(part.eval_files, "data.eval_files")


# --- the record -----------------------------------------------------------------------------------


def record_of(
    config: DictConfig, jobs: list[list[str]] | None = None, params: Mapping[str, str] | None = None
) -> SweepRecord:
    """The content of sweep.json: the jobs, as far as the sweeper knows them now.

    Args:
        jobs: the overrides of each job, instead of the grid's.
        params: dimensions that name the jobs even if they have a single value, instead of
            `hydra.sweeper.params`.

    Raises:
        UserError: the folder holds a run or a sweep with other fixed settings.
    """
    folder = Path(config.hydra.sweep.dir)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is the folder of a run: choose another name=... for the sweep.")
    if jobs is None:
        is_grid = config.hydra.sweeper["_target_"].endswith(".BasicSweeper")
        jobs = grid(config) if is_grid else []

    earlier = SweepRecord.find(folder / RECORD)
    # A dimension of an earlier command still names the jobs, even if this command fixes it.
    names_jobs = {*map(key_of, params or ()), *(earlier.swept if earlier else ())}
    swept = set[str]()
    fixed = []
    for dimension in _dimensions(config, params):
        if dimension.is_sweep_override() or dimension.key_or_group in names_jobs:
            swept.add(dimension.key_or_group)
        else:
            fixed.append(f"{dimension.get_key_element()}={dimension.get_value_element_as_str()}")
    fixed = redact_tree(job_choices(fixed, swept=("recipe", "study")))
    if earlier is not None and any(
        key_of(choice) not in swept for choice in {*earlier.fixed} ^ {*fixed}
    ):
        raise UserError(
            f"name={folder.name}: {folder} holds a sweep with other fixed settings "
            f"({' '.join(earlier.fixed) or 'none'}; here {' '.join(fixed) or 'none'}), and its "
            "jobs are named by what varies. Choose another name=..."
        )
    return SweepRecord(
        sorted(swept),
        jobs_by_name(jobs, swept),
        fixed,
        sys.argv,
        SweepMetric(config.sweep.metric),
    )


def jobs_by_name(jobs: Iterable[list[str]], swept: Collection[str]) -> dict[str, list[str]]:
    """The overrides of each job by the name of its folder."""
    return {job_name(job, swept): job for job in jobs}


def begin(config: DictConfig, compose: ComposeJob, record: SweepRecord) -> None:
    """Writes sweep.json. First refuses what `check_jobs` refuses, and a folder that another command
    holds."""
    folder = Path(config.hydra.sweep.dir)
    check_jobs(folder, record.jobs, compose)
    # Another process may find the lock of its own command.
    if is_main_process() and is_locked(folder):
        raise folder_in_use(folder, WRITER)

    # Optuna's sweeper has a direction.
    if "direction" in config.hydra.sweeper and not OmegaConf.is_list(
        config.hydra.sweeper.direction
    ):
        config.hydra.sweeper.direction = (
            "maximize" if record.metric.higher_is_better else "minimize"
        )
    # A name or recipe of a job must not move it elsewhere.
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")
    # Every process of a run writes the same record, so that none reads it too early.
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder / RECORD)


@dataclass(frozen=True)
class Job:
    """One job, while it runs."""

    sweep: Path  # the sweep's folder
    name: str  # the job's folder in it
    number: int
    count: int  # number of jobs; 0: the sweeper decides as it goes

    @classmethod
    def current(cls, hydra_config: DictConfig) -> Job:
        """The job that Hydra has just started, from `HydraConfig.get()`."""
        sweep = Path(hydra_config.sweep.dir)
        record = SweepRecord.read(sweep / RECORD)
        name = job_name(_arguments(hydra_config), record.swept)
        names = list(record.jobs)
        number = names.index(name) if name in names else hydra_config.job.num
        return cls(sweep, name, number + 1, len(names))

    @property
    def record(self) -> Path:
        return self.sweep / JOBS / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """The job's output, if several run at once."""
        return self.sweep / JOBS / f"{self.name}.log"

    @property
    def title(self) -> str:
        return f"{self.number}{f' of {self.count}' if self.count else ''}: {self.name}"

    def start(self) -> None:
        """Prints the job's title and clears the error of an earlier start."""
        if is_main_process():
            # Hydra's own record does not redact secrets.
            (self.sweep / "multirun.yaml").unlink(missing_ok=True)
            print()
            print_line("job", self.title)
            self._write(None)

    def fail(self, error: str) -> None:
        """Writes the job's error for the table. If several processes fail, the first error
        stays."""
        if is_main_process() or (record := JobRecord.find(self.record)) is None or not record.error:
            self._write(error)

    def _write(self, error: str | None) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        JobRecord(error).write(self.record)
