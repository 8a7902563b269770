"""The cells of a study: each arm under each condition, its runs, and the values that it is compared
at. Imports no torch.

Every seed runs every tuned value to its end, and an arm is compared at the value that is best on
average over seeds and bases, by the study's first outcome. With `study.tune_seeds=k` the first k
seeds choose, and the others are compared. Where one of these diverges there is no verdict: a value
that is chosen for not having diverged would be chosen by what judges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cera_train.common.settings import key_of, require
from cera_train.runs.results import (
    DIVERGED,
    LOSSES_AFTER,
    Environment,
    RunResult,
    TokenLosses,
    environment_of,
    read_grades,
)
from cera_train.settings.sweep import LOSS, StudyConfig
from cera_train.sweep.folder import job_name
from cera_train.verdicts.tuning import could_gain

if TYPE_CHECKING:
    from cera_train.study.folder import Study

ARM = "study.arm"
BASE = "study.base"
SEED = "train.seed"

PARAMETERS = 0.01  # share by which trainable parameters may differ and count as equal


# --- what a run measured --------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """An outcome of one run on every problem."""

    problems: list[Any]
    """Equal for runs on the same problems: their names, or the supervised tokens of held-out
    rows."""
    values: np.ndarray  # [problems] nats a token, or scores
    weights: np.ndarray | None = None  # [problems]: supervised tokens

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
            values=np.array([grade.score for grade in grades]),
        )

    @property
    def mean(self) -> float:
        return float(np.average(self.values, weights=self.weights))


@dataclass(frozen=True)
class ComparedRun:
    """A run that stands for its cell."""

    folder: Path
    base: str | None
    study: StudyConfig

    @cached_property
    def result(self) -> RunResult:
        return RunResult.read(self.folder / "result.json")

    @cached_property
    def environment(self) -> Environment:
        return environment_of(self.folder)

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        return {name: Outcome.read(name, self.folder) for name in self.study.outcomes}

    @property
    def rows(self) -> dict[str, Any]:
        """What is equal for runs that can be compared."""
        rows = {}
        if not any(
            word.startswith("model") for words in self.study.arms.values() for word in words
        ):
            rows["base weights"] = self.environment.base_weights
        for split, digest in (self.environment.rows or {}).items():
            rows[f"{split.replace('_', '-')} rows"] = digest
        for name, outcome in self.outcomes.items():
            rows[f"problems of {name}"] = outcome.problems
        return rows


# --- cells ----------------------------------------------------------------------------------------


class Replicate(NamedTuple):
    """One of the runs of a grid point."""

    base: str | None  # None where a study has no bases
    seed: int


@dataclass(frozen=True)
class GridPoint:
    """One value of each tuned setting, for an arm."""

    values: dict[str, str]  # such as {"optimizer.lr": "0.001"}
    overrides: list[str]  # the overrides of one of its runs with seed 0


class Edge(NamedTuple):
    """A tuned setting that is best at the end of its grid."""

    arm: str
    key: str
    best: float
    neighbour: float

    def __str__(self) -> str:
        """The edge in words, such as `cera at the largest optimizer.lr, 0.01`."""
        end = "smallest" if self.best < self.neighbour else "largest"
        return f"{self.arm} at the {end} {self.key}, {self.best:g}"

    @property
    def beyond(self) -> str | None:
        """The next value by the ratio of the last two; None beside 0, which has no ratio."""
        if min(self.best, self.neighbour) <= 0:
            return None
        return f"{self.best * self.best / self.neighbour:g}"


@dataclass(frozen=True, eq=False)
class Cell:
    """An arm under a condition."""

    study: Study
    arm: str
    choices: dict[str, str]
    """The condition, such as {"adapter.r": "16"}."""
    grid: list[GridPoint]

    @property
    def condition(self) -> str:
        """The condition in words, such as `adapter.r=16`; empty where a study has none."""
        return ", ".join(f"{key}={value}" for key, value in self.choices.items())

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.condition}" if self.condition else self.arm

    @property
    def tuning_runs(self) -> list[Replicate]:
        """Runs at every value, which choose."""
        return self._replicates(range(self.study.config.tune_seeds or self.study.config.seeds))

    @property
    def compared_runs(self) -> list[Replicate]:
        """Runs at the chosen value."""
        return self._replicates(range(self.study.config.tune_seeds or 0, self.study.config.seeds))

    @property
    def fresh_runs(self) -> list[Replicate]:
        """Runs that are compared without having chosen."""
        return [run for run in self.compared_runs if run not in self.tuning_runs]

    def _replicates(self, seeds: range) -> list[Replicate]:
        return [Replicate(base, seed) for base in self.study.bases for seed in seeds]

    def overrides(self, point: GridPoint, run: Replicate) -> list[str]:
        """The overrides of a run."""
        words = []
        for word in point.overrides:
            if key_of(word) == BASE:
                words += [f"{BASE}={run.base}", *self.study.config.bases[run.base]]
            elif key_of(word) == SEED:
                words.append(f"{SEED}={run.seed}")
            elif key_of(word) not in self.study.keys_of_bases:
                words.append(word)
        return words

    def folder(self, point: GridPoint, run: Replicate) -> Path:
        """The folder of a run, whether it exists or not."""
        return self.study.folder / job_name(self.overrides(point, run), self.study.record.swept)

    def loss(self, point: GridPoint, run: Replicate) -> float | None:
        """After the last update, the held-out loss, or the part of a task's score that is missed;
        infinite for a run that diverged, None for one that has not ended."""
        folder = self.folder(point, run)
        if not (folder / "result.json").exists():
            return math.inf if (folder / DIVERGED).exists() else None
        name = self.study.config.first_outcome
        mean = Outcome.read(name, folder).mean
        return mean if name == LOSS else 1 - mean

    @cached_property
    def losses(self) -> list[list[float | None]]:
        """[grid, tuning runs]"""
        return [[self.loss(point, run) for run in self.tuning_runs] for point in self.grid]

    @cached_property
    def chosen(self) -> GridPoint | None:
        """The lowest mean loss of the tuning runs, where none diverged. None: one has not ended, or
        there is no such point."""
        if any(None in losses for losses in self.losses):
            return None
        means = list(map(fmean, self.losses))
        lowest = min(means)
        return None if math.isinf(lowest) else self.grid[means.index(lowest)]

    @cached_property
    def diverged(self) -> list[Replicate]:
        """The compared runs that diverged."""
        return [run for run in self.compared_runs if self.loss(self.chosen, run) == math.inf]

    @cached_property
    def runs(self) -> list[ComparedRun]:
        """The compared runs that did not diverge. Raises UserError where every point of the grid
        diverged."""
        require(
            self.chosen is not None,
            f"{self.study.folder}: {self.name} diverged at every value of study.tune. Add "
            "smaller values, and repeat the command.",
        )
        return [
            ComparedRun(self.folder(self.chosen, run), run.base, self.study.config)
            for run in self.compared_runs
            if run not in self.diverged
        ]

    def runs_on(self, base: str | None) -> list[ComparedRun]:
        return [run for run in self.runs if run.base == base]

    def missing(self) -> list[str]:
        """The folders of runs that have not ended."""
        needed = [(point, run) for point in self.grid for run in self.tuning_runs]
        if self.chosen is not None:
            needed += [(self.chosen, run) for run in self.fresh_runs]
        return [self.folder(*each).name for each in needed if self.loss(*each) is None]

    def values(self, outcome: str, base: str | None = None) -> np.ndarray:
        """[seeds, problems]"""
        return np.array([run.outcomes[outcome].values for run in self.runs_on(base)], dtype=float)

    def weights(self, outcome: str) -> np.ndarray | None:
        """[problems]: supervised tokens of the rows of a loss."""
        return self.runs[0].outcomes[outcome].weights

    def means(self, outcome: str) -> list[float]:
        """An outcome of each seed; with bases, of each base."""
        by_base = [
            [run.outcomes[outcome].mean for run in self.runs_on(base)] for base in self.study.bases
        ]
        if None in self.study.bases:
            return by_base[0]
        return [fmean(values) for values in by_base if values]

    def figure(self, field: str) -> float | None:
        """The mean over seeds of a field of RunResult, such as `spectrum.gamma`; None where a run
        lacks it."""
        figures = [attrgetter(field)(run.result) for run in self.runs]
        return None if None in figures or not figures else fmean(figures)

    def losses_along(self, key: str, average: Callable = fmean) -> dict[float, float]:
        """The line of the grid through the chosen point along one setting: value -> loss over
        seeds, by size."""
        others = self.chosen.values | {key: ""}
        line = {
            float(point.values[key]): average(losses)
            for point, losses in zip(self.grid, self.losses, strict=True)
            if point.values | {key: ""} == others
        }
        return dict(sorted(line.items()))

    @property
    def edges(self) -> list[Edge]:
        edges = []
        for key, chosen in self.chosen.values.items():
            values = list(self.losses_along(key))
            if len(values) < 2:
                continue
            for best, neighbour, *_ in (values, values[::-1]):
                if best == float(chosen):
                    edges.append(Edge(self.arm, key, best, neighbour))
        return edges

    @property
    def obstacles(self) -> list[str]:
        """What allows no verdict on this arm."""
        obstacles = []
        if self.diverged:
            share = f"{len(self.diverged)} of {len(self.compared_runs)}"
            obstacles.append(f"{self.arm}: {share} judging runs diverged")
        obstacles += [str(edge) for edge in self.edges]
        return obstacles + [
            f"{self.arm} at the only {key}, {chosen}"
            for key, chosen in self.chosen.values.items()
            if len(self.losses_along(key)) == 1
        ]

    def jobs_beyond(self) -> list[list[str]]:
        """The jobs of every tuning run one step beyond each edge, at every value of the others."""
        jobs = []
        for edge, point in itertools.product(self.edges, self.grid):
            if edge.beyond is None or float(point.values[edge.key]) != edge.best:
                continue
            step = f"{edge.key}={edge.beyond}"
            for run in self.tuning_runs:
                words = self.overrides(point, run)
                jobs.append([step if word.startswith(f"{edge.key}=") else word for word in words])
        return jobs

    @property
    def grid_slack(self) -> float:
        """The most by which another value, in the grid or between, could lower the loss: in nats,
        or of a score. Of medians over runs, so that one that breaks down does not bend the curve,
        which is convex in the value's logarithm, or in the value where one is 0."""
        most = 0.0
        for key, chosen in self.chosen.values.items():
            line = self.losses_along(key, median)
            if len(line) < 3:
                continue
            values, losses = np.array(list(line.items())).T
            places = np.log(values) if values.min() > 0 else values
            most += line[float(chosen)] - losses.min() + float(could_gain(losses, places))
        return most
