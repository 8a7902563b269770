"""What a study runs: the grid of its section, what makes its arms comparable, and `hydra/sweeper=study`, which runs the
jobs that have not ended by any launcher. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.files import locked
from cera_train.common.imports import heavy_imports
from cera_train.common.settings import flatten, require, to_plain
from cera_train.distributed.processes import is_main_process
from cera_train.runs.recorded_config import changes_result
from cera_train.settings.run import Config
from cera_train.settings.sweep import LOSS, SCORE, Equal, StudyConfig
from cera_train.study.cells import ARM, SEED, TASK, Cell, read_cells, read_study
from cera_train.sweep.folder import WRITER, ComposeJob, begin, grid, jobs_by_name, key_of, record_of
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.table import job_status

PARAMETERS = 0.01
"""Share by which trainable parameters may differ and count as equal."""

OF_EVERY_METHOD = ("r", "alpha", "dropout", "target_modules", "layers", "start_from")
"""Settings of an adapter that an arm has to name where they differ from the baseline's. The rest of conf/adapter/NAME
is what the method is."""


# --- the grid --------------------------------------------------------------------------------------------------------


def study_of(config: DictConfig) -> StudyConfig:
    """The checked section of a study. `config` has Hydra's section."""
    require(config.study is not None, "hydra/sweeper=study: a study's file says what it compares: add +study=NAME.")
    return OmegaConf.to_object(config.study)


def study_record(config: DictConfig) -> SweepRecord:
    """The content of sweep.json: every arm, task, condition, tuned value and seed that tunes."""
    study = config.study
    dimensions: dict[str, Sequence[Any]] = {TASK: list(study.tasks)} if study.tasks else {}
    dimensions |= {ARM: list(study.arms), **study.conditions, **study.tune}
    dimensions |= {SEED: range(study.tune_seeds or study.seeds)}
    params = {key: ",".join(map(_word, values)) for key, values in dimensions.items()}
    overrides = {f"{key}={name}": words for key, section in ((ARM, study.arms), (TASK, study.tasks))
                 for name, words in section.items()}  # fmt: skip
    jobs = [[word for choice in job for word in (choice, *overrides.get(choice, ()))] for job in grid(config, params)]
    return record_of(config, jobs, params).replace(study=OmegaConf.to_container(study))


