"""The cells of a study: each arm under each condition, its runs, which of them judge it, and what
those measured. Imports no torch.

Every seed runs every tuned value to its end, and the value that is best on average, by the study's
first outcome, judges the arm. With `study.tune_seeds=k` the first k seeds choose, and the others
judge.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cera_train.common.errors import UserError
from cera_train.runs.evaluation_folder import ENDINGS
from cera_train.runs.results import LOSSES_AFTER, Environment, RunResult, TokenLosses, read_grades
from cera_train.settings.sweep import LOSS, StudyConfig
from cera_train.sweep.folder import RECORD, State, SweepRecord, job_name, job_status, key_of

if TYPE_CHECKING:
    import numpy as np

ARM = "study.arm"
SEED = "train.seed"


@dataclass(frozen=True)
class Candidate:
    """Tuned values of an arm."""

    values: dict[str, str]  # such as {"optimizer.lr": "0.001"}
    overrides: list[str]  # the overrides of its run with seed 0

    def overrides_of(self, seed: int) -> list[str]:
        return [f"{SEED}={seed}" if key_of(word) == SEED else word for word in self.overrides]


@dataclass(frozen=True)
class Outcome:
    """An outcome of one run on every problem."""

    problems: list[
        Any
    ]  # equal for runs on the same problems: their names, or the supervised tokens of held-out rows
    values: Sequence[float]  # [problems] nats a token, or scores
    weights: np.ndarray | None = None  # [problems]: supervised tokens
    endings: Counter[str] = field(default_factory=Counter)  # how many answers end in each way

    @classmethod
    def read(cls, name: str, run: Path) -> Outcome:
        if name == LOSS:
            losses = TokenLosses.read(run / LOSSES_AFTER)
            counts = losses.tokens > 0
            tokens = losses.tokens[counts]
            return cls(losses.tokens.tolist(), losses.sums()[counts] / tokens, tokens)
        problems = sorted(read_grades(run, name), key=lambda problem: problem.problem)
        endings = Counter(problem.ending for problem in problems)
        return cls(
            [each.problem for each in problems], [each.score for each in problems], endings=endings
        )


@dataclass(frozen=True)
class JudgedRun:
    """A run that judges its cell."""

    folder: Path
    names: list[str]  # of outcomes

    @cached_property
    def result(self) -> RunResult:
        return RunResult.read(self.folder / "result.json")

    @cached_property
    def environment(self) -> Environment:
        return Environment.find(self.folder / "environment.json") or Environment()

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        return {name: Outcome.read(name, self.folder) for name in self.names}

    @property
    def rows(self) -> dict[str, Any]:
        """What is equal for runs that can be compared."""
        digests = {
            f"{split.replace('_', '-')} rows": each
            for split, each in (self.environment.rows or {}).items()
        }
        return digests | {
            f"problems of {name}": outcome.problems for name, outcome in self.outcomes.items()
        }


def words_of(choices: Iterable[tuple[str, str]]) -> str:
    return ", ".join(map("=".join, choices))


@dataclass(frozen=True, eq=False)
class Cell:
    """An arm under a condition."""

    study: Study
    arm: str
    choices: dict[
        str, str
    ]  # the condition, such as {"adapter.r": "16"}, without the settings that the arm has itself
    candidates: list[Candidate]

    @property
    def condition(self) -> str:
        """Such as `adapter.r=16`; empty where a study has none."""
        return words_of(self.choices.items())

    @property
    def name(self) -> str:
        return ", ".join(filter(None, [self.arm, self.condition]))

    @property
    def tuning(self) -> range:
        """The seeds that run every value, and choose."""
        return range(self.study.config.tune_seeds or self.study.config.seeds)

    @property
    def judging(self) -> range:
        return range(self.study.config.tune_seeds or 0, self.study.config.seeds)

    @property
    def fresh(self) -> list[int]:
        """The seeds that judge without having chosen."""
        return [seed for seed in self.judging if seed not in self.tuning]

    def run(self, candidate: Candidate, seed: int) -> Path:
        """The folder of a seed's run, there or not."""
        return self.study.folder / job_name(candidate.overrides_of(seed), self.study.record.swept)

    def loss(self, candidate: Candidate, seed: int) -> float | None:
        """After the last update, the held-out loss, or the part of a task's score that is missed;
        infinite for a run that diverged, None for one that has not ended."""
        run = self.run(candidate, seed)
        outcome = self.study.config.outcomes[0]
        if (result := RunResult.find(run / "result.json")) is not None:
            if outcome != LOSS:
                return 1 - fmean(problem.score for problem in read_grades(run, outcome))
            return math.log(result.perplexity) if result.perplexity else math.inf
        return math.inf if job_status(self.study.folder, run.name).state == State.diverged else None

    @cached_property
    def losses(self) -> list[list[float | None]]:
        """[candidates, tuning seeds]"""
        return [
            [self.loss(candidate, seed) for seed in self.tuning] for candidate in self.candidates
        ]

    @cached_property
    def chosen(self) -> Candidate | None:
        """The values of the lowest mean loss, none of whose seeds diverged, not even one that
        judges alone. None: a run has not ended, or there is no such value."""
        if any(None in row for row in self.losses):
            return None
        means = [
            math.inf
            if math.inf in [self.loss(candidate, seed) for seed in self.fresh]
            else fmean(row)
            for row, candidate in zip(self.losses, self.candidates, strict=True)
        ]
        return self.candidates[means.index(min(means))] if math.isfinite(min(means)) else None

    @cached_property
    def runs(self) -> list[JudgedRun]:
        """The runs that judge, one for each seed. Raises UserError where each value diverged with
        one."""
        if not self.chosen:
            raise UserError(
                f"{self.study.folder}: {self.name} diverged at every value of study.tune. Add "
                f"smaller values, and "
                "repeat the command."
            )
        return [
            JudgedRun(self.run(self.chosen, seed), self.study.config.outcomes)
            for seed in self.judging
        ]

    def values(self, outcome: str) -> np.ndarray:
        """[seeds, problems]"""
        import numpy as np

        return np.array([run.outcomes[outcome].values for run in self.runs], dtype=float)

    def weights(self, outcome: str) -> np.ndarray | None:
        """[problems]: supervised tokens of the rows of a loss."""
        return self.runs[0].outcomes[outcome].weights

    def means(self, outcome: str) -> list[float]:
        """An outcome of each seed."""
        import numpy as np

        return np.average(self.values(outcome), axis=1, weights=self.weights(outcome)).tolist()

    def endings(self, outcome: str) -> dict[str, float]:
        """The share of the answers of all seeds that end in each way; empty for a loss."""
        counts = sum((run.outcomes[outcome].endings for run in self.runs), Counter())
        return {ending: counts[ending] / counts.total() for ending in ENDINGS} if counts else {}

    def figure(self, name: str) -> float | None:
        """The mean over seeds of a figure of result.json or of its spectra."""
        results = [run.result for run in self.runs]
        values = [
            getattr(result if hasattr(result, name) else result.spectrum, name)
            for result in results
        ]
        return None if None in values else fmean(values)

    def along(self, key: str, average: Callable = fmean) -> dict[float, float]:
        """The grid through the chosen values along one of them: value -> loss over seeds, by size;
        empty for words."""
        others = self.chosen.values | {key: ""}
        try:
            line = [
                (float(candidate.values[key]), average(row))
                for row, candidate in zip(self.losses, self.candidates, strict=True)
                if candidate.values | {key: ""} == others
            ]
        except ValueError:
            return {}
        return dict(sorted(line))

    @property
    def edges(self) -> list[str]:
        """Tuned values that are best at the end of their grid, such as `cera at the largest
        optimizer.lr, 0.01`."""
        return [
            f"{self.arm} at the {'smallest' if best < neighbour else 'largest'} {key}, {best:g}"
            for key, (best, neighbour) in self.ends().items()
        ]

    def ends(self) -> dict[str, tuple[float, float]]:
        """Tuned setting -> its best value and the neighbour, where the best is at the end of the
        grid."""
        ends = {}
        for key, value in self.chosen.values.items():
            line = list(self.along(key))
            for best, neighbour in (line[:2], line[:-3:-1]) if len(line) > 1 else ():
                if best == float(value):
                    ends[key] = best, neighbour
        return ends

    def beyond(self) -> list[list[str]]:
        """The jobs of every tuning seed one step beyond each edge, by the ratio of the last two
        values; 0 has none."""
        ends = {key: end for key, end in self.ends().items() if min(end) > 0}
        steps = {key: f"{best * best / neighbour:g}" for key, (best, neighbour) in ends.items()}
        return [
            [
                f"{key}={value}" if key_of(word) == key else word
                for word in self.chosen.overrides_of(seed)
            ]
            for key, value in steps.items()
            for seed in self.tuning
        ]

    @property
    def between(self) -> float:
        """The most by which another value, in the grid or between, could lower the loss: in nats,
        or of a score.

        Near its minimum a loss is a parabola. If its neighbours are higher than the lowest value by
        b on average, the minimum is at most b / 4 below that value. Medians over seeds: one run
        that breaks down is no bend.
        """
        most = 0.0
        for key, value in self.chosen.values.items():
            if len(line := self.along(key, median)) > 2:
                losses = list(line.values())
                lowest = min(losses)
                place = losses.index(lowest)
                # A neighbour that diverged says nothing of the bend.
                neighbours = [
                    loss for loss in losses[max(place - 1, 0) : place + 2] if math.isfinite(loss)
                ]
                neighbours.remove(lowest)
                most += (
                    line[float(value)]
                    - lowest
                    + (fmean(neighbours) - lowest if neighbours else 0.0) / 4
                )
        return most

    def missing(self) -> list[str]:
        """The runs that have not ended, each with why."""
        pairs = [(candidate, seed) for candidate in self.candidates for seed in self.tuning]
        pairs += [
            (self.chosen, seed) for seed in self.judging if self.chosen and seed not in self.tuning
        ]
        texts = []
        for candidate, seed in pairs:
            if self.loss(candidate, seed) is None:
                job = job_status(self.study.folder, self.run(candidate, seed).name)
                words = [
                    *(f"{key}={value}" for key, value in candidate.values.items()),
                    f"{SEED}={seed}",
                ]
                why = f"{job.state}: {job.error}" if job.error else job.state
                texts.append(f"{', '.join([self.name, *words])} ({why})")
        return texts


