"""The cells of a study: each arm under each condition, its runs, which of them are compared, and
what those measured. Imports no torch.

Every seed runs every tuned value to its end, and an arm is compared at the value that is best on
average over seeds and bases, by the study's first outcome. With `study.tune_seeds=k` the first k
seeds choose, and the others are compared.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
from cera_train.study.tuning import could_gain
from cera_train.sweep.folder import RECORD, State, SweepRecord, job_name, job_status, key_of

ARM = "study.arm"
BASE = "study.base"
SEED = "train.seed"


def describe_choices(choices: Iterable[tuple[str, str]]) -> str:
    """Such as `adapter.r=16, data.max_length=64`."""
    return ", ".join(f"{key}={value}" for key, value in choices)


class Replicate(NamedTuple):
    """One of the runs of a grid point."""

    base: str | None  # None where a study has no bases
    seed: int

    def __str__(self) -> str:
        choices = [] if self.base is None else [(BASE, self.base)]
        return describe_choices([*choices, (SEED, str(self.seed))])


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
    values: np.ndarray  # [problems] nats a token, or scores
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
            values=np.array([grade.score for grade in grades]),
            endings=Counter(grade.ending for grade in grades),
        )

    def part(self, rows: np.ndarray) -> Outcome:
        """These of its values."""
        weights = None if self.weights is None else self.weights[rows]
        return replace(self, values=self.values[rows], weights=weights)

    def choosing(self, set_aside: float) -> Outcome:
        """The problems that choose tuned values."""
        return self.part(~is_set_aside(len(self.values), set_aside))

    def judging(self, set_aside: float) -> Outcome:
        """The problems on which arms are compared."""
        return self.part(is_set_aside(len(self.values), set_aside)) if set_aside else self

    @property
    def mean(self) -> float:
        return float(np.average(self.values, weights=self.weights))


def is_set_aside(count: int, share: float) -> np.ndarray:
    """[count] which problems are set aside: this share, spread evenly."""
    return np.diff(np.floor(np.arange(count + 1) * share)) > 0


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
        return Environment.find(self.folder / "environment.json") or Environment()

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        return {
            name: Outcome.read(name, self.folder).judging(self.study.set_aside)
            for name in self.study.outcomes
        }

    @property
    def rows(self) -> dict[str, Any]:
        """What is equal for runs that can be compared."""
        rows: dict[str, Any] = {}
        for split, digest in (self.environment.rows or {}).items():
            rows[f"{split.replace('_', '-')} rows"] = digest
        rows |= self.environment.answers or {}
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
        return describe_choices(self.choices.items())

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.condition}" if self.condition else self.arm

    @property
    def is_imported(self) -> bool:
        """Whether another program ran the arm."""
        return self.study.config.results_of(self.arm) is not None

    @property
    def tuning_runs(self) -> list[Replicate]:
        """Those at every value, which choose."""
        return self._replicates(range(self.study.config.tune_seeds or self.study.config.seeds))

    @property
    def compared_runs(self) -> list[Replicate]:
        """Those at the chosen value."""
        return self._replicates(range(self.study.config.tune_seeds or 0, self.study.config.seeds))

    @property
    def fresh_runs(self) -> list[Replicate]:
        """Those that are compared without having chosen."""
        return [run for run in self.compared_runs if run not in self.tuning_runs]

    def _replicates(self, seeds: range) -> list[Replicate]:
        return [Replicate(base, seed) for base in self.study.bases for seed in seeds]

    def overrides(self, point: GridPoint, run: Replicate) -> list[str]:
        """The overrides of a run."""
        words = []
        for word in point.overrides:
            if key_of(word) == BASE:
                words += self.study.words_of_base(run.base)
            elif key_of(word) == SEED:
                words.append(f"{SEED}={run.seed}")
            elif key_of(word) not in self.study.keys_of_bases:
                words.append(word)
        return words

    def folder(self, point: GridPoint, run: Replicate) -> Path:
        """The folder of a run, whether it exists or not."""
        return self.study.folder / job_name(self.overrides(point, run), self.study.record.swept)

    def loss(self, point: GridPoint, run: Replicate) -> float | None:
        """After the last update, the held-out loss, or the part of a task's score that is missed,
        on the problems that choose; infinite for a run that diverged, None for one that has not
        ended."""
        folder = self.folder(point, run)
        name = self.study.config.primary
        result = RunResult.find(folder / "result.json")
        if result is None:
            has_diverged = job_status(self.study.folder, folder.name).state == State.diverged
            return math.inf if has_diverged else None
        if name == LOSS and not math.isfinite(result.perplexity or math.inf):
            return math.inf
        mean = Outcome.read(name, folder).choosing(self.study.config.set_aside).mean
        return mean if name == LOSS else 1 - mean

    @cached_property
    def losses(self) -> list[list[float | None]]:
        """[grid, tuning runs]"""
        return [[self.loss(point, run) for run in self.tuning_runs] for point in self.grid]

    @cached_property
    def chosen(self) -> GridPoint | None:
        """The lowest mean loss among points at which no run diverged. None: a run has not ended,
        or there is no such point."""
        if any(None in losses for losses in self.losses):
            return None
        best = None
        lowest = math.inf
        for point, losses in zip(self.grid, self.losses, strict=True):
            has_diverged = math.inf in [self.loss(point, run) for run in self.fresh_runs]
            if not has_diverged and fmean(losses) < lowest:
                best = point
                lowest = fmean(losses)
        return best

    @cached_property
    def runs(self) -> list[ComparedRun]:
        """The compared runs. Raises UserError where every point of the grid diverged."""
        require(
            self.chosen is not None,
            f"{self.study.folder}: {self.name} diverged at every value of study.tune. Add "
            "smaller values, and repeat the command.",
        )
        return [
            ComparedRun(self.folder(self.chosen, run), run.base, self.study.config)
            for run in self.compared_runs
        ]

    def runs_on(self, base: str | None) -> list[ComparedRun]:
        return [run for run in self.runs if run.base == base]

    def missing(self) -> list[str]:
        """The runs that have not ended, each with the reason."""
        needed = [(point, run) for point in self.grid for run in self.tuning_runs]
        if self.chosen is not None:
            needed += [(self.chosen, run) for run in self.fresh_runs]
        lines = []
        for point, run in needed:
            if self.loss(point, run) is not None:
                continue
            job = job_status(self.study.folder, self.folder(point, run).name)
            state = f"{job.state}: {job.error}" if job.error else job.state
            choices = ", ".join(filter(None, (describe_choices(point.values.items()), str(run))))
            lines.append(f"{self.name}, {choices} ({state})")
        return lines

    def values(self, outcome: str, base: str | None = None) -> np.ndarray:
        """[seeds, problems] on a base."""
        return np.array([run.outcomes[outcome].values for run in self.runs_on(base)], dtype=float)

    def weights(self, outcome: str, base: str | None = None) -> np.ndarray | None:
        """[problems]: supervised tokens of the rows of a loss."""
        return self.runs_on(base)[0].outcomes[outcome].weights

    def by_base(self, outcome: str) -> dict[str | None, np.ndarray]:
        """Base -> [seeds] an outcome of each seed."""
        return {
            base: np.array([run.outcomes[outcome].mean for run in self.runs_on(base)])
            for base in self.study.bases
        }

    def means(self, outcome: str) -> list[float]:
        """An outcome of each seed; with bases, of each base."""
        return means_of(self.by_base(outcome))

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

    @property
    def obstacles(self) -> list[str]:
        """What allows no verdict on this arm."""
        if self.study.config.tuned_elsewhere is not None:
            return []
        obstacles = [str(edge) for edge in self.edges]
        for key, chosen in self.chosen.values.items():
            if len({point.values[key] for point in self.grid}) == 1:
                obstacles.append(f"{self.arm} at the only {key}, {chosen}")
            elif not self.losses_along(key):
                obstacles.append(f"{self.arm} at {key}={chosen}, which has no order")
        return obstacles

    def jobs_beyond(self) -> list[list[str]]:
        """The jobs of every tuning run one step beyond each edge."""
        jobs = []
        for edge in self.edges:
            if edge.beyond is None:
                continue
            step = f"{edge.key}={edge.beyond}"
            for run in self.tuning_runs:
                words = self.overrides(self.chosen, run)
                jobs.append([step if key_of(word) == edge.key else word for word in words])
        return jobs

    @property
    def lower_by(self) -> float:
        """The most by which another value, in the grid or between, could lower the loss: in nats,
        or of a score. Of medians over runs, so that one that breaks down does not bend the curve.
        """
        most = 0.0
        for key, chosen in self.chosen.values.items():
            line = self.losses_along(key, median)
            if len(line) < 3:
                continue
            losses = list(line.values())
            most += line[float(chosen)] - min(losses) + float(could_gain(losses))
        return most

    higher_by = 0.0
    """The most by which another value could raise the loss: the best one does not."""


def means_of(by_base: dict[str | None, np.ndarray]) -> list[float]:
    """The values of each seed; with several bases, the means of each base."""
    if None in by_base:
        return by_base[None].tolist()
    return [float(values.mean()) for values in by_base.values()]


class Pair(NamedTuple):
    """Two sides to compare, cells or pairs of them: the second minus the first."""

    asked: str  # what the comparison asks
    first: Cell | Pair
    second: Cell | Pair

    @property
    def arm(self) -> str:
        return f"({self.second.arm} - {self.first.arm})"

    @property
    def name(self) -> str:
        return f"({self.second.name} - {self.first.name})"

    @property
    def choices(self) -> dict[str, str]:
        """The condition, by setting, of all sides together."""
        return self.first.choices | self.second.choices

    @property
    def obstacles(self) -> list[str]:
        return list(dict.fromkeys([*self.first.obstacles, *self.second.obstacles]))

    def values(self, outcome: str) -> np.ndarray:
        """[seeds, problems], without bases."""
        return self.second.values(outcome) - self.first.values(outcome)

    def weights(self, outcome: str) -> np.ndarray | None:
        return self.first.weights(outcome)

    def by_base(self, outcome: str) -> dict[str | None, np.ndarray]:
        """Base -> [seeds] the difference of each seed."""
        first = self.first.by_base(outcome)
        return {base: values - first[base] for base, values in self.second.by_base(outcome).items()}

    def means(self, outcome: str) -> list[float]:
        """The difference of each seed; with bases, of each base."""
        return means_of(self.by_base(outcome))

    @property
    def lower_by(self) -> float:
        """The most by which other tuned values could lower the difference."""
        return self.second.lower_by + self.first.higher_by

    @property
    def higher_by(self) -> float:
        """The most by which other tuned values could raise the difference."""
        return self.second.higher_by + self.first.lower_by


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
    def bases(self) -> list[str | None]:
        """Those of the record's jobs; [None] where a study has no bases."""
        words = {word for overrides in self.record.jobs.values() for word in overrides}
        return [name for name in self.config.bases if f"{BASE}={name}" in words] or [None]

    def words_of_base(self, name: str | None) -> list[str]:
        """The overrides that choose a base."""
        return [f"{BASE}={name}", *self.config.bases[name]]

    @cached_property
    def keys_of_bases(self) -> set[str]:
        """The settings of all bases."""
        return {key_of(word) for words in self.config.bases.values() for word in words}

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of the record's jobs."""
        grids: dict[tuple[str, tuple], dict[tuple, GridPoint]] = {}
        for overrides in self.record.jobs.values():
            values = dict(word.partition("=")[::2] for word in overrides)
            if values[SEED] != "0":
                continue
            arm = values[ARM]
            choices = tuple((key, values[key]) for key in self._open_conditions(arm))
            tuned = {key: values[key] for key in self.config.tune if key in values}
            grid = grids.setdefault((arm, choices), {})
            grid.setdefault(tuple(tuned.values()), GridPoint(tuned, overrides))
        return [
            Cell(self, arm, dict(choices), list(grid.values()))
            for (arm, choices), grid in grids.items()
        ]

    def _open_conditions(self, arm: str) -> list[str]:
        """The conditions whose setting an arm does not set itself, unless another program ran
        it."""
        if self.config.results_of(arm) is not None:
            return []
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
            describe_choices(condition): {
                cell.arm: cell for cell in self.cells if cell.choices.items() <= {*condition}
            }
            for condition in itertools.product(*filter(None, by_key))
        }

    def pairs(self) -> list[Pair]:
        """Every pair of cells, or of differences of two, to compare, once."""
        pairs: dict[tuple[str, str], Pair] = {}
        for arms in self.by_condition.values():
            for asked, *sides in self.config.comparisons:
                if arms_of(sides) <= arms.keys():
                    pair = Pair(asked, *(side_of(side, arms) for side in sides))
                    pairs[pair.first.name, pair.second.name] = pair
        return list(pairs.values())

    @property
    def planned_contrasts(self) -> int:
        """The number of verdicts that the study's file plans, over which Holm's method corrects.
        Otherwise dropping arms could flip a verdict."""
        planned = 0
        for _, *sides in self.config.comparisons:
            keys = {key for arm in arms_of(sides) for key in self._open_conditions(arm)}
            planned += math.prod(len(self.config.conditions[key]) for key in keys)
        return max(len(self.pairs()), planned) * len(self.config.judged)

    def missing(self) -> list[str]:
        """The runs that have not ended, each with the reason."""
        return [line for cell in self.cells for line in cell.missing()]


def arms_of(sides: Iterable[Any]) -> set[str]:
    """The arms of the sides of a comparison."""
    arms = set()
    for side in sides:
        arms.update([side] if isinstance(side, str) else side)
    return arms


def side_of(side: Any, cells: dict[str, Cell]) -> Cell | Pair:
    """The cell of an arm, or the difference of a pair of arms."""
    return cells[side] if isinstance(side, str) else Pair("", *(cells[arm] for arm in side))


def find_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    record = SweepRecord.find(folder / RECORD)
    return None if record is None or record.study is None else Study(folder, record)
