"""What a study runs: the grid of its section, what makes its arms comparable, and
`hydra/sweeper=study`, which runs the jobs that have not ended by any launcher. Imports no torch."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.files import locked
from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import key_of, quoted, require, word_of
from cera_train.distributed.processes import is_main_process
from cera_train.settings.run import Config
from cera_train.settings.sweep import LOSS, Equal, StudyConfig
from cera_train.study.cells import ARM, BASE, PARAMETERS, SEED, Cell, Replicate
from cera_train.study.folder import Study, read_config
from cera_train.sweep.folder import RECORD, SweepRecord
from cera_train.sweep.grid import (
    WRITER,
    ComposeJob,
    begin,
    grid,
    job_composer,
    jobs_by_name,
    record_of,
)

PLAIN_WORD = r"(?a)[\w /+.$%*@?|:-]*|.*\$\{.*"  # what a grid of Hydra's takes without quotes

EXTENSIONS = 6  # steps beyond the end of a grid at most

COMMON_SETTINGS = ("r", "dropout", "target_modules", "start_from")
"""Settings that every adapter has, and that an arm has to name where they differ from the
baseline's. The rest of conf/adapter/NAME is what the method is."""


# --- the grid -------------------------------------------------------------------------------------


def study_record(config: DictConfig) -> SweepRecord:
    """The content of sweep.json: every arm, base, condition, tuned value and seed that tunes. What
    an arm or a base sets stands in the place of an argument. `config` has Hydra's section."""
    section = OmegaConf.to_container(config.study)
    study = read_config(section)
    dimensions: dict[str, Sequence[Any]] = {ARM: list(study.arms)}
    if study.bases:
        dimensions[BASE] = list(study.bases)
    dimensions |= {**study.conditions, **study.tune}
    dimensions[SEED] = range(study.tune_seeds or study.seeds)
    params = {key: ",".join(map(grid_word, values)) for key, values in dimensions.items()}
    overrides = {f"{ARM}={name}": words for name, words in study.arms.items()}
    of_bases = {f"{BASE}={name}": words for name, words in study.bases.items()}
    jobs = []
    for arm, *choices in grid(config, params):
        require(arm in overrides, f"{arm}: no such arm: choose from {', '.join(study.arms)}.")
        words = [arm, *overrides[arm]]
        decided = {key_of(word) for word in itertools.chain(overrides[arm], *of_bases.values())}
        for choice in choices:
            require(
                key_of(choice) != BASE or choice in of_bases,
                f"{choice}: no such base: choose from {', '.join(study.bases)}.",
            )
            if key_of(choice) not in decided:
                words += [choice, *of_bases.get(choice, [])]
        jobs.append(words)
    return record_of(config, jobs, params).replace(study=section)


def grid_word(value: Any) -> str:
    """A value as written in a grid of Hydra's: quoted if it has signs of Hydra's grammar."""
    word = word_of(value)
    is_plain = not isinstance(value, str) or re.fullmatch(PLAIN_WORD, word)
    return word if is_plain else quoted(word)


# --- what makes arms comparable -------------------------------------------------------------------


def check_cells(config: DictConfig, study: Study, compose: ComposeJob) -> None:
    """Raises UserError where an argument varies what the study's file does not, or sets the seed,
    or where arms cannot be compared."""
    other = {*study.record.swept} - {ARM, BASE, *study.config.conditions, *study.config.tune}
    words = [word for word in config.hydra.overrides.task if key_of(word) in other]
    require(
        not words,
        f"{', '.join(words)}: a study varies its arms, bases, conditions and tuned values, over "
        "the seeds from 0 (study.seeds=N): write it into study.conditions, or leave it out.",
    )
    for (condition, cells), base in itertools.product(study.by_condition.items(), study.bases):
        runs = {
            arm: compose(cell.overrides(cell.grid[0], Replicate(base, 0)))
            for arm, cell in cells.items()
        }
        where = ", ".join(filter(None, (condition, base)))
        check_arms(study.config, f" ({where})" if where else "", runs)


