"""The cells of a study: each arm under each condition, its runs, and which of them judge it. Imports no
torch.

Every seed runs every tuned value to its end. A seed is judged at the values that the other seeds choose, by their mean
held-out loss: no run judges a choice that it made. `study.tune_seeds=k` lets the first k seeds choose for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf

from cera_train.runs.results import RunResult
from cera_train.settings.sweep import StudyConfig
from cera_train.sweep.folder import job_name, key_of
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.table import State, job_status

ARM, SEED = "study.arm", "train.seed"


@dataclass(frozen=True)
class Candidate:
    """Tuned values of an arm."""

    values: dict[str, str]
    """Such as {"optimizer.lr": "0.001"}."""
    overrides: list[str]
    """The overrides of its run with seed 0."""
    sweep: Path
    swept: Sequence[str]

    def overrides_of(self, seed: int) -> list[str]:
        return [f"{SEED}={seed}" if key_of(word) == SEED else word for word in self.overrides]

    def run(self, seed: int) -> Path:
        """The folder of a seed's run, there or not."""
        return self.sweep / job_name(self.overrides_of(seed), self.swept)

    def loss(self, seed: int) -> float | None:
        """Held-out loss after the last update; infinite for a run that diverged, None for one that has not ended."""
        run = self.run(seed)
        if (result := RunResult.find(run / "result.json")) is not None:
            return math.log(result.perplexity) if result.perplexity else math.inf
        return math.inf if job_status(self.sweep, run.name).state == State.diverged else None


@dataclass(frozen=True)
class Cell:
    """An arm under a condition."""

    arm: str
    choices: dict[str, str]
    """The condition, such as {"adapter.r": "16"}."""
    candidates: list[Candidate]
    seeds: int
    tune_seeds: int | None

    @property
    def condition(self) -> str:
        """Such as `adapter.r=16`; empty where a study has none."""
        return ", ".join(f"{key}={value}" for key, value in self.choices.items())

    @property
    def name(self) -> str:
        return ", ".join(filter(None, [self.arm, self.condition]))

    @property
    def tuning(self) -> range:
        """The seeds that run every value."""
        return range(self.tune_seeds or self.seeds)

    @cached_property
    def losses(self) -> list[list[float | None]]:
        """[candidates, tuning seeds]"""
        return [[candidate.loss(seed) for seed in self.tuning] for candidate in self.candidates]

    @cached_property
    def chosen(self) -> dict[int, Candidate]:
        """Seed -> the values that judge it. Empty: a run that chooses has not ended, or every value diverged."""
        # Values that diverged with one seed are no choice for any.
        rows = [(row, each) for row, each in zip(self.losses, self.candidates, strict=True) if math.inf not in row]
        if not rows or any(None in row for row in self.losses):
            return {}

        def best_for(seed: int) -> Candidate:
            others = [other for other in self.tuning if other != seed or self.tune_seeds or self.seeds == 1]
            return min(rows, key=lambda pair: fmean(pair[0][other] for other in others))[1]

        return {seed: best_for(seed) for seed in range(self.seeds)}

    @property
    def runs(self) -> dict[int, Path]:
        """Seed -> the folder of the run that judges it, there or not."""
        return {seed: candidate.run(seed) for seed, candidate in self.chosen.items()}

    def is_edge(self, key: str, value: str) -> bool:
        """Whether a tuned number is the least or the largest of its grid: a better one may lie beyond it."""
        try:
            numbers = {float(candidate.values[key]) for candidate in self.candidates}
        except ValueError:
            return False
        return len(numbers) > 1 and float(value) in (min(numbers), max(numbers))

    def missing(self) -> list[str]:
        """The runs that have not ended, each with why."""
        pairs = [(candidate, seed) for candidate in self.candidates for seed in self.tuning]
        pairs += [(candidate, seed) for seed, candidate in self.chosen.items() if seed not in self.tuning]
        texts = []
        for candidate, seed in pairs:
            if candidate.loss(seed) is None:
                job = job_status(candidate.sweep, candidate.run(seed).name)
                words = [*(f"{key}={value}" for key, value in candidate.values.items()), f"{SEED}={seed}"]
                why = f"{job.state}: {job.error}" if job.error else job.state
                texts.append(f"{', '.join([self.name, *words])} ({why})")
        return texts


@dataclass(frozen=True)
class Study:
    """A study's folder."""

    folder: Path
    config: StudyConfig
    cells: list[Cell]
    """In the order of its grid."""

    @property
    def by_condition(self) -> dict[str, dict[str, Cell]]:
        """Condition -> arm -> cell."""
        conditions: dict[str, dict[str, Cell]] = {}
        for cell in self.cells:
            conditions.setdefault(cell.condition, {})[cell.arm] = cell
        return conditions

    def contrasts(self) -> list[tuple[str, Cell, Cell]]:
        """Every comparison: what it asks, and its two cells; the difference is the second minus the first."""
        return [
            (asked, arms[first], arms[second])
            for arms in self.by_condition.values()
            for (first, second), asked in self.config.pairs.items()
            if {first, second} <= arms.keys()
        ]

    def missing(self) -> list[str]:
        """The runs that have not ended, each with why."""
        return [text for cell in self.cells for text in cell.missing()]


def find_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    record = SweepRecord.find(folder / RECORD)
    return None if record is None or record.study is None else study_on_record(folder, record)


def study_on_record(folder: Path, record: SweepRecord) -> Study:
    """The study of a folder that has, or will have, this record."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConfig), record.study))
    candidates: dict[tuple, list[Candidate]] = {}
    for overrides in record.jobs.values():
        words = dict(word.partition("=")[::2] for word in overrides)
        if words[SEED] == "0":
            place = words[ARM], *(words[key] for key in config.conditions)
            values = {key: words[key] for key in config.tune}
            candidates.setdefault(place, []).append(Candidate(values, overrides, folder, record.swept))
    cells = [
        Cell(arm, dict(zip(config.conditions, choices, strict=True)), values, config.seeds, config.tune_seeds)
        for (arm, *choices), values in candidates.items()
    ]
    return Study(folder, config, cells)
