"""The difference of two arms of a study, with seeds and problems as random effects, and whether it is shown.

Both arms ran with the same seeds and met the same problems. A seed gives both one order of rows, so arms are compared
seed by seed and problem by problem, and what is common to both cancels:

    second[seed, problem] - first[seed, problem] = difference + A[seed] + C[problem] + R[seed, problem]

    Var(difference) = seeds' part, by A and R + problems' part, by C
    half width^2    = t(seeds)^2 seeds' part + t(problems)^2 problems' part

Each part has the t quantile of its degrees of freedom. If each part alone keeps its error rate, so does the sum,
whatever the parts' sizes: Banerjee 1960, "Expressions for the lower bound to confidence coefficient", Sankhya 21.
One t quantile with Satterthwaite's degrees of freedom for the whole (as in min F', Clark 1973, "The
language-as-fixed-effect fallacy") does not: three seeds that agree by chance pass for no variance at all, and errors
reach 7.4 % where 5 % are meant. The plain hierarchical bootstrap reaches 26 % at 3 seeds: it draws from S seeds, which
have (S - 1)/S of the variance, and has no t quantile. `python -m benchmarks.verdicts` shows all three.

Pairing leaves S - 1 degrees of freedom instead of up to 2 (S - 1): it narrows the interval where the arms' seeds
correlate above 0.6 at 3 seeds, 0.3 at 5. It needs no assumption on the arms' variances, which may differ.

5 % holds if the means over a seed's problems are about normal. Seeds that either collapse or learn, half of them each,
are not: 12.2 % errors at 2 seeds, 3.0 % at 3, 2.5 % at 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cera_train.common.errors import UserError
from cera_train.evaluation.statistics import McNemar, mcnemar

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.typing import ArrayLike

ERROR_RATE = 0.05  # of verdicts where there is no difference, and of intervals that miss it
SMALLEST_P = 1e-12  # a p-value below is this one


@dataclass(frozen=True)
class Variances:
    """Variance components of the difference of two arms:
    Var(difference) = seed / seeds + problem / problems + residual / (seeds * problems)."""

    seed: float
    """By A."""
    problem: float
    """By C."""
    residual: float
    """By R."""


@dataclass(frozen=True)
class Spread:
    """Variance of an estimate in two parts; arrays for many estimates at once."""

    seeds: ndarray | float
    """By A and R."""
    seed_degrees: int
    residual: ndarray | float
    """By R alone, which is no larger and known better: the interval is never narrower than that of the seeds at hand on
    other problems. It keeps few right answers, whose means agree by chance, from passing for sure."""
    problems: ndarray | float
    """By C."""
    problem_degrees: ndarray | float

    def half_width(self, error_rate: ndarray | float = ERROR_RATE) -> ndarray:
        """Half the width of the interval that misses the truth with this probability."""
        import numpy
        from scipy.special import stdtrit

        tail = numpy.divide(error_rate, 2)
        t_seeds, t_problems = stdtrit(self.seed_degrees, tail), stdtrit(self.problem_degrees, tail)
        seeds = numpy.maximum(t_seeds**2 * self.seeds, t_problems**2 * self.residual)
        return numpy.sqrt(seeds + t_problems**2 * self.problems)

    def p_value(self, difference: ndarray | float) -> ndarray:
        """The error rate at which the interval ends at zero; 1 for no difference."""
        import numpy

        size = numpy.abs(difference)
        lower, upper = numpy.full(size.shape, math.log(SMALLEST_P)), numpy.zeros(size.shape)
        for _ in range(40):  # halves the bracket to 3e-11 of p
            middle = (lower + upper) / 2
            is_inside = self.half_width(numpy.exp(middle)) >= size
            lower, upper = numpy.where(is_inside, middle, lower), numpy.where(is_inside, upper, middle)
        return numpy.where(size == 0, 1.0, numpy.exp(upper))


class Interval:
    """What has a 95 % interval, `lower` to `upper`."""

    lower: float
    upper: float

    def within(self, matters: float) -> bool:
        """Whether the interval lies within +-matters: there is no difference that matters. The error rate is 2.5 % a
        comparison (two one-sided tests, Schuirmann 1987)."""
        return -matters <= self.lower and self.upper <= matters


@dataclass(frozen=True)
class Contrast(Interval):
    """Two arms on the same problems: second - first, with a 95 % interval that holds for other seeds and problems."""

    difference: float
    lower: float
    """-inf where `reason` is set. Not adjusted for other comparisons: an interval without zero may lack a verdict."""
    upper: float
    p_value: float
    """Two-sided; 1 where `reason` is set."""
    variances: Variances | None
    """None where `reason` is set."""
    seeds: int
    problems: int
    reason: str = ""
    """Why no verdict is possible; empty where one is."""
    mcnemar: McNemar | None = None
    """Compares the two runs, not the methods, where each arm has one seed and every value is 0 or 1."""


def contrast(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> Contrast:
    """Compares two arms.

    Args:
        first, second: [seeds, problems], the same seeds and problems in the same order.
        weights: [problems], the supervised tokens of each row, where values are nats a token: means are then sums of
            nats over sums of tokens. Rows of weight 0 are left out.

    Raises:
        UserError: The arms differ in seeds or problems, or a value is not a number.
    """
    import numpy

    arms = [_array("first", first), _array("second", second)]
    for what, *counts in zip(("seeds", "problems"), arms[0].shape, arms[1].shape, strict=True):
        if counts[0] != counts[1]:
            raise UserError(f"a contrast needs the same {what} of both arms, got {counts[0]} and {counts[1]}.")
    problems = arms[0].shape[1]
    weights = numpy.ones(problems) if weights is None else numpy.asarray(weights, dtype=float)
    if weights.shape != (problems,) or not (weights >= 0).all() or not numpy.isfinite(weights).all():
        raise UserError(f"weights: expected {problems} numbers of at least 0, one a problem.")
    if not (weights > 0).any():
        raise UserError("weights: all are 0, so no problem counts. Check that rows have supervised tokens.")
    arms, weights = [values[:, weights > 0] for values in arms], weights[weights > 0]
    for name, values in zip(("first", "second"), arms, strict=True):
        if not numpy.isfinite(values).all():
            seed = numpy.flatnonzero(~numpy.isfinite(values).all(axis=1))[0]
            raise UserError(f"{name} arm: row {seed} has a value that is not a number. Leave out a run that diverged.")
    return _contrast(*arms, weights)


def _contrast(first: ndarray, second: ndarray, weights: ndarray) -> Contrast:
    seeds, problems = first.shape
    if reason := _why_not(seeds, problems):
        test = None
        if seeds == 1 and {*first.flat, *second.flat} <= {0.0, 1.0}:
            test = mcnemar((first[0] == 1).tolist(), (second[0] == 1).tolist())
        difference = float((second.mean(0) - first.mean(0)) @ weights / weights.sum())
        return Contrast(difference, -math.inf, math.inf, 1.0, None, seeds, problems, reason, test)
    estimate, spread, variances = estimate_mean(second - first, weights)
    difference, half = float(estimate), float(spread.half_width())
    lower, upper, p_value = difference - half, difference + half, float(spread.p_value(estimate))
    if half <= 1e-12 * abs(difference) and difference:  # up to rounding
        # Every seed has the same difference on every problem. As where all answers are right, the interval is exact:
        # that of a share of problems which differ so (Clopper & Pearson 1934), and the test is McNemar's.
        least = difference * (ERROR_RATE / 2) ** (1 / problems)
        lower, upper, p_value = *sorted((least, difference)), mcnemar([False] * problems, [True] * problems).p_value
    plain = Variances(float(variances.seed), float(variances.problem), float(variances.residual))
    return Contrast(difference, lower, upper, p_value, plain, seeds, problems)


def estimate_mean(differences: ndarray, weights: ndarray) -> tuple[ndarray, Spread, Variances]:
    """Weighted means of differences with their spread, for any number of data sets at once.

    Args:
        differences: [..., seeds, problems].
        weights: [problems], positive.
    """
    import numpy

    seeds, problems = differences.shape[-2:]
    seed_means = differences @ weights / weights.sum()  # [..., seeds]
    # How much a problem moves a weighted mean, by leaving it out: the jackknife, which needs no small-sample factor
    # for a mean and is on the safe side for a ratio.
    influence = (differences - seed_means[..., None]) * weights / (weights.sum() - weights)  # [..., seeds, problems]
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


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in the order given (Holm 1979). Where one is at most 0.05, the chance of any
    error among all verdicts stays at most 5 %, however the comparisons depend on each other."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(contrast: Contrast, adjusted_p: float, higher_is_better: bool) -> Literal["better", "worse", "not shown"]:
    """Whether the second arm is better than the first, by a p-value that `holm` adjusted."""
    if contrast.reason or adjusted_p > ERROR_RATE:
        return "not shown"
    return "better" if (contrast.difference > 0) == higher_is_better else "worse"


def _why_not(seeds: int, problems: int) -> str:
    if seeds < 2:
        return "one seed an arm: what another seed changes is unknown; run at least two, better five"
    return "" if problems > 1 else "one problem: what another problem changes is unknown; take at least fifty"


def _array(name: str, values: ArrayLike) -> ndarray:
    import numpy

    try:
        array = numpy.asarray(values, dtype=float)
    except ValueError as error:
        raise UserError(f"{name} arm: its seeds have different numbers of problems ({error}).") from error
    if array.ndim != 2 or not array.size:
        raise UserError(f"{name} arm: expected values of [seeds, problems], got {array.shape}.")
    return array
