"""The cells of a study: each arm under each condition, its runs, which of them are compared, and
what those measured. Imports no torch.

Every seed runs every tuned value to its end, and an arm is compared at the value that is best on
average, by the study's first outcome. With `study.tune_seeds=k` the first k seeds choose, and the
others are compared.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from cera_train.common.settings import require
from cera_train.runs.evaluation_folder import ENDINGS
from cera_train.runs.results import LOSSES_AFTER, Environment, RunResult, TokenLosses, read_grades
from cera_train.settings.sweep import LOSS, StudyConfig
from cera_train.sweep.folder import RECORD, State, SweepRecord, job_name, job_status, key_of

ARM = "study.arm"
SEED = "train.seed"


def describe(choices: Iterable[tuple[str, str]]) -> str:
    """Such as `adapter.r=16, data.max_length=64`."""
    return ", ".join(f"{key}={value}" for key, value in choices)


@dataclass(frozen=True)
class GridPoint:
    """One value of each tuned setting, for an arm."""

    values: dict[str, str]  # such as {"optimizer.lr": "0.001"}
    overrides: list[str]  # the overrides of its run with seed 0

    def overrides_of(self, seed: int) -> list[str]:
        return [f"{SEED}={seed}" if key_of(word) == SEED else word for word in self.overrides]


class Edge(NamedTuple):
    """A tuned setting that is best at the end of its grid."""

    arm: str
    key: str
    best: float
    neighbour: float

    def __str__(self) -> str:
        """Such as `cera at the largest optimizer.lr, 0.01`."""
        end = "smallest" if self.best < self.neighbour else "largest"
        return f"{self.arm} at the {end} {self.key}, {self.best:g}"

    @property
    def beyond(self) -> str | None:
        """The next value by the ratio of the last two; None beside 0, which has no ratio."""
        if min(self.best, self.neighbour) <= 0:
            return None
        return f"{self.best * self.best / self.neighbour:g}"


@dataclass(frozen=True)
class Outcome:
    """An outcome of one run on every problem."""

    problems: list[Any]
    """Equal for runs on the same problems: their names, or the supervised tokens of held-out
    rows."""
    values: Sequence[float]  # [problems] nats a token, or scores
    weights: np.ndarray | None = None  # [problems]: supervised tokens
    endings: Counter[str] = field(default_factory=Counter)  # how many answers end in each way

    @classmethod
    def read(cls, name: str, run: Path) -> Outcome:
        if name == LOSS:
            losses = TokenLosses.read(run / LOSSES_AFTER)
            require(
                bool(np.isfinite(losses.losses).all()),
                f"{run}: a loss is not a number: remove the folder, and the study's command trains "
                "the run again.",
            )
            has_loss = losses.tokens > 0
            tokens = losses.tokens[has_loss]
            return cls(losses.tokens.tolist(), losses.sums()[has_loss] / tokens, tokens)
        grades = sorted(read_grades(run, name), key=lambda grade: grade.problem)
        return cls(
            problems=[grade.problem for grade in grades],
            values=[grade.score for grade in grades],
            endings=Counter(grade.ending for grade in grades),
        )


@dataclass(frozen=True)
class ComparedRun:
    """A run that stands for its cell."""

    folder: Path
    outcome_names: list[str]

    @cached_property
    def result(self) -> RunResult:
        return RunResult.read(self.folder / "result.json")

    @cached_property
    def environment(self) -> Environment:
        return Environment.find(self.folder / "environment.json") or Environment()

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        return {name: Outcome.read(name, self.folder) for name in self.outcome_names}

    @property
    def rows(self) -> dict[str, Any]:
        """What is equal for runs that can be compared."""
        rows: dict[str, Any] = {}
        for split, digest in (self.environment.rows or {}).items():
            rows[f"{split.replace('_', '-')} rows"] = digest
        for name, outcome in self.outcomes.items():
            rows[f"problems of {name}"] = outcome.problems
        return rows


@dataclass(frozen=True, eq=False)
class Cell:
    """An arm under a condition."""

    study: Study
    arm: str
    choices: dict[str, str]
    """The condition, such as {"adapter.r": "16"}, without the settings that the arm sets itself."""
    grid: list[GridPoint]

    @property
    def condition(self) -> str:
        """Such as `adapter.r=16`; empty where a study has none."""
        return describe(self.choices.items())

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.condition}" if self.condition else self.arm

    @property
    def tuning_seeds(self) -> range:
        """Those that run every value, and choose."""
        return range(self.study.config.tune_seeds or self.study.config.seeds)

    @property
    def compared_seeds(self) -> range:
        return range(self.study.config.tune_seeds or 0, self.study.config.seeds)

    @property
    def fresh_seeds(self) -> list[int]:
        """Those that are compared without having chosen."""
        return [seed for seed in self.compared_seeds if seed not in self.tuning_seeds]

    def folder(self, point: GridPoint, seed: int) -> Path:
        """The folder of a seed's run, whether it exists or not."""
        return self.study.folder / job_name(point.overrides_of(seed), self.study.record.swept)

    def loss(self, point: GridPoint, seed: int) -> float | None:
        """After the last update, the held-out loss, or the part of a task's score that is missed;
        infinite for a run that diverged, None for one that has not ended."""
        folder = self.folder(point, seed)
        outcome = self.study.config.outcomes[0]
        result = RunResult.find(folder / "result.json")
        if result is None:
            has_diverged = job_status(self.study.folder, folder.name).state == State.diverged
            return math.inf if has_diverged else None
        if outcome != LOSS:
            return 1 - fmean(grade.score for grade in read_grades(folder, outcome))
        return math.log(result.perplexity) if result.perplexity else math.inf

    @cached_property
    def losses(self) -> list[list[float | None]]:
        """[grid, tuning seeds]"""
        return [[self.loss(point, seed) for seed in self.tuning_seeds] for point in self.grid]

    @cached_property
    def chosen(self) -> GridPoint | None:
        """The lowest mean loss among points that diverged with no seed. None: a run has not ended,
        or there is no such point."""
        if any(None in losses for losses in self.losses):
            return None
        best = None
        lowest = math.inf
        for point, losses in zip(self.grid, self.losses, strict=True):
            has_diverged = math.inf in [self.loss(point, seed) for seed in self.fresh_seeds]
            if not has_diverged and fmean(losses) < lowest:
                best = point
                lowest = fmean(losses)
        return best

    @cached_property
    def runs(self) -> list[ComparedRun]:
        """One for each compared seed. Raises UserError where every point of the grid diverged."""
        require(
            self.chosen is not None,
            f"{self.study.folder}: {self.name} diverged at every value of study.tune. Add "
            "smaller values, and repeat the command.",
        )
        names = self.study.config.outcomes
        return [ComparedRun(self.folder(self.chosen, seed), names) for seed in self.compared_seeds]

    def missing(self) -> list[str]:
        """The runs that have not ended, each with the reason."""
        needed = [(point, seed) for point in self.grid for seed in self.tuning_seeds]
        if self.chosen is not None:
            needed += [(self.chosen, seed) for seed in self.fresh_seeds]
        lines = []
        for point, seed in needed:
            if self.loss(point, seed) is not None:
                continue
            job = job_status(self.study.folder, self.folder(point, seed).name)
            state = f"{job.state}: {job.error}" if job.error else job.state
            choices = describe([*point.values.items(), (SEED, str(seed))])
            lines.append(f"{self.name}, {choices} ({state})")
        return lines

    def values(self, outcome: str) -> np.ndarray:
        """[seeds, problems]"""
        return np.array([run.outcomes[outcome].values for run in self.runs], dtype=float)

    def weights(self, outcome: str) -> np.ndarray | None:
        """[problems]: supervised tokens of the rows of a loss."""
        return self.runs[0].outcomes[outcome].weights

    def means(self, outcome: str) -> list[float]:
        """An outcome of each seed."""
        return np.average(self.values(outcome), axis=1, weights=self.weights(outcome)).tolist()

    def endings(self, outcome: str) -> dict[str, float]:
        """The share of the answers of all seeds that end in each way; empty for a loss."""
        counts = sum((run.outcomes[outcome].endings for run in self.runs), Counter())
        if not counts:
            return {}
        return {ending: counts[ending] / counts.total() for ending in ENDINGS}

    def figure(self, field: str) -> float | None:
        """The mean over seeds of a field of RunResult, such as `spectrum.gamma`; None where a run
        lacks it."""
        figures = [attrgetter(field)(run.result) for run in self.runs]
        return None if None in figures else fmean(figures)

    def losses_along(self, key: str, average: Callable = fmean) -> dict[float, float]:
        """The line of the grid through the chosen point along one setting: value -> loss over
        seeds, by size; empty for words."""
        others = self.chosen.values | {key: ""}
        line = {}
        for point, losses in zip(self.grid, self.losses, strict=True):
            if point.values | {key: ""} != others:
                continue
            try:
                value = float(point.values[key])
            except ValueError:
                return {}
            line[value] = average(losses)
        return dict(sorted(line.items()))

    @property
    def edges(self) -> list[Edge]:
        edges = []
        for key, chosen in self.chosen.values.items():
            values = list(self.losses_along(key))
            if len(values) < 2:
                continue
            for best, neighbour in ((values[0], values[1]), (values[-1], values[-2])):
                if best == float(chosen):
                    edges.append(Edge(self.arm, key, best, neighbour))
        return edges

    def jobs_beyond(self) -> list[list[str]]:
        """The jobs of every tuning seed one step beyond each edge."""
        jobs = []
        for edge in self.edges:
            if edge.beyond is None:
                continue
            for seed in self.tuning_seeds:
                words = self.chosen.overrides_of(seed)
                step = f"{edge.key}={edge.beyond}"
                jobs.append([step if key_of(word) == edge.key else word for word in words])
        return jobs

    @property
    def between(self) -> float:
        """The most by which another value, in the grid or between, could lower the loss: in nats,
        or of a score.

        Near its minimum a loss is a parabola. If its neighbours are higher than the lowest value by
        b on average, the minimum is at most b / 4 below that value. Medians over seeds, so that one
        run that breaks down does not bend the parabola.
        """
        most = 0.0
        for key, chosen in self.chosen.values.items():
            line = self.losses_along(key, median)
            if len(line) < 3:
                continue
            losses = list(line.values())
            lowest = min(losses)
            place = losses.index(lowest)
            around = losses[max(place - 1, 0) : place + 2]
            # A neighbour that diverged says nothing about the bend.
            neighbours = [loss for loss in around if math.isfinite(loss)]
            neighbours.remove(lowest)
            rise = fmean(neighbours) - lowest if neighbours else 0.0
            most += line[float(chosen)] - lowest + rise / 4
        return most