@dataclass(frozen=True, eq=False)
class Study:
    """A study's folder, which has, or will have, this record."""

    folder: Path
    record: SweepRecord

    @cached_property
    def config(self) -> StudyConfig:
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(StudyConfig), self.record.study)
        )

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of its grid."""
        candidates: dict[tuple, list[Candidate]] = {}
        for overrides in self.record.jobs.values():
            words = dict(word.partition("=")[::2] for word in overrides)
            if words[SEED] == "0":
                own = {key_of(word) for word in self.config.arms[words[ARM]]}
                place = (
                    words[ARM],
                    *((key, words[key]) for key in self.config.conditions if key not in own),
                )
                values = {key: words[key] for key in self.config.tune}
                candidates.setdefault(place, []).append(Candidate(values, overrides))
        return [
            Cell(self, arm, dict(choices), values) for (arm, *choices), values in candidates.items()
        ]

    @property
    def by_condition(self) -> dict[str, dict[str, Cell]]:
        """Condition -> arm -> cell. An arm that has a condition's setting itself stands under all
        of its values."""
        choices = dict.fromkeys(choice for cell in self.cells for choice in cell.choices.items())
        by_key = [
            [choice for choice in choices if choice[0] == key] for key in self.config.conditions
        ]
        return {
            words_of(condition): {
                cell.arm: cell for cell in self.cells if cell.choices.items() <= {*condition}
            }
            for condition in itertools.product(*filter(None, by_key))
        }

    def contrasts(self) -> list[tuple[str, Cell, Cell]]:
        """Every comparison: what it asks, and its two cells; the difference is the second minus the
        first."""
        pairs = {
            (arms[first].name, arms[second].name): (asked, arms[first], arms[second])
            for arms in self.by_condition.values()
            for (first, second), asked in self.config.pairs.items()
            if {first, second} <= arms.keys()
        }
        return list(pairs.values())

    @property
    def family(self) -> int:
        """The number of contrasts over which Holm's method corrects: all of the study's file. Were
        it those that ran, leaving out arms would turn a verdict."""

        def count(pair: tuple[str, str]) -> int:
            first, second = ({*map(key_of, self.config.arms[arm])} for arm in pair)
            conditions = self.config.conditions.items()
            return math.prod(len(values) for key, values in conditions if key not in first & second)

        return max(len(self.contrasts()), sum(map(count, self.config.pairs)))

    def missing(self) -> list[str]:
        """The runs that have not ended, each with why."""
        return [text for cell in self.cells for text in cell.missing()]


def find_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    record = SweepRecord.find(folder / RECORD)
    return None if record is None or record.study is None else Study(folder, record)
