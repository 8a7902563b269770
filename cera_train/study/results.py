"""What the runs of a finished study measured, and every contrast of its arms with a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.evaluation.statistics import ERROR_RATE, holm
from cera_train.runs.outcomes import read_grades, read_losses
from cera_train.runs.results import ENDINGS, Environment, RunResult
from cera_train.settings.sweep import LOSS, SCORE, Equal
from cera_train.study.cells import Cell, Study
from cera_train.study.verdict import Contrast, Verdict, contrast, detectable

if TYPE_CHECKING:
    import numpy as np

RANK = "adapter.r"

EQUAL_WITHIN = 0.1
"""The share by which times may differ and count as the same."""


# --- the runs of a cell ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """An outcome of every seed of a cell on every problem."""

    table: np.ndarray
    """[seeds, problems]"""
    problems: list[Any]
    """Equal where two cells had the same problems."""
    weights: np.ndarray | None = None
    """[problems]: supervised tokens."""

    @cached_property
    def means(self) -> list[float]:
        """One for each seed."""
        import numpy as np

        return np.average(self.table, axis=1, weights=self.weights).tolist()


@dataclass(frozen=True)
class CellResult:
    """A cell and what the runs that judge it measured."""

    cell: Cell
    results: dict[int, RunResult]
    """By seed."""
    environments: dict[int, Environment]
    values: dict[str, Values]
    """By outcome."""
    endings: dict[str, dict[str, float]]
    """By task: the share of the answers of all seeds that end in each way."""

    def figure(self, name: str) -> float | None:
        """The mean over seeds of a figure of result.json or of its spectra."""
        results = self.results.values()
        values = [getattr(result if hasattr(result, name) else result.spectrum, name) for result in results]
        return None if None in values else fmean(values)

    @property
    def chosen(self) -> list[str]:
        """The tuned values, such as `optimizer.lr=0.001`, with the seeds that each judges where they differ; those at
        the end of the grid are marked."""
        seeds: dict[str, list[str]] = {}
        for seed, candidate in self.cell.chosen.items():
            words = [f"{key}={value}{' (edge)' * self._is_edge(key, value)}" for key, value in candidate.values.items()]
            seeds.setdefault(" ".join(words), []).append(str(seed))
        if len(seeds) == 1:
            return list(seeds)
        return [f"{text} for seeds {', '.join(numbers)}" for text, numbers in seeds.items()]

    def _is_edge(self, key: str, value: str) -> bool:
        try:
            numbers = {float(candidate.values[key]) for candidate in self.cell.candidates}
        except ValueError:
            return False
        return len(numbers) > 1 and float(value) in (min(numbers), max(numbers))


def read_results(study: Study) -> list[CellResult]:
    """The cells of a finished study.

    Raises:
        UserError: runs have not ended or have diverged, learned or were judged on other rows, took unequal times under
            a claim of equal ones, or a file of a run is broken.
    """
    if missing := study.missing():
        raise UserError(
            f"{study.folder} is an unfinished study, whose command goes on. Missing: {'; '.join(missing[:5])}"
            f"{f'; and {len(missing) - 5:,} more' * (len(missing) > 5)}."
        )
    results = [_read_cell(study, cell) for cell in study.cells]
    for condition in dict.fromkeys(cell.condition for cell in study.cells):
        same = [result for result in results if result.cell.condition == condition]
        _check_rows(same)
        if study.config.equal == Equal.time:
            _check_times(study, same)
    return results


def _read_cell(study: Study, cell: Cell) -> CellResult:
    if not cell.chosen or any(math.isinf(candidate.loss(seed)) for seed, candidate in cell.chosen.items()):
        raise UserError(
            f"{study.folder}: {cell.name} diverged at every value of study.tune, or with a seed at the value chosen. "
            "Add smaller values, and repeat the command."
        )
    runs = cell.runs
    results = {seed: RunResult.read(run / "result.json") for seed, run in runs.items()}
    environments = {seed: Environment.find(run / "environment.json") or Environment() for seed, run in runs.items()}
    values, endings = {}, {}
    for outcome in study.config.outcomes:
        if outcome == LOSS:
            values[outcome] = _losses_by_row(runs)
        else:
            values[outcome], endings[outcome] = _scores_by_problem(outcome, runs)
    return CellResult(cell, results, environments, values, endings)


def _losses_by_row(runs: Mapping[int, Path]) -> Values:
    import numpy as np

    losses = [read_losses(run)[1] for run in runs.values()]
    tokens = losses[0].tokens
    for run, other in zip(runs.values(), losses, strict=True):
        if not np.array_equal(other.tokens, tokens):
            raise other_rows("held-out rows", next(iter(runs.values())), run)
    counts = tokens > 0
    table = np.array([seed.sums()[counts] / tokens[counts] for seed in losses])
    return Values(table, tokens.tolist(), tokens[counts])


def _scores_by_problem(outcome: str, runs: Mapping[int, Path]) -> tuple[Values, dict[str, float]]:
    import numpy as np

    scores, endings = [], Counter()
    for run in runs.values():
        task = read_yaml(run / "config.yaml")["train"]["tasks"][0] if outcome == SCORE else outcome
        problems = read_grades(run, task)
        endings.update(ending for problem in problems for ending in problem.endings)
        scores.append({problem.problem: fmean(problem.scores) for problem in problems})
        if scores[-1].keys() != scores[0].keys():
            raise other_rows("problems", next(iter(runs.values())), run)
    table = np.array([[seed[problem] for problem in scores[0]] for seed in scores])
    return Values(table, list(scores[0])), {ending: endings[ending] / endings.total() for ending in ENDINGS}


def _check_rows(results: Sequence[CellResult]) -> None:
    """Raises UserError where runs of one condition trained or were judged on different rows."""
    runs = [(run, result.environments[seed].rows or {}) for result in results for seed, run in result.cell.runs.items()]
    for run, rows in runs:
        for split, digest in rows.items():
            if digest != runs[0][1].get(split, digest):
                raise other_rows(f"{split.replace('_', '-')} rows", runs[0][0], run)


def _check_times(study: Study, results: Sequence[CellResult]) -> None:
    seconds = {result.cell.arm: value for result in results if (value := result.figure("seconds"))}
    if seconds and max(seconds.values()) > (1 + EQUAL_WITHIN) * min(seconds.values()):
        raise UserError(
            f"{study.folder} claims study.equal=time, and the runs took "
            f"{', '.join(f'{arm} {value:,.0f} s' for arm, value in seconds.items())}. Give the slower arm fewer "
            "train.max_updates under another name=..., or repeat the command with study.equal=none."
        )


def other_rows(what: str, first: Path, second: Path) -> UserError:
    return UserError(
        f"{first} and {second} had different {what}, and cannot be compared: restore the rows, and run the study again "
        "under another name=..."
    )


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
    """On the second arm."""
    detectable: float
    """The smallest difference that this design shows with power 80 %."""


def compare_cells(study: Study, results: Sequence[CellResult]) -> list[Comparison]:
    """Every contrast in every outcome, the primary outcome first; in each what the study names, then what has the
    baseline."""
    by_cell, contrasts = {id(result.cell): result for result in results}, study.config.contrasts
    pairs = [(asked, by_cell[id(first)], by_cell[id(second)]) for asked, first, second in study.contrasts()]
    pairs.sort(key=lambda pair: pair[0] not in contrasts)
    if not pairs:
        raise UserError(
            f"{study.folder} has no two arms to compare, only {results[0].cell.arm}. Run it without study.arm; "
            f"cera-report {study.folder}/* compares the runs that are there."
        )
    comparisons = []
    for outcome in study.config.outcomes:
        differences = [_contrast(outcome, first, second) for _, first, second in pairs]
        adjusted = holm([difference.p_value for difference in differences])
        for (asked, first, second), difference, p_holm in zip(pairs, differences, adjusted, strict=True):
            means = zip(first.values[outcome].means, second.values[outcome].means, strict=True)
            comparisons.append(
                Comparison(
                    **vars(difference),
                    **{"outcome": outcome, "asked": asked, "condition": first.cell.condition},
                    **{"first": first.cell.arm, "second": second.cell.arm, "by_seed": [b - a for a, b in means]},
                    p_holm=p_holm,
                    verdict=difference.verdict_at(p_holm, higher_is_better=outcome != LOSS),
                    detectable=detectable(difference.variances, difference.seeds, difference.problems, len(pairs)),
                )
            )
    return comparisons


def _contrast(outcome: str, first: CellResult, second: CellResult) -> Contrast:
    a, b = first.values[outcome], second.values[outcome]
    if a.problems != b.problems:
        raise other_rows("problems", next(iter(first.cell.runs.values())), next(iter(second.cell.runs.values())))
    return contrast(a.table, b.table, a.weights)


# --- slopes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """The change of the primary outcome with every doubling of the rank: of an arm, or of a second arm - a first."""

    name: str
    by_seed: list[float]
    value: float
    interval: tuple[float, float]
    """Student's 95 % interval over seeds, on the problems at hand; without bounds for one seed."""