class Pair(NamedTuple):
    """Two cells to compare; the difference is the second minus the first."""

    asked: str  # what the comparison asks
    first: Cell
    second: Cell

    @property
    def choices(self) -> dict[str, str]:
        """The condition, by setting, of both together."""
        return self.first.choices | self.second.choices


@dataclass(frozen=True, eq=False)
class Study:
    """A study's folder, which has, or will have, this record."""

    folder: Path
    record: SweepRecord

    @cached_property
    def config(self) -> StudyConfig:
        schema = OmegaConf.structured(StudyConfig)
        return OmegaConf.to_object(OmegaConf.merge(schema, self.record.study))

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of the record's jobs."""
        grids: dict[tuple[str, tuple], list[GridPoint]] = {}
        for overrides in self.record.jobs.values():
            values = dict(word.partition("=")[::2] for word in overrides)
            if values[SEED] != "0":
                continue
            arm = values[ARM]
            choices = tuple((key, values[key]) for key in self._open_conditions(arm))
            tuned = {key: values[key] for key in self.config.tune}
            grids.setdefault((arm, choices), []).append(GridPoint(tuned, overrides))
        return [Cell(self, arm, dict(choices), grid) for (arm, choices), grid in grids.items()]

    def _open_conditions(self, arm: str) -> list[str]:
        """The conditions whose setting an arm does not set itself."""
        set_by_arm = {key_of(word) for word in self.config.arms[arm]}
        return [key for key in self.config.conditions if key not in set_by_arm]

    @property
    def by_condition(self) -> dict[str, dict[str, Cell]]:
        """Condition -> arm -> cell. An arm that has a condition's setting itself stands under all
        of its values."""
        choices = dict.fromkeys(choice for cell in self.cells for choice in cell.choices.items())
        by_key = [
            [choice for choice in choices if choice[0] == key] for key in self.config.conditions
        ]
        return {
            describe(condition): {
                cell.arm: cell for cell in self.cells if cell.choices.items() <= {*condition}
            }
            for condition in itertools.product(*filter(None, by_key))
        }

    def pairs(self) -> list[Pair]:
        """Every pair of cells to compare, once."""
        pairs: dict[tuple[str, str], Pair] = {}
        for arms in self.by_condition.values():
            for (first, second), asked in self.config.pairs.items():
                if {first, second} <= arms.keys():
                    pair = Pair(asked, arms[first], arms[second])
                    pairs[pair.first.name, pair.second.name] = pair
        return list(pairs.values())

    @property
    def planned_contrasts(self) -> int:
        """The number of contrasts over which Holm's method corrects: all of the study's file.
        Otherwise dropping arms could flip a verdict."""
        planned = 0
        for first, second in self.config.pairs:
            keys = {*self._open_conditions(first), *self._open_conditions(second)}
            planned += math.prod(len(self.config.conditions[key]) for key in keys)
        return max(len(self.pairs()), planned)

    def missing(self) -> list[str]:
        """The runs that have not ended, each with the reason."""
        return [line for cell in self.cells for line in cell.missing()]


def find_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    record = SweepRecord.find(folder / RECORD)
    return None if record is None or record.study is None else Study(folder, record)
