"""A study: a sweep that answers a question about methods. Imports no torch.

Each arm is tuned under each condition by successive halving, on the first seeds; then all are run at the chosen values.
The folder is a sweep's: sweep.json has the study, halving.json what was chosen and by which losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean

from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.common.settings import flatten, require, to_plain
from cera_train.common.terminal import spanned
from cera_train.runs.recorded_config import changes_result
from cera_train.settings.run import Config
from cera_train.settings.sweep import LOSS, SCORE, Equal, StudyConfig
from cera_train.sweep.arms import ARM, SEED, TASK, study_dimensions, with_arms
from cera_train.sweep.folder import ComposeJob, grid, job_name, key_of, named, record_of
from cera_train.sweep.halving import Halving, begin_halving
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.rungs import Candidate, Group, HalvingRecord, StudyRules, groups_of
from cera_train.sweep.table import State, job_status

PARAMETERS = 0.01
"""Share by which trainable parameters may differ and count as equal."""

OF_EVERY_METHOD = ("r", "alpha", "dropout", "target_modules", "layers", "start_from")
"""Settings of an adapter that an arm has to name where they differ from the baseline's. The rest of conf/adapter/NAME
is what the method is."""


def is_study(config: DictConfig) -> bool:
    """Whether a sweep is that of a study. `config` has Hydra's section."""
    return config.hydra.sweeper.get("_target_", "").endswith(f".{StudySweeper.__name__}")


def begin_study(config: DictConfig, compose: ComposeJob[Config]) -> None:
    """`begin` for a study: first refuses one that could not answer its question."""
    study, folder = study_of(config), Path(config.hydra.sweep.dir)

    def checked_record(config: DictConfig) -> SweepRecord:
        record = study_record(config)
        runs = check_cells(config, record, compose)
        groups = groups_of(record, study.tune)
        check_problems(
            run
            for group, run in zip(groups, runs, strict=True)
            if not _cell(folder, group, record, study).is_finished  # else it reads its rows no more
        )
        return record

    begin_halving(config, compose, study_rules(config), checked_record)


def study_record(config: DictConfig) -> SweepRecord:
    """The content of sweep.json: the jobs on the seeds that choose. The others follow at the chosen values."""
    dimensions = study_dimensions(config.study)
    jobs = with_arms([job for job in grid(config, dimensions) if seed_of(job) < config.study.tune_seeds], config.study)
    return replace(record_of(config, jobs, dimensions), study=OmegaConf.to_container(config.study))


def study_rules(config: DictConfig) -> StudyRules:
    return StudyRules(list(config.study.tune), config.study.first or 1, config.study.factor)


def study_of(config: DictConfig) -> StudyConfig:
    """The checked section of a study. `config` has Hydra's section."""
    require(config.study is not None, "hydra/sweeper=study: a study's file says what it compares: add +study=NAME.")
    return OmegaConf.to_object(config.study)


def check_cells(config: DictConfig, record: SweepRecord, compose: ComposeJob[Config]) -> list[Config]:
    """A run of each cell, in the order of `groups_of` the content of sweep.json. Raises UserError for what `check_arms`
    refuses, and for a seed beside the study's own."""
    seeds = [override for override in config.hydra.overrides.task if key_of(override) == SEED]
    require(not seeds, f"{', '.join(seeds)}: a study has the seeds from 0: study.seeds=N. Leave it out.")
    cells: dict[str, dict[str, Config]] = {}
    groups = groups_of(record, list(config.study.tune))
    runs = [compose(next(iter(group.jobs.values()))) for group in groups]
    for group, run in zip(groups, runs, strict=True):
        arm, condition = place_of(group, run.study)
        cells.setdefault(condition, {})[arm] = run
    for condition, arms in cells.items():
        check_arms(condition, arms)
    return runs


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


