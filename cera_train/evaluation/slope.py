"""An outcome against log2 of the rank: its slope per doubling, and the rank from which it no longer changes.

Seeds are the replicates; problems are the fixed ones that all runs met. Every seed ran at every rank and has a slope of
its own, so a slope's interval is Student's for the mean of the seeds' slopes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from cera_train.common.errors import UserError
from cera_train.evaluation.verdict import ERROR_RATE, Interval

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class Estimate(Interval):
    """A slope per doubling of the rank with its 95 % interval; -inf to inf for one seed."""

    value: float
    lower: float
    upper: float
    p_value: float

    @property
    def includes_zero(self) -> bool:
        return self.lower <= 0 <= self.upper


@dataclass(frozen=True)
class Slope:
    """How an outcome changes with the rank."""

    log2_ranks: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    """[ranks][seeds]"""
    overall: Estimate
    """The least-squares slope over all ranks, each rank's mean counting the same."""
    steps: list[Estimate]
    """Between neighbouring ranks."""
    tails: list[Estimate]
    """From each rank but the last to the largest: the first is `overall`."""

    @property
    def plateau_index(self) -> int | None:
        """The first rank such that neither a step nor a tail that starts there or later excludes zero; None where the
        last step excludes zero, or there is one seed."""
        if math.isinf(self.overall.lower):
            return None
        changes = [
            not (step.includes_zero and tail.includes_zero) for step, tail in zip(self.steps, self.tails, strict=True)
        ]
        first = max((index + 1 for index, is_change in enumerate(changes) if is_change), default=0)
        return first if first < len(self.steps) else None

    @property
    def plateau(self) -> int | None:
        """The rank from which no change is shown; None: the outcome changes up to the largest rank.

        Wide intervals show no change either: `is_flat` is the claim that there is none."""
        return None if self.plateau_index is None else round(2 ** self.log2_ranks[self.plateau_index])

    def is_flat(self, matters: float) -> bool:
        """Whether every interval from the plateau on lies within +-matters a doubling."""
        first = self.plateau_index
        return first is not None and all(slope.within(matters) for slope in self.steps[first:] + self.tails[first:])


def slope(log2_ranks: Sequence[float], values: Sequence[Sequence[float]]) -> Slope:
    """Fits an outcome against log2 of the rank.

    Args:
        log2_ranks: Ascending, at least two.
        values: [ranks][seeds], the same seeds at every rank.

    Raises:
        UserError: Ranks and values do not fit each other, or a value is not a number.
    """
    if len(log2_ranks) != len(values) or len(values) < 2 or not all(map(len, values)):
        raise UserError(
            f"a slope needs values of at least two ranks, got {len(log2_ranks)} ranks, {len(values)} values."
        )
    if len(counts := {*map(len, values)}) > 1:
        raise UserError(f"a slope needs the same seeds at every rank, got {' and '.join(map(str, sorted(counts)))}.")
    if any(larger <= smaller for smaller, larger in pairwise(log2_ranks)):
        raise UserError(f"a slope needs ascending ranks, got log2 {[*log2_ranks]}.")
    if not all(math.isfinite(value) for row in values for value in row):
        raise UserError("a slope needs numbers, got inf or nan. Leave out runs that diverged.")
    starts = range(len(values) - 1)
    steps = [_estimate(_by_seed(log2_ranks[at : at + 2], values[at : at + 2])) for at in starts]
    tails = [_estimate(_by_seed(log2_ranks[at:], values[at:])) for at in starts]
    return Slope(tuple(log2_ranks), tuple(tuple(map(float, row)) for row in values), tails[0], steps, tails)


def slope_difference(first: Slope, second: Slope) -> Estimate:
    """The second's overall slope - the first's, of the same seeds; the ranks may differ."""
    return _estimate(_by_seed(second.log2_ranks, second.values) - _by_seed(first.log2_ranks, first.values))


def _by_seed(log2_ranks: Sequence[float], values: Sequence[Sequence[float]]) -> ndarray:
    """The least-squares slope of each seed: sum of (x - mean x) y / sum of (x - mean x)^2."""
    import numpy

    centred = numpy.asarray(log2_ranks, dtype=float) - numpy.mean(log2_ranks)
    return centred / (centred**2).sum() @ numpy.asarray(values, dtype=float)


def _estimate(by_seed: ndarray) -> Estimate:
    """The mean with Student's interval."""
    from scipy.special import stdtr, stdtrit

    value, seeds = float(by_seed.mean()), len(by_seed)
    if seeds < 2:
        return Estimate(value, -math.inf, math.inf, 1.0)
    error = float(by_seed.std(ddof=1)) / math.sqrt(seeds)
    half = -float(stdtrit(seeds - 1, ERROR_RATE / 2)) * error
    p_value = 1.0 if value == 0 else float(2 * stdtr(seeds - 1, -abs(value) / error)) if error else 0.0
    return Estimate(value, value - half, value + half, p_value)
