"""What a study runs: the grid of its section, what makes its arms comparable, and
`hydra/sweeper=study`, which runs the jobs that have not ended by any launcher. Imports no torch."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.files import locked
from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import require, word_of
from cera_train.common.terminal import print_line
from cera_train.distributed.processes import is_main_process
from cera_train.settings.adapters import Activation, AdapterKind, Mix
from cera_train.settings.run import Config
from cera_train.settings.sweep import LOSS, Equal, StudyConfig
from cera_train.study.cells import ARM, SEED, Cell, Study
from cera_train.sweep.folder import RECORD, SweepRecord, job_status, key_of
from cera_train.sweep.grid import WRITER, ComposeJob, begin, grid, jobs_by_name, record_of

PARAMETERS = 0.01  # share by which trainable parameters may differ and count as equal

EXTENSIONS = 6  # steps beyond the end of a grid at most

OF_EVERY_METHOD = ("r", "dropout", "target_modules", "layers", "start_from")
"""Settings of an adapter that an arm has to name where they differ from the baseline's. The rest of
conf/adapter/NAME is what the method is."""


# --- the grid -------------------------------------------------------------------------------------


def study_of(config: DictConfig) -> StudyConfig:
    """The checked section of a study. `config` has Hydra's section."""
    require(
        config.study is not None,
        "hydra/sweeper=study: a study's file says what it compares: add +study=NAME.",
    )
    return OmegaConf.to_object(config.study)


def study_record(config: DictConfig) -> SweepRecord:
    """The content of sweep.json: every arm, condition, tuned value and seed that tunes. What an arm
    sets itself stands in the place of a condition."""
    study = config.study
    dimensions: dict[str, Sequence[Any]] = {ARM: list(study.arms), **study.conditions, **study.tune}
    dimensions |= {SEED: range(study.tune_seeds or study.seeds)}
    params = {key: ",".join(map(quoted, values)) for key, values in dimensions.items()}
    overrides = {f"{ARM}={name}": words for name, words in study.arms.items()}
    jobs = []
    for arm, *choices in grid(config, params):
        require(arm in overrides, f"{arm}: no such arm: choose from {', '.join(study.arms)}.")
        own = {key_of(word) for word in overrides[arm]}
        jobs.append(
            [arm, *overrides[arm], *(choice for choice in choices if key_of(choice) not in own)]
        )
    return record_of(config, jobs, params).replace(study=OmegaConf.to_container(study))


def quoted(value: Any) -> str:
    """A value as one writes it in a grid of Hydra's: a text with signs of its grammar, in
    quotes."""
    word = word_of(value)
    is_plain = not isinstance(value, str) or re.fullmatch(
        r"[\w /+.$%*@?|:-]*|.*\$\{.*", word, re.ASCII
    )
    return word if is_plain else "'" + word.replace("'", "\\'") + "'"


# --- what makes arms comparable -------------------------------------------------------------------


def check_cells(config: DictConfig, study: Study, compose: ComposeJob) -> None:
    """Raises UserError where train.seed is set beside the study's own seeds, or arms do not
    compare. Names the gates without a control."""
    seeds = [override for override in config.hydra.overrides.task if key_of(override) == SEED]
    require(
        not seeds, f"{', '.join(seeds)}: a study has the seeds from 0: study.seeds=N. Leave it out."
    )
    for condition, cells in study.by_condition.items():
        runs = {arm: compose(cell.candidates[0].overrides) for arm, cell in cells.items()}
        place = f" ({condition})" if condition else ""
        check_arms(study.config, place, runs)
        if runs.keys() == study.config.arms.keys() and (arms := without_control(runs)):
            print_line(
                "control",
                f"{', '.join(arms)}{place}: no arm has the gate's linear part alone, at half the "
                f"scale: add the arm "
                "half: [adapter=cera_identity]",
            )


def check_arms(study: StudyConfig, place: str, runs: dict[str, Config]) -> None:
    """Raises UserError for arms that differ in a setting of every adapter that neither names, that
    are alike, that break the claim of equal budgets, or that lack an outcome.

    Args:
        place: the condition, for messages.
        runs: arm -> its config under it.
    """
    reference = (
        study.baseline if study.baseline in runs else next(iter(runs))
    )  # a part of the arms may run elsewhere
    for arm, run in runs.items():
        names = {key_of(word) for word in [*study.arms[arm], *study.arms[reference], *study.tune]}
        for field in OF_EVERY_METHOD:
            key, value, other = (
                f"adapter.{field}",
                *(getattr(each.adapter, field) for each in (run, runs[reference])),
            )
            require(
                value == other or key in names,
                f"study.arms.{arm}{place}: {key} is {value}, and {other} in {reference}, which "
                f"the arm does not name: "
                f"write {key}=... into one of the two.",
            )
    for arm, other in itertools.combinations(runs, 2):
        require(
            replace(runs[arm], study=None) != replace(runs[other], study=None),
            f"study.arms.{other}{place}: the same run as {arm}. Change one, or leave it out.",
        )
    if study.equal == Equal.parameters:
        check_budgets(place, runs)
    for outcome in study.outcomes:
        is_there = outcome in (LOSS, *runs[reference].train.tasks)
        require(is_there, f"study.outcomes: no run has {outcome}: add it to train.tasks{place}.")