def check_problems(runs: Iterable[Config]) -> None:
    """Raises UserError for a task whose problems are among the rows that a run trains on."""
    with heavy_imports():
        from cera_train.evaluation.tasks.overlap import trained_on

    seen = []
    for run, task in ((each, task) for each in runs for task in each.train.tasks):
        judged = task, run.train.changes_of_task(task), run.data
        if judged in seen:
            continue
        seen.append(judged)
        if trained := trained_on(*judged):
            raise UserError(
                f"train.tasks=[{task}]: {len(trained):,} of its problems are among the training rows, such as "
                f"{trained[0][:60]!r}. Choose other rows or problems."
            )


def unnamed_differences(arm: Config, reference: Config) -> list[str]:
    """Settings that change results, differ between two arms, and stand in the overrides of neither."""
    study = arm.study
    named = {key_of(word) for run in (arm, reference) for word in study.arms[run.study.arm]}
    ours, theirs = flatten(to_plain(arm)), flatten(to_plain(reference))
    differ = [key for key in ours if ours[key] != theirs.get(key) and changes_result(key) and key not in study.tune]

    def is_named(key: str) -> bool:
        if any(key == other or (key.startswith(f"{other}.") and other != "adapter") for other in named):
            return True
        return "adapter" in named and key.startswith("adapter.") and key.split(".")[1] not in OF_EVERY_METHOD

    return [key for key in differ if not is_named(key)]


def check_budgets(place: str, arms: dict[str, Config]) -> None:
    """Raises UserError where arms have unequal ranks or parameters, and the study claims equal ones."""
    study = next(iter(arms.values())).study
    if study.equal == Equal.rank:
        counts = {name: arm.adapter.r or 0 for name, arm in arms.items()}
    elif study.equal == Equal.parameters:
        with heavy_imports():
            from cera_train.planning.count import trainable_parameters

        counts = {name: trainable_parameters(arm) for name, arm in arms.items()}
    else:
        return
    what = "ranks" if study.equal == Equal.rank else "trainable parameters"
    tolerance = 0 if study.equal == Equal.rank else PARAMETERS
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    require(
        counts[most] <= counts[least] * (1 + tolerance),
        f"study.equal={study.equal}{place}: {most} has {counts[most]:,} {what}, and {least} {counts[least]:,}. Change "
        "an arm, or the claim: study.equal=none.",
    )


class StudySweeper(Halving):
    """Halves what each arm may choose under each condition, then runs the best of it with every seed."""

    def find_rules(self) -> StudyRules:
        return study_rules(self.config)

    def run(self) -> None:
        super().run()
        record, study = SweepRecord.read(self.folder / RECORD), self.config.study
        chosen = [best_candidate(self.folder, group) for group in groups_of(record, list(study.tune))]
        seeds = range(study.tune_seeds, study.seeds)
        jobs = [seeded(best, seed) for seed in seeds for best in chosen if best]
        record.with_jobs(named(self.folder, jobs, record.swept)).write(self.folder / RECORD)
        if jobs:
            self.launch("seeds", f"the end, {spanned(seeds, 'seed')}", jobs)


def seed_of(job: list[str]) -> int:
    """The seed of a job by its overrides."""
    return int(_words(job)[SEED])


def seeded(candidate: Candidate, seed: int) -> list[str]:
    """The overrides of a candidate's job on a seed, which may be a new one."""
    return [f"{SEED}={seed}" if key_of(word) == SEED else word for word in next(iter(candidate.jobs.values()))]


def best_candidate(folder: Path, group: Group) -> Candidate | None:
    """The values that an arm chose: those of the lowest evaluation loss at the end, by its mean over the seeds that
    choose, among those that halving let go on to it. None: some are not there yet, or all failed."""
    held, found = HalvingRecord.read(folder), []
    stopped = {} if held is None else held.stops()
    for candidate in group.candidates:
        if candidate.jobs.keys() & stopped.keys():
            continue
        ends = [job_status(folder, job) for job in candidate.jobs]
        if any(end.state not in (State.finished, State.failed) for end in ends):
            return None
        if all(end.state == State.finished for end in ends):
            found.append((geometric_mean(end.value for end in ends), candidate))  # perplexities: that of the mean loss
    return min(found, key=lambda each: each[0])[1] if found else None


