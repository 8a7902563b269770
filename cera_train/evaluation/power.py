"""What a study can show, from the variance components of its difference, before or after it has run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cera_train.common.errors import UserError
from cera_train.evaluation.verdict import ERROR_RATE, Spread, Variances

if TYPE_CHECKING:
    from numpy import ndarray

POWER = 0.8
"""The probability with which a difference counts as found."""

MOST_SEEDS, MOST_PROBLEMS = 10_000, 100_000_000
QUANTILES = 64  # of the variance that the seeds show: power to 0.003


def power_of(variances: Variances, difference: float, seeds: int, problems: int, comparisons: int = 1) -> float:
    """The probability of the right verdict on this difference.

    With several comparisons, it is that of Holm's first step, where p is multiplied by their number: the later ones
    have more. The problems' part is taken as known.
    """
    if seeds < 2 or problems < 2:
        return 0.0
    return _Design(variances, seeds, problems, comparisons).power(difference)


def detectable(variances: Variances, seeds: int, problems: int, comparisons: int = 1, power: float = POWER) -> float:
    """The smallest difference that gets its verdict with this probability; inf where no difference does."""
    if seeds < 2 or problems < 2:
        return math.inf
    design = _Design(variances, seeds, problems, comparisons)
    lower, upper = 0.0, max(design.standard_error, 1e-300)
    while design.power(upper) < power:
        lower, upper = upper, 2 * upper
    for _ in range(40):
        middle = (lower + upper) / 2
        lower, upper = (lower, middle) if design.power(middle) >= power else (middle, upper)
    return upper


def needed(
    variances: Variances, difference: float, seeds: int, problems: int, comparisons: int = 1, power: float = POWER
) -> tuple[int | None, int | None]:
    """Seeds an arm at these problems, and problems at these seeds, that would show this difference with this
    probability; None where 10,000 seeds, or 100 million problems, would not."""

    def shows(seeds: int, problems: int) -> bool:
        return power_of(variances, abs(difference), seeds, problems, comparisons) >= power

    return (
        _smallest(lambda number: shows(number, problems), MOST_SEEDS),
        _smallest(lambda number: shows(seeds, number), MOST_PROBLEMS),
    )


class _Design:
    """Half widths that this many seeds and problems lead to, one for each variance that the seeds may show."""

    def __init__(self, variances: Variances, seeds: int, problems: int, comparisons: int) -> None:
        import numpy
        from scipy.special import chdtri

        if not all(0 <= variance < math.inf for variance in vars(variances).values()):
            raise UserError(f"variances: expected numbers of at least 0, got {variances}.")
        assert comparisons >= 1
        # Quantiles of the variance of `seeds` normal numbers, closer together where it is small.
        edges = numpy.linspace(0, 1, QUANTILES + 1) ** 2
        shown = chdtri(seeds - 1, 1 - (edges[1:] + edges[:-1]) / 2) / (seeds - 1)
        self.chances = numpy.diff(edges)
        residual = variances.residual / (seeds * problems)
        problem = variances.problem / problems
        spread = Spread((variances.seed / seeds + residual) * shown, seeds - 1, residual, problem, problems - 1)
        self.half_widths: ndarray = spread.half_width(ERROR_RATE / comparisons)
        self.standard_error: float = float(numpy.sqrt(variances.seed / seeds + residual + problem))

    def power(self, difference: float) -> float:
        """The probability of a verdict in the difference's direction."""
        from scipy.special import ndtr

        if self.standard_error == 0:
            return float(difference > 0)
        return float((self.chances * ndtr((difference - self.half_widths) / self.standard_error)).sum())


def _smallest(is_enough: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 2 to `most` that is enough; more is enough, too."""
    lower, upper = 1, 2
    while not is_enough(upper):
        if upper == most:
            return None
        lower, upper = upper, min(2 * upper, most)
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (lower, middle) if is_enough(middle) else (middle, upper)
    return upper