def _word(value: Any) -> str:
    """A value as one writes it on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return str(value)


# --- what makes arms comparable --------------------------------------------------------------------------------------


def check_cells(config: DictConfig, record: SweepRecord, compose: ComposeJob[Config]) -> list[tuple[Cell, Config]]:
    """The cells of a study and a run of each.

    Raises:
        UserError: for a seed beside the study's own, and for what `check_arms` refuses.
    """
    seeds = [override for override in config.hydra.overrides.task if key_of(override) == SEED]
    require(not seeds, f"{', '.join(seeds)}: a study has the seeds from 0: study.seeds=N. Leave it out.")
    conditions: dict[str, dict[str, Config]] = {}
    cells = read_cells(Path(config.hydra.sweep.dir), record)
    runs = [compose(cell.candidates[0].overrides) for cell in cells]
    for cell, run in zip(cells, runs, strict=True):
        conditions.setdefault(cell.condition, {})[cell.arm] = run
    for condition, arms in conditions.items():
        check_arms(condition, arms)
    return list(zip(cells, runs, strict=True))


def check_arms(condition: str, arms: dict[str, Config]) -> None:
    """Raises UserError for arms that differ in more than they name, or have unequal budgets under a claim of equal
    ones, or lack an outcome.

    Args:
        condition: in words, for the message.
        arms: the config of each arm under it.
    """
    study = next(iter(arms.values())).study
    reference = study.baseline if study.baseline in arms else next(iter(arms))  # a part of the arms may run elsewhere
    place = f" ({condition})" if condition else ""
    for name, arm in arms.items():
        for key in unnamed_differences(arm, arms[reference]):
            values = [flatten(to_plain(run)).get(key) for run in (arm, arms[reference])]
            raise UserError(
                f"study.arms.{name}{place}: {key} is {values[0]}, and {values[1]} in {reference}, which the arm does "
                f"not name: write {key}=... into one of the two."
            )
    check_budgets(place, arms)
    tasks = arms[reference].train.tasks
    for outcome in study.outcomes:
        mend = f"name a task in train.tasks{place}" if outcome == SCORE else f"add it to train.tasks{place}"
        is_there = outcome in (LOSS, *tasks) or (outcome == SCORE and bool(tasks))
        require(is_there, f"study.outcomes: no run has {outcome}: {mend}.")


def unnamed_differences(arm: Config, reference: Config) -> list[str]:
    """Settings that change results, differ between two arms, and stand in the overrides of neither."""
    study = arm.study
    names = {key_of(word) for run in (arm, reference) for word in study.arms[run.study.arm]}
    settings, others = flatten(to_plain(arm)), flatten(to_plain(reference))

    def is_named(key: str) -> bool:
        if any(key == name or (key.startswith(f"{name}.") and name != "adapter") for name in names):
            return True
        return "adapter" in names and key.startswith("adapter.") and key.split(".")[1] not in OF_EVERY_METHOD

    differ = [key for key, value in settings.items() if value != others.get(key) and changes_result(key)]
    return [key for key in differ if key not in study.tune and not is_named(key)]


def check_budgets(place: str, arms: dict[str, Config]) -> None:
    """Raises UserError where arms have unequal ranks or parameters, and the study claims equal ones."""
    equal = next(iter(arms.values())).study.equal
    if equal == Equal.rank:
        what, tolerance, counts = "ranks", 0.0, {name: arm.adapter.r or 0 for name, arm in arms.items()}
    elif equal == Equal.parameters:
        with heavy_imports():
            from cera_train.planning.count import trainable_parameters

        what, tolerance = "trainable parameters", PARAMETERS
        counts = {name: trainable_parameters(arm) for name, arm in arms.items()}
    else:
        return
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    require(
        counts[most] <= counts[least] * (1 + tolerance),
        f"study.equal={equal}{place}: {most} has {counts[most]:,} {what}, and {least} {counts[least]:,}. Change an "
        "arm, or the claim: study.equal=none.",
    )


def check_problems(runs: Iterable[Config]) -> None:
    """Raises UserError for a task whose problems are among the rows that a run trains on."""
    with heavy_imports():
        from cera_train.evaluation.tasks.overlap import trained_on

    checks = ((task, run.train.changes_of_task(task), run.data) for run in runs for task in run.train.tasks)
    checked = []
    for task, changes, data in checks:
        if (task, changes, data) in checked:
            continue
        checked.append((task, changes, data))
        if shared := trained_on(task, changes, data):
            raise UserError(
                f"train.tasks=[{task}]: {len(shared):,} of its problems are among the training rows, such as "
                f"{shared[0][:60]!r}. Choose other rows or problems."
            )


# --- running it ------------------------------------------------------------------------------------------------------


def is_study(config: DictConfig) -> bool:
    """Whether a sweep is that of a study. `config` has Hydra's section."""
    return config.hydra.sweeper.get("_target_", "").endswith(f".{StudySweeper.__name__}")


def begin_study(config: DictConfig, compose: ComposeJob[Config]) -> None:
    """`begin` for a study: first refuses one that could not answer its question."""
    study = study_of(config)
    require(
        not (config.launch.detach and study.tune_seeds),
        f"launch.detach=true with study.tune_seeds={study.tune_seeds}: the other seeds wait for what these choose. "
        "Leave one out.",
    )

    record = study_record(config)
    pairs = check_cells(config, record, compose)
    check_problems(run for cell, run in pairs if not cell.is_finished)  # a finished cell reads its rows no more
    begin(config, compose, record)


class StudySweeper(Sweeper):
    """Runs the whole grid; with `study.tune_seeds`, then the values that these seeds chose with every other seed."""

    def __init__(self, **_: Any) -> None:
        """Hydra passes the settings, of which a study has none here."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Holds the folder while it runs. Of several processes that run it, the main one holds."""
        self.folder, self.launched = Path(self.config.hydra.sweep.dir), 0
        with locked(self.folder, WRITER) if is_main_process() else contextlib.nullcontext():
            record = SweepRecord.read(self.folder / RECORD)
            self.launch(record.jobs)
            if self.config.study.tune_seeds:
                chosen = [
                    candidate.overrides_of(seed)
                    for cell in read_study(self.folder).cells
                    for seed, candidate in cell.chosen.items()
                    if seed >= cell.tune_seeds
                ]
                jobs = jobs_by_name(chosen, record.swept)
                record.replace(jobs=record.jobs | jobs).write(self.folder / RECORD)
                self.launch(jobs)

    def launch(self, jobs: dict[str, list[str]]) -> None:
        """Runs the jobs that have not ended, and waits for them."""
        waiting = [
            overrides
            for name, overrides in jobs.items()
            if self.config.train.extend or not job_status(self.folder, name).is_over
        ]
        if waiting:
            for job in self.launcher.launch(waiting, initial_job_idx=self.launched):
                _ = job.return_value  # raises what the job did not catch
        self.launched += len(waiting)
