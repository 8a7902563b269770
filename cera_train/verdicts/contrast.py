"""The difference of two arms of a study, with seeds and problems as random effects; or of two runs.

Both arms ran with the same seeds and met the same problems. A seed gives both one order of rows, so
arms are compared seed by seed and problem by problem, and what is common to both cancels:

    second[seed, problem] - first[seed, problem] = difference + A[seed] + C[problem] + R[seed,
    problem]

    Var(difference) = seeds' part, by A and R + problems' part, by C
    half width^2    = t(seeds)^2 seeds' part + t(problems)^2 problems' part

Each part has the t quantile of its degrees of freedom. If each part alone keeps its error rate, so
does the sum, whatever the parts' sizes: Banerjee 1960, "Expressions for the lower bound to
confidence coefficient", Sankhya 21.

With several bases, each a mean over its seeds and problems, the interval is Student's over bases.

Each arm is compared at the best of its tuned values. Which one looks best is partly chance, and a
better one may lie between two of the grid: `could_gain` bounds what that is worth, and widens the
interval. Without it, or where every seed is compared at the value that the others choose, more than
5 % of verdicts on equal arms are wrong: `python -m benchmarks.verdicts`.

Two single runs are compared as they are: their interval holds for other problems alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

import numpy
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from scipy.stats import binomtest

from cera_train.common.errors import UserError
from cera_train.verdicts.interval import (
    ERROR_RATE,
    bootstrap_interval,
    interval_where_all_agree,
    sign_flip,
)

SMALLEST_P = 1e-12  # A p-value below is this one

Verdict = Literal["better", "worse", "not shown"]


@dataclass(frozen=True)
class Variances:
    """Variance components of the difference of two arms:
    Var(difference) = seed / seeds + problem / problems + residual / (seeds * problems)."""

    seed: float  # by A
    problem: float  # by C
    residual: float  # by R


@dataclass(frozen=True)
class Spread:
    """Variance of an estimate in two parts; arrays for many estimates at once."""

    seeds: ndarray | float  # by A and R
    seed_degrees: int
    residual: ndarray | float
    """The part by R alone, which is no larger and better known. The interval is never narrower than
    that of these seeds on other problems: otherwise a few right answers, whose means agree by
    chance, would look certain."""
    problems: ndarray | float  # by C
    problem_degrees: ndarray | float

    def half_width(self, error_rate: ndarray | float = ERROR_RATE) -> ndarray:
        """Half the width of the interval that misses the truth with this probability."""
        tail = numpy.divide(error_rate, 2)
        t_seeds = stdtrit(self.seed_degrees, tail)
        t_problems = stdtrit(self.problem_degrees, tail)
        seeds = numpy.maximum(t_seeds**2 * self.seeds, t_problems**2 * self.residual)
        return numpy.sqrt(seeds + t_problems**2 * self.problems)

    def p_value(self, difference: ndarray | float) -> ndarray:
        """The error rate at which the interval ends at zero; 1 for no difference."""
        size = numpy.abs(difference)
        lower = numpy.full(size.shape, math.log(SMALLEST_P))
        upper = numpy.zeros(size.shape)
        for _ in range(40):  # halves the bracket to 3e-11 of p
            middle = (lower + upper) / 2
            is_inside = self.half_width(numpy.exp(middle)) >= size
            lower = numpy.where(is_inside, middle, lower)
            upper = numpy.where(is_inside, upper, middle)
        return numpy.where(size == 0, 1.0, numpy.exp(upper))


@dataclass(frozen=True)
class Contrast:
    """Two arms on the same problems: second - first, with a 95 % interval that holds for other
    seeds and problems; with bases, for other bases; of two runs, for other problems."""

    difference: float
    lower: float  # -inf with one seed or one problem. Not adjusted for other contrasts.
    upper: float
    p_value: float  # two-sided; 1 with one seed or one problem
    variances: Variances | None
    """None with one seed or one problem, and where a score differs by the same on every problem."""
    seeds: int  # or bases, where a study has them
    problems: int
    # what a tuned value between those of the grid could still change: in the bounds and the p-value
    between: float

    def verdict_at(self, adjusted_p: float, higher_is_better: bool) -> Verdict:
        """Whether the second arm is better than the first, by a p-value that `holm` adjusted."""
        if adjusted_p > ERROR_RATE:
            return "not shown"
        return "better" if (self.difference > 0) == higher_is_better else "worse"


def contrast(
    first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None, between: float = 0.0
) -> Contrast:
    """Compares two arms.

    Args:
        first, second: [seeds, problems], the same seeds and problems in the same order.
        weights: [problems], the supervised tokens of each row, where values are nats a token: means
            are then sums of nats over sums of tokens. Values without weights are scores from 0 to
            1.
        between: what a tuned value between those of the grid could still change, by which the
            interval is widened on both sides.

    Raises:
        UserError: a value is not a number.
    """
    first = numpy.asarray(first, dtype=float)
    second = numpy.asarray(second, dtype=float)
    is_score = weights is None
    weights = numpy.ones(first.shape[1]) if weights is None else numpy.asarray(weights, dtype=float)
    differences = second - first
    if not numpy.isfinite(differences).all():
        raise UserError("a value is not a number. Leave out a run that diverged.")
    seeds, problems = differences.shape
    if min(seeds, problems) < 2:
        mean = float((differences @ weights / weights.sum()).mean())
        return Contrast(mean, -math.inf, math.inf, 1.0, None, seeds, problems, between)
    return _of_mean(*estimate_mean(differences, weights), seeds, problems, between, is_score)


def contrast_over_bases(
    differences: Sequence[float],
    problems: int,
    between: float = 0.0,
    scores: Sequence[ndarray] = (),
) -> Contrast:
    """Compares two arms on several bases by Student's t.

    Args:
        differences: [bases], second - first, each a mean over seeds and problems.
        problems: their number on a base.
        between: as for `contrast`.
        scores: [bases][problems], where the outcome is a score: the differences, each a mean over
            seeds. The interval is never narrower than that of these bases on other problems.
    """
    bases = len(differences)
    difference = fmean(differences)
    if bases < 2:
        return Contrast(difference, -math.inf, math.inf, 1.0, None, bases, problems, between)
    seeds = variance(differences) / bases
    residual = sum(each.var(ddof=1) / each.size for each in scores) / bases**2
    variances = Variances(bases * max(seeds - residual, 0), 0.0, problems * bases * residual)
    spread = Spread(seeds, bases - 1, residual, 0.0, max(problems - 1, 1))
    return _of_mean(difference, spread, variances, bases, problems, between, bool(scores))


def _of_mean(
    difference: float,
    spread: Spread,
    variances: Variances,
    seeds: int,
    problems: int,
    between: float,
    is_score: bool,
) -> Contrast:
    half = float(spread.half_width())
    ends = (difference - half, difference + half)
    size = max(abs(difference) - between, 0.0)
    p_value = float(spread.p_value(size))
    if half <= 1e-12 * abs(difference) and (is_score or difference):  # up to rounding
        # The same difference on every problem, of every seed or base: the test is McNemar's.
        ends = interval_where_all_agree(difference, problems)
        p_value = float(binomtest(problems, problems).pvalue) if size else 1.0
        variances = None if is_score else variances
    lower, upper = ends
    return Contrast(
        difference, lower - between, upper + between, p_value, variances, seeds, problems, between
    )


def contrast_of_runs(first: Sequence[float], second: Sequence[float]) -> Contrast:
    """Compares two runs by what they score on the same problems. The bootstrap resamples problems
    with both scores together, so that what makes a problem hard for both cancels.

    Args:
        first, second: [problems], from 0 to 1.
    """
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    problems = len(differences)
    if len({*differences}) == 1:
        [difference] = {*differences}
        ends = interval_where_all_agree(difference, problems)
    else:
        difference = sum(differences) / problems
        ends = bootstrap_interval(differences)
    variances = Variances(0.0, float(numpy.var(differences)), 0.0)
    p_value = sign_flip(first, second)
    return Contrast(difference, *ends, p_value, variances, 1, problems, between=0.0)


def estimate_mean(differences: ndarray, weights: ndarray) -> tuple[ndarray, Spread, Variances]:
    """Weighted means of differences with their spread, for any number of data sets at once.

    Args:
        differences: [..., seeds, problems].
        weights: [problems], positive.
    """
    seeds, problems = differences.shape[-2:]
    seed_means = differences @ weights / weights.sum()  # [..., seeds]
    # How much a problem moves a weighted mean, by leaving it out: the jackknife, which needs no
    # small-sample factor for a mean and is on the safe side for a ratio.
    # [..., seeds, problems]
    influence = (differences - seed_means[..., None]) * weights / (weights.sum() - weights)
    factor = (problems - 1) / problems
    residual = factor * influence.var(axis=-2, ddof=1).sum(axis=-1) / seeds
    # A problem's mean over seeds varies by C and by R; the seeds' part has R already.
    problem_variance = factor * (influence.mean(axis=-2) ** 2).sum(axis=-1) - residual
    spread = Spread(
        seeds=seed_means.var(axis=-1, ddof=1) / seeds,
        seed_degrees=seeds - 1,
        residual=residual,
        problems=numpy.maximum(problem_variance, 0),
        problem_degrees=max((weights**2).sum() ** 2 / (weights**4).sum() - 1, 1.0),
    )
    variances = Variances(
        seed=numpy.maximum(seeds * (spread.seeds - residual), 0),
        problem=problems * spread.problems,
        residual=problems * seeds * residual,
    )
    return seed_means.mean(axis=-1), spread, variances