def slopes(study: Study, results: Sequence[CellResult]) -> list[Slope]:
    """The least-squares slope of every arm against log2 of the rank, then the difference of every pair of arms; nothing
    where the rank is no condition."""
    import numpy as np

    ranks: dict[tuple[str, str], dict[int, list[float]]] = {}
    for result in results:
        choices = dict(result.cell.choices)
        if (rank := choices.pop(RANK, None)) is not None:
            means = result.values[study.config.outcomes[0]].means
            ranks.setdefault((result.cell.arm, replace(result.cell, choices=choices).condition), {})[int(rank)] = means
    by_arm = {
        place: np.polyfit(np.log2(list(by_rank)), list(by_rank.values()), 1)[0]
        for place, by_rank in ranks.items()
        if len(by_rank) > 1
    }
    gaps = {
        (f"{second} - {first}", condition): by_seed - by_arm[first, condition]
        for first, second in study.config.pairs
        for (arm, condition), by_seed in by_arm.items()
        if arm == second and (first, condition) in by_arm
    }
    return [_slope(", ".join(filter(None, place)), by_seed.tolist()) for place, by_seed in (by_arm | gaps).items()]


def _slope(name: str, by_seed: list[float]) -> Slope:
    from scipy.stats import ttest_1samp

    if len(by_seed) < 2:
        return Slope(name, by_seed, by_seed[0], (-math.inf, math.inf))
    low, high = ttest_1samp(by_seed, 0.0).confidence_interval(1 - ERROR_RATE)
    return Slope(name, by_seed, fmean(by_seed), (float(low), float(high)))