def check_arms(study: StudyConfig, place: str, runs: dict[str, Config]) -> None:
    """Raises UserError for arms that differ in a setting of every adapter that neither names, that
    are alike, that break the claim of equal budgets, or that lack an outcome.

    Args:
        place: the condition and the base, for messages.
        runs: arm -> its config there.
    """
    # The baseline may run elsewhere: a command may choose some of the arms.
    reference = study.baseline if study.baseline in runs else next(iter(runs))
    for arm, run in runs.items():
        words = [*study.arms[arm], *study.arms[reference], *study.tune]
        named = {key_of(word) for word in words}
        for setting in COMMON_SETTINGS:
            key = f"adapter.{setting}"
            value = getattr(run.adapter, setting)
            expected = getattr(runs[reference].adapter, setting)
            require(
                value == expected or key in named,
                f"study.arms.{arm}{place}: {key} is {value}, and {expected} in {reference}, which "
                f"the arm does not name: write {key}=... into one of the two.",
            )
    for arm, other in itertools.combinations(runs, 2):
        require(
            replace(runs[arm], study=None) != replace(runs[other], study=None),
            f"study.arms.{other}{place}: the same run as {arm}. Change one, or leave it out.",
        )
    if study.equal == Equal.parameters:
        check_budgets(place, runs)
    for (arm, run), outcome in itertools.product(runs.items(), study.outcomes):
        require(
            outcome in (LOSS, *run.train.tasks),
            f"study.outcomes: {arm} has no {outcome}: add it to train.tasks{place}.",
        )


def check_budgets(place: str, runs: dict[str, Config]) -> None:
    """Raises UserError where arms have unequal numbers of trainable parameters."""
    with heavy_imports():
        from cera_train.planning.dry_run import trainable_parameters

    counts = {arm: trainable_parameters(run) for arm, run in runs.items()}
    least = min(counts, key=counts.get)
    most = max(counts, key=counts.get)
    require(
        counts[most] <= counts[least] * (1 + PARAMETERS),
        f"study.equal=parameters{place}: {most} has {counts[most]:,} trainable parameters, and "
        f"{least} {counts[least]:,}. Change an arm, or the claim: study.equal=none.",
    )


# --- running it -----------------------------------------------------------------------------------


class StudySweeper(Sweeper):
    """Runs the whole grid; with `study.extend`, then values beyond its edges; with
    `study.tune_seeds`, then what these seeds chose with every other seed."""

    check: Callable[[DictConfig], Any]
    """Turns the composed config of a job into its checked one."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config
        self.folder = Path(config.hydra.sweep.dir)
        self.compose = job_composer(config, self.check)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context, task_function, config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Locks the folder while it runs; of several processes, the main one does. First refuses a
        study that could not answer its question."""
        # The copy in the folder lacks secrets, which jobs may need.
        self.record = study_record(self.config)
        study = Study(self.folder, self.record)
        check_cells(self.config, study, self.compose)
        begin(self.config, self.compose, self.record)
        self.launched = 0
        with locked(self.folder, WRITER) if is_main_process() else contextlib.nullcontext():
            self.launch(self.record.jobs)
            for _ in range(EXTENSIONS if study.config.extend else 0):
                beyond = [job for cell in self.tuned_cells() for job in cell.jobs_beyond()]
                self.add(filter(self.is_possible, beyond))
            self.add(
                cell.overrides(cell.chosen, run)
                for cell in self.tuned_cells()
                for run in cell.fresh_runs
            )

    def tuned_cells(self) -> list[Cell]:
        """The cells whose tuned values are chosen."""
        return [cell for cell in Study(self.folder, self.record).cells if cell.chosen]

    def is_possible(self, overrides: list[str]) -> bool:
        """Whether a job composes: a step may leave a setting's range, as a dropout of 1.6 does, or
        ask for half a row."""
        try:
            self.compose(overrides)
        except (UserError, HydraException):
            return False
        return True

    def add(self, jobs: Iterable[list[str]]) -> None:
        """Adds jobs to the record, and runs them."""
        by_name = jobs_by_name(jobs, self.record.swept)
        self.record = self.record.replace(jobs=self.record.jobs | by_name)
        self.record.write(self.folder / RECORD)
        self.launch(by_name)

    def launch(self, jobs: dict[str, list[str]]) -> None:
        """Runs jobs, and waits for them. Those that have ended do not run again."""
        for job in self.launcher.launch([*jobs.values()], initial_job_idx=self.launched):
            _ = job.return_value  # raises what the job did not catch
        self.launched += len(jobs)
