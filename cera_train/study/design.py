"""What a study runs: the grid of its section, and what makes its arms comparable. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.common.settings import flatten, require, to_plain
from cera_train.runs.recorded_config import changes_result
from cera_train.settings.run import Config
from cera_train.settings.sweep import LOSS, SCORE, Equal, StudyConfig
from cera_train.study.cells import ARM, SEED, TASK, Cell, read_cells
from cera_train.sweep.folder import ComposeJob, grid, key_of, record_of
from cera_train.sweep.record import SweepRecord

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
    dimensions = study_dimensions(study)
    jobs = [
        [word for choice in job for word in (choice, *_overrides(choice, study))] for job in grid(config, dimensions)
    ]
    return replace(record_of(config, jobs, dimensions), study=OmegaConf.to_container(study))


def study_dimensions(study: Any) -> dict[str, str]:
    """The dimensions of a study: key -> values, as `hydra.sweeper.params` has them.

    Args:
        study: the section, as Hydra composed it.
    """
    dimensions: dict[str, Sequence[Any]] = {TASK: list(study.tasks)} if study.tasks else {}
    dimensions |= {ARM: list(study.arms), **study.conditions, **study.tune}
    dimensions |= {SEED: range(study.tune_seeds or study.seeds)}
    return {key: ",".join(map(_word, values)) for key, values in dimensions.items()}


def _overrides(choice: str, study: Any) -> list[str]:
    """The overrides that make the arm or the task of a choice."""
    key, _, name = choice.partition("=")
    return list({ARM: study.arms, TASK: study.tasks}.get(key, {}).get(name, ()))


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
