"""What a finished study measured: every cell at its chosen candidate, with every seed. The study comes from sweep/, a
floor above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from cera_train.adapters.family import family, kinds
from cera_train.common.errors import UserError
from cera_train.evaluation.tasks.task import display_name
from cera_train.report.runs import Run, read_runs
from cera_train.report.table import MINUS, signed
from cera_train.runs.outcomes import GradedProblem, TokenLosses, read_grades, read_losses
from cera_train.settings.sweep import LOSS, SCORE

if TYPE_CHECKING:
    import numpy as np

    from cera_train.sweep.study import Cell, Study


@dataclass(frozen=True)
class Outcome:
    """What arms are compared by."""

    name: str
    matters: float | None = None
    """The smallest difference that would matter; None where none is named."""

    @property
    def title(self) -> str:
        return "held-out loss" if self.is_loss else self.name if self.name == SCORE else display_name(self.name)

    @property
    def heading(self) -> str:
        return self.title[0].upper() + self.title[1:]

    @property
    def is_loss(self) -> bool:
        return self.name == LOSS

    @property
    def unit(self) -> str:
        return "nats" if self.is_loss else "points"

    @property
    def problems(self) -> str:
        return "rows" if self.is_loss else "problems"

    @property
    def scale(self) -> float:
        """Units in a difference of 1."""
        return 1.0 if self.is_loss else 100.0

    def number(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}".replace("-", MINUS)

    def signed(self, value: float) -> str:
        return signed(self.scale * value, f".{self.digits}f")

    def mean(self, value: float) -> str:
        return f"{value:.4f}" if self.is_loss else f"{value:.1%}"

    @property
    def digits(self) -> int:
        return 4 if self.is_loss else 1

    def gain(self, difference: float) -> float:
        """A difference with the sign that makes more of it better."""
        return -difference if self.is_loss else difference


@dataclass(frozen=True)
class Values:
    """An outcome of every seed of a cell on every problem."""

    table: np.ndarray  # [seeds, problems]
    problems: Sequence[Any]  # equal where two cells had the same problems
    weights: np.ndarray | None = None  # [problems]: supervised tokens

    @cached_property
    def means(self) -> list[float]:
        """One for each seed."""
        import numpy as np

        return np.average(self.table, axis=1, weights=self.weights).tolist()


@dataclass(frozen=True)
class CellResult:
    """A cell and what its seeds measured."""

    cell: Cell
    runs: dict[int, Run]  # by seed
    values: dict[str, Values]  # by outcome
    grades: dict[str, list[list[GradedProblem]]]  # by task, one for each seed
    losses: list[tuple[TokenLosses | None, TokenLosses]]  # one for each seed; empty where loss is no outcome

    @property
    def arm(self) -> str:
        return arm_label(self.cell.arm)

    @property
    def choices(self) -> str:
        """The condition without the task, such as r = 16."""
        return _in_words(self.cell.choices)

    @property
    def condition(self) -> str:
        """Such as sums, r = 16; empty where a study has one condition."""
        return self.condition_without()

    def condition_without(self, *keys: str) -> str:
        choices = {key: value for key, value in self.cell.choices.items() if key not in keys}
        return ", ".join(filter(None, (self.cell.task, _in_words(choices))))

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.arm, self.condition)))

    @property
    def kind(self) -> str:
        return next(iter(self.runs.values())).kind

    def figure(self, name: str) -> float | None:
        """The mean over seeds of a figure of result.json."""
        return self._mean([getattr(run.figures, name) for run in self.runs.values()])

    def spectrum(self, name: str) -> float | None:
        return self._mean([getattr(run.figures.spectrum, name) for run in self.runs.values()])

    def mean(self, outcome: Outcome) -> float:
        return fmean(self.values[outcome.name].means)

    def spread(self, outcome: Outcome) -> float | None:
        """The standard deviation over seeds; None for a single one."""
        means = self.values[outcome.name].means
        return stdev(means) if len(means) > 1 else None

    @staticmethod
    def _mean(values: list[float | None]) -> float | None:
        return None if None in values else fmean(values)


def arm_label(arm: str) -> str:
    """CeRA for cera; the arm's name where it is no kind of adapter."""
    return family(arm).name if arm in kinds() else arm


def _in_words(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} = {value}" for key, value in choices.items())


def outcomes_of(study: Study) -> list[Outcome]:
    """The primary one first; what matters is named for it alone."""
    first, *others = study.config.outcomes
    return [Outcome(first, study.config.matters), *map(Outcome, others)]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_cells(study: Study) -> list[CellResult]:
    """The cells of a finished study.

    Raises:
        UserError: seeds of a cell were measured on other problems, or a file of a run is broken.
    """
    folders = [folder for cell in study.cells for folder in cell.runs.values()]
    runs = {run.folder: run for run in read_runs(folders)}
    return [
        _read_cell(study.config.outcomes, cell, {seed: runs[path] for seed, path in sorted(cell.runs.items())})
        for cell in study.cells
    ]


def _read_cell(outcomes: Sequence[str], cell: Cell, runs: dict[int, Run]) -> CellResult:
    losses = [read_losses(run.folder) for run in runs.values()] if LOSS in outcomes else []
    values, grades = {}, {}
    for outcome in outcomes:
        if outcome == LOSS:
            values[outcome] = _losses_by_row(runs, [after for _, after in losses])
        else:
            grades[outcome] = [read_grades(run.folder, _task_of(run, outcome)) for run in runs.values()]
            values[outcome] = _scores_by_problem(outcome, runs, grades[outcome])
    return CellResult(cell, runs, values, grades, losses)


def _task_of(run: Run, outcome: str) -> str:
    """`score` is that of a run's first task."""
    tasks = run.settings.get("train.tasks") or [outcome]
    return tasks[0] if outcome == SCORE else outcome


def _losses_by_row(runs: dict[int, Run], losses: Sequence[TokenLosses]) -> Values:
    import numpy as np

    tokens = losses[0].tokens
    for run, own in zip(runs.values(), losses, strict=True):
        if not np.array_equal(own.tokens, tokens):
            raise other_problems(LOSS, next(iter(runs.values())), run)
        if not np.isfinite(own.losses).all():
            raise UserError(
                f"{run.folder} has diverged: its losses are no numbers, and have no mean. Leave the value that it "
                "chose out of study.tune, and run the study under another name=..."
            )
    is_counted = tokens > 0
    table = np.array([own.sums()[is_counted] / tokens[is_counted] for own in losses])
    return Values(table, tokens.tolist(), tokens[is_counted])


def _scores_by_problem(outcome: str, runs: dict[int, Run], graded: Sequence[Sequence[GradedProblem]]) -> Values:
    import numpy as np

    scores = [{own.problem: fmean(own.scores) for own in one} for one in graded]
    for run, own in zip(runs.values(), scores, strict=True):
        if own.keys() != scores[0].keys():
            raise other_problems(outcome, next(iter(runs.values())), run)
    return Values(np.array([[own[problem] for problem in scores[0]] for own in scores]), list(scores[0]))


def other_problems(outcome: str, first: Run, second: Run) -> UserError:
    what = "held-out rows" if outcome == LOSS else "problems"
    return UserError(
        f"{first.folder} and {second.folder} were measured on different {what}, and cannot be compared: run the study "
        "again under another name=..."
    )