# --- what a study left -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One arm on one task under one condition."""

    arm: str
    task: str
    """Empty where the study names no tasks."""
    choices: dict[str, str]
    """The condition, such as {"adapter.r": "16"}."""
    chosen: dict[str, str] | None
    """The tuned values that it chose, such as {"optimizer.lr": "0.001"}; None: it has not chosen yet."""
    runs: dict[int, Path]
    """Seed -> the folder of its run, there or not."""

    @property
    def condition(self) -> str:
        """The task and the condition in words, such as `sums, adapter.r=16`; empty where there is one of each."""
        return in_words(self.task, self.choices)

    @property
    def without_result(self) -> list[int]:
        """The seeds that have none."""
        return [seed for seed, run in self.runs.items() if not (run / "result.json").exists()]

    @property
    def is_finished(self) -> bool:
        return self.chosen is not None and not self.without_result


@dataclass(frozen=True)
class Study:
    """A study's folder."""

    folder: Path
    config: StudyConfig
    cells: list[Cell]

    def contrasts(self) -> list[tuple[str, Cell, Cell]]:
        """Every comparison: what it asks, and its two cells; the difference is the second minus the first."""
        places = {(cell.condition, cell.arm): cell for cell in self.cells}
        return [
            (asked, places[condition, first], places[condition, second])
            for condition in dict.fromkeys(cell.condition for cell in self.cells)
            for (first, second), asked in self.config.pairs.items()
            if {(condition, first), (condition, second)} <= places.keys()
        ]

    def missing(self) -> list[str]:
        """What has not ended, a text each."""
        texts = []
        for cell in self.cells:
            place = ", ".join(filter(None, [cell.arm, cell.condition]))
            if cell.chosen is None:
                texts.append(f"{place}: nothing chosen of {', '.join(self.config.tune)}")
            elif not cell.is_finished:
                texts.append(f"{place}: no result of seed {', '.join(map(str, cell.without_result))}")
        return texts


def holds_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    record = SweepRecord.find(folder / RECORD)
    return record is not None and record.study is not None


def read_study(folder: Path) -> Study:
    """Raises UserError where a folder holds none."""
    if not holds_study(folder):
        raise UserError(f"{folder} holds no study: expected a folder that cera-train -m +study=NAME left.")
    record = SweepRecord.read(folder / RECORD)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConfig), record.study))
    first = replace(record, jobs=[job for job in record.jobs if seed_of(job["overrides"]) < config.tune_seeds])
    return Study(folder, config, [_cell(folder, group, record, config) for group in groups_of(first, config.tune)])


def in_words(task: str, choices: dict[str, str]) -> str:
    return ", ".join([*filter(None, [task]), *(f"{key}={value}" for key, value in choices.items())])


def place_of(group: Group, config: StudyConfig) -> tuple[str, str]:
    """The arm and the condition of a group of candidates, as a `Cell` has them."""
    words = _words(next(iter(group.jobs.values())))
    return words[ARM], in_words(words.get(TASK, ""), {key: words[key] for key in config.conditions})


def _words(overrides: list[str]) -> dict[str, str]:
    """The overrides of a job, key -> value."""
    return dict(word.split("=", 1) for word in overrides)


def _cell(folder: Path, group: Group, record: SweepRecord, config: StudyConfig) -> Cell:
    words = _words(next(iter(group.jobs.values())))
    best, chosen, runs = best_candidate(folder, group), None, {}
    if best is not None:
        found = _words(seeded(best, 0))
        chosen = {key: found[key] for key in config.tune}
        runs = {seed: folder / job_name(seeded(best, seed), record.swept) for seed in range(config.seeds)}
    choices = {key: words[key] for key in config.conditions}
    return Cell(words[ARM], words.get(TASK, ""), choices, chosen, runs)
