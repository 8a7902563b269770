"""What the runs of a finished study measured, and every contrast of its arms with a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.evaluation.statistics import holm
from cera_train.runs.evaluation_folder import ENDINGS
from cera_train.runs.results import LOSSES_AFTER, Environment, RunResult, TokenLosses, read_grades
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Cell, Study
from cera_train.study.verdict import Contrast, Verdict, contrast, detectable

if TYPE_CHECKING:
    import numpy as np

# --- the runs of a cell ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """An outcome of one run on every problem."""

    problems: list[Any]
    """Equal for runs on the same problems: their names, or the supervised tokens of held-out rows."""
    values: Sequence[float]
    """[problems] nats a token, or scores."""
    weights: np.ndarray | None = None
    """[problems]: supervised tokens."""
    endings: Counter[str] | None = None
    """How many answers end in each way."""


@dataclass(frozen=True)
class JudgedRun:
    """A run that judges its cell."""

    folder: Path
    result: RunResult
    environment: Environment
    outcomes: dict[str, Outcome]

    @property
    def rows(self) -> dict[str, Any]:
        """What is equal for runs that can be compared."""
        digests = {f"{split.replace('_', '-')} rows": each for split, each in (self.environment.rows or {}).items()}
        return digests | {f"problems of {name}": outcome.problems for name, outcome in self.outcomes.items()}


@dataclass(frozen=True)
class CellResult:
    """A cell and what the runs that judge it measured."""

    cell: Cell
    runs: list[JudgedRun]
    """One for each seed."""

    def values(self, outcome: str) -> np.ndarray:
        """[seeds, problems]"""
        import numpy as np

        return np.array([run.outcomes[outcome].values for run in self.runs], dtype=float)

    def means(self, outcome: str) -> list[float]:
        """An outcome of each seed."""
        import numpy as np

        return np.average(self.values(outcome), axis=1, weights=self.runs[0].outcomes[outcome].weights).tolist()

    def endings(self, outcome: str) -> dict[str, float]:
        """The share of the answers of all seeds that end in each way; empty for a loss."""
        counts = sum((run.outcomes[outcome].endings or Counter() for run in self.runs), Counter())
        return {ending: counts[ending] / counts.total() for ending in ENDINGS} if counts else {}

    def figure(self, name: str) -> float | None:
        """The mean over seeds of a figure of result.json or of its spectra."""
        results = [run.result for run in self.runs]
        values = [getattr(result if hasattr(result, name) else result.spectrum, name) for result in results]
        return None if None in values else fmean(values)


def read_results(study: Study) -> list[CellResult]:
    """The cells of a finished study.

    Raises:
        UserError: runs have not ended or have diverged, learned or were judged on other rows, or a file of a run is
            broken.
    """
    if missing := study.missing():
        raise UserError(
            f"{study.folder} is an unfinished study, whose command goes on. Missing: {'; '.join(missing[:5])}"
            f"{f'; and {len(missing) - 5:,} more' * (len(missing) > 5)}."
        )
    results = [_read_cell(study, cell) for cell in study.cells]
    for cells in study.by_condition.values():
        first, *others = [run for result in results if result.cell in cells.values() for run in result.runs]
        for run in others:
            what = next((what for what, rows in run.rows.items() if rows != first.rows.get(what)), None)
            require(
                what is None,
                f"{first.folder} and {run.folder} had different {what}, and cannot be compared: restore the rows, and "
                "run the study again under another name=...",
            )
    return results


def _read_cell(study: Study, cell: Cell) -> CellResult:
    if not cell.chosen or any(math.isinf(cell.loss(cell.chosen, seed)) for seed in cell.judging):
        raise UserError(
            f"{study.folder}: {cell.name} diverged at every value of study.tune, or with a seed at the value chosen. "
            "Add smaller values, and repeat the command."
        )
    runs = []
    for folder in cell.runs:
        result = RunResult.read(folder / "result.json")
        environment = Environment.find(folder / "environment.json") or Environment()
        outcomes = {name: _read_outcome(name, folder) for name in study.config.outcomes}
        runs.append(JudgedRun(folder, result, environment, outcomes))
    return CellResult(cell, runs)


def _read_outcome(name: str, run: Path) -> Outcome:
    if name == LOSS:
        losses = TokenLosses.read(run / LOSSES_AFTER)
        counts = losses.tokens > 0
        tokens = losses.tokens[counts]
        return Outcome(losses.tokens.tolist(), losses.sums()[counts] / tokens, tokens)
    problems = sorted(read_grades(run, name), key=lambda problem: problem.problem)
    endings = Counter(problem.ending for problem in problems)
    return Outcome([each.problem for each in problems], [each.score for each in problems], endings=endings)


# --- contrasts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison(Contrast):
    """Two arms in one outcome under one condition: second - first."""

    outcome: str
    asked: str
    first: str
    second: str
    condition: str
    by_seed: list[float]
    """The difference of each seed."""
    p_holm: float
    """After Holm, over the contrasts of the outcome."""
    verdict: Verdict
    """On the second arm; `not shown` where an edge speaks against it."""
    edges: list[str]
    """What is best at the end of its grid, such as `cera at the largest optimizer.lr, 0.01`."""
    detectable: float
    """The smallest difference that this design shows with power 80 %."""


def compare_cells(study: Study, results: Sequence[CellResult]) -> list[Comparison]:
    """Every contrast in every outcome, the primary outcome first."""
    by_name = {result.cell.name: result for result in results}
    pairs = [(asked, by_name[first.name], by_name[second.name]) for asked, first, second in study.contrasts()]
    if not pairs:
        raise UserError(
            f"{study.folder} has no two arms to compare, only {results[0].cell.arm}. Run it without study.arm; "
            f"cera-report {study.folder}/* compares the runs that are there."
        )
    comparisons = []
    for outcome in study.config.outcomes:
        # Tuned values are chosen by the first outcome, and how others bend between them is unknown.
        is_first = outcome == study.config.outcomes[0]
        between = [max(first.cell.between, second.cell.between) * is_first for _, first, second in pairs]
        differences = [
            contrast(first.values(outcome), second.values(outcome), first.runs[0].outcomes[outcome].weights, more)
            for (_, first, second), more in zip(pairs, between, strict=True)
        ]
        adjusted = holm([difference.p_value for difference in differences])
        for (asked, first, second), difference, p_holm in zip(pairs, differences, adjusted, strict=True):
            means = zip(first.means(outcome), second.means(outcome), strict=True)
            edges = [*first.cell.edges, *second.cell.edges]
            verdict = difference.verdict_at(p_holm, higher_is_better=outcome != LOSS)
            least = detectable(difference.variances, difference.seeds, difference.problems, len(pairs))
            comparisons.append(
                Comparison(
                    **vars(difference),
                    outcome=outcome,
                    asked=asked,
                    first=first.cell.arm,
                    second=second.cell.arm,
                    condition=max(first.cell.condition, second.cell.condition, key=len),
                    by_seed=[b - a for a, b in means],
                    p_holm=p_holm,
                    verdict="not shown" if edges else verdict,
                    edges=edges,
                    detectable=least + difference.between,
                )
            )
    return comparisons