def without_control(runs: dict[str, Config]) -> list[str]:
    """The arms with a gate z / 2 + an even term, of which no arm has the linear part alone: a
    difference may be the gate's or the scale's."""
    scales = {
        arm: (
            run.adapter.activation,
            1.0 if run.adapter.alpha is None else run.adapter.alpha / run.adapter.r,
        )
        for arm, run in runs.items()
        if run.adapter.kind == AdapterKind.cera and run.adapter.mix == Mix.none
    }
    controls = {scale for activation, scale in scales.values() if activation == Activation.identity}
    with_half = (Activation.silu, Activation.gelu, Activation.relu)
    return [
        arm
        for arm, (gate, scale) in scales.items()
        if gate in with_half and scale / 2 not in controls
    ]


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
        f"{least} "
        f"{counts[least]:,}. Change an arm, or the claim: study.equal=none.",
    )


def check_problems(runs: Iterable[Config]) -> None:
    """Raises UserError for a task whose problems are among the rows that a run trains on."""
    with heavy_imports():
        from cera_train.evaluation.tasks.task import (
            describe_trained_on,
            load_problems,
            training_task,
        )

    # The arms of a condition share rows and tasks, and reading them takes long.
    pairs = {
        repr((task, run.train.task_settings, run.data)): (task, run)
        for run in runs
        for task in run.train.tasks
    }
    for task, run in pairs.values():
        problems = load_problems(training_task(task, run.train.changes_of_task(task)), run.data)
        shared = describe_trained_on(problems, run.data)
        require(not shared, f"train.tasks=[{task}]: {shared}. Choose other rows or problems.")


# --- running it -----------------------------------------------------------------------------------


def is_study(config: DictConfig) -> bool:
    """Whether a sweep is that of a study. `config` has Hydra's section."""
    return config.hydra.sweeper.get("_target_", "").endswith(f".{StudySweeper.__name__}")


def begin_study(config: DictConfig, compose: ComposeJob) -> None:
    """`begin` for a study: first refuses one that could not answer its question."""
    study = study_of(config)
    require(
        not (config.launch.detach and (study.tune_seeds or study.extend)),
        "launch.detach=true with study.tune_seeds or study.extend: further jobs follow from what "
        "the first find. Leave "
        "one out.",
    )
    record = study_record(config)
    planned = Study(Path(config.hydra.sweep.dir), record)
    check_cells(config, planned, compose)
    unfinished = [
        cell for cell in planned.cells if cell.missing()
    ]  # a finished cell reads its rows no more
    check_problems(compose(cell.candidates[0].overrides) for cell in unfinished)
    begin(config, compose, record)
    StudySweeper.compose = staticmethod(compose)
    StudySweeper.record = record


class StudySweeper(Sweeper):
    """Runs the whole grid; with `study.extend`, then values beyond its edges; with
    `study.tune_seeds`, then what these seeds chose with every other seed."""

    compose: ClassVar[ComposeJob]  # of the study that begins
    record: ClassVar[SweepRecord]  # the copy in the folder lacks secrets, which jobs may need

    def __init__(self, **_: Any) -> None:
        """Hydra passes the settings, of which a study has none here."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context, task_function, config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Holds the folder while it runs. Of several processes that run it, the main one holds."""
        self.folder = Path(self.config.hydra.sweep.dir)
        self.launched = 0
        with locked(self.folder, WRITER) if is_main_process() else contextlib.nullcontext():
            self.launch(self.record.jobs)
            for _ in range(EXTENSIONS if self.config.study.extend else 0):
                beyond = [
                    overrides for cell in self.cells if cell.chosen for overrides in cell.beyond()
                ]
                if not (possible := list(filter(self.is_possible, beyond))):
                    break
                self.add(possible)
            chosen = [cell for cell in self.cells if cell.chosen]
            self.add([cell.chosen.overrides_of(seed) for cell in chosen for seed in cell.fresh])

    @property
    def cells(self) -> list[Cell]:
        return Study(self.folder, self.record).cells

    def is_possible(self, overrides: list[str]) -> bool:
        """Whether a job composes: a step may leave a setting's range, as a dropout of 1.6 does, or
        a whole number's."""
        try:
            self.compose(overrides)
        except (UserError, HydraException):
            return False
        return True

    def add(self, jobs: list[list[str]]) -> None:
        """Adds jobs to the record, and runs them."""
        if jobs:
            named = jobs_by_name(jobs, self.record.swept)
            self.record = self.record.replace(jobs=self.record.jobs | named)
            self.record.write(self.folder / RECORD)
            self.launch(named)

    def launch(self, jobs: dict[str, list[str]]) -> None:
        """Runs the jobs that have not ended, and waits for them."""
        waiting = [
            overrides
            for name, overrides in jobs.items()
            if not job_status(self.folder, name).is_over
        ]
        if waiting:
            for job in self.launcher.launch(waiting, initial_job_idx=self.launched):
                _ = job.return_value  # raises what the job did not catch
        self.launched += len(waiting)
