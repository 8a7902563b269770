"""Every contrast of a study with its interval, its p after Holm, its verdict and the smallest difference that it could
show; and outcomes against the rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from cera_train.evaluation.power import detectable, needed
from cera_train.evaluation.slope import Estimate, Slope, slope, slope_difference
from cera_train.evaluation.verdict import Contrast, contrast, holm, verdict
from cera_train.report.study.cells import CellResult, Outcome, other_problems, outcomes_of
from cera_train.report.table import MINUS

if TYPE_CHECKING:
    from cera_train.sweep.study import Study

RANK = "adapter.r"
NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Comparison:
    """A contrast in one outcome. Differences are second - first."""

    outcome: Outcome
    asked: str
    first: CellResult
    second: CellResult
    contrast: Contrast
    p_value: float  # after Holm
    verdict: str  # better, worse, not shown: of the second
    detectable: float  # the smallest difference that this design could show
    needed: tuple[int | None, int | None]  # seeds at these problems, problems at these seeds; None: no number would do

    @property
    def condition(self) -> str:
        return self.first.condition

    @property
    def arms(self) -> str:
        return f"{self.second.arm} {MINUS} {self.first.arm}"

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.arms, self.condition)))

    @property
    def is_shown(self) -> bool:
        return self.verdict != NOT_SHOWN

    @property
    def seeds(self) -> int:
        return self.contrast.seeds

    @property
    def is_possible(self) -> bool:
        """Whether a verdict is possible: one seed tells nothing of others."""
        return not self.contrast.reason

    @property
    def can_show(self) -> bool:
        """Whether this design could show a difference that is possible: a share cannot differ by more than 1."""
        return self.detectable <= (math.inf if self.outcome.is_loss else 1)

    @property
    def problems(self) -> int:
        return self.contrast.problems

    @property
    def by_seed(self) -> list[float]:
        """The difference of each seed."""
        first, second = (own.values[self.outcome.name].means for own in (self.first, self.second))
        return [b - a for a, b in zip(first, second, strict=True)]

    @property
    def is_too_small(self) -> bool:
        """Whether every difference inside the interval is smaller than what matters."""
        return self.outcome.matters is not None and self.contrast.within(self.outcome.matters)


# --- comparing -------------------------------------------------------------------------------------------------------


def compare_cells(study: Study, cells: Sequence[CellResult]) -> list[Comparison]:
    """Every contrast in every outcome, the primary one first; in each what the study names, then what has the baseline.
    Holm's correction is over the contrasts of an outcome."""
    found, order = {id(own.cell): own for own in cells}, list(study.config.pairs)
    pairs = [(asked, found[id(first)], found[id(second)]) for asked, first, second in study.contrasts()]
    named = study.config.contrasts
    pairs.sort(key=lambda own: (own[0] not in named, order.index((own[1].cell.arm, own[2].cell.arm))))
    return [comparison for outcome in outcomes_of(study) for comparison in _compare(outcome, pairs)]


def _compare(outcome: Outcome, pairs: Sequence[tuple[str, CellResult, CellResult]]) -> list[Comparison]:
    found = [_contrast(outcome, first, second) for _, first, second in pairs]
    adjusted = holm([own.p_value for own in found])
    return [
        Comparison(outcome, *pair, own, p_value, verdict(own, p_value, not outcome.is_loss), *_power(own, len(pairs)))
        for pair, own, p_value in zip(pairs, found, adjusted, strict=True)
    ]


def _contrast(outcome: Outcome, first: CellResult, second: CellResult) -> Contrast:
    a, b = first.values[outcome.name], second.values[outcome.name]
    if a.problems != b.problems:
        raise other_problems(outcome.name, next(iter(first.runs.values())), next(iter(second.runs.values())))
    return contrast(a.table, b.table, a.weights)


def _power(own: Contrast, comparisons: int) -> tuple[float, tuple[int | None, int | None]]:
    """The smallest difference that could be shown, and the seeds or problems that would show the observed one."""
    if own.variances is None:
        return math.inf, (None, None)
    design = (own.seeds, own.problems, comparisons)
    return detectable(own.variances, *design), needed(own.variances, own.difference, *design)


# --- against the rank ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankLine:
    """The primary outcome of an arm by its rank."""

    outcome: Outcome
    arm: str
    others: str  # the conditions beside the rank
    kind: str
    ranks: list[int]
    slope: Slope  # per doubling of the rank

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.arm, self.others)))

    @property
    def means(self) -> list[float]:
        return [fmean(seeds) for seeds in self.slope.values]


@dataclass(frozen=True)
class SlopeGap:
    """The slope of one arm minus that of another."""

    first: RankLine
    second: RankLine
    difference: Estimate


def rank_lines(outcome: Outcome, cells: Sequence[CellResult]) -> dict[tuple[str, str], RankLine]:
    """By the name of the arm and the conditions beside the rank; nothing where the rank is no condition."""
    ranked: dict[tuple[str, str], dict[int, CellResult]] = {}
    for own in cells:
        if RANK in own.cell.choices:
            ranked.setdefault((own.cell.arm, own.condition_without(RANK)), {})[int(own.cell.choices[RANK])] = own
    lines = {}
    for (arm, others), by_rank in ranked.items():
        ranks = sorted(by_rank)
        if len(ranks) > 1:
            values = [by_rank[rank].values[outcome.name].means for rank in ranks]
            one, found = by_rank[ranks[0]], slope([math.log2(rank) for rank in ranks], values)
            lines[arm, others] = RankLine(outcome, one.arm, others, one.kind, ranks, found)
    return lines


def slope_gaps(pairs: Iterable[tuple[str, str]], lines: Mapping[tuple[str, str], RankLine]) -> list[SlopeGap]:
    """The differences of slopes of two arms.

    Args:
        pairs: names of arms, first and second.
    """
    return [
        SlopeGap(lines[first, others], line, slope_difference(lines[first, others].slope, line.slope))
        for first, second in pairs
        for (arm, others), line in lines.items()
        if arm == second and (first, others) in lines
    ]
