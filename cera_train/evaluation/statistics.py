"""The uncertainty of an accuracy, and of a difference between two runs on the same problems."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.special import betaincinv, ndtri
from scipy.stats import binomtest, bootstrap, norm, permutation_test

ERROR_RATE = 0.05
"""The share of intervals that miss the truth, and of verdicts where there is no difference."""

LEVEL = 1 - ERROR_RATE  # the confidence of an interval

POWER = 0.8  # the probability with which a difference counts as detected

BLOCK = 1_000_000  # numbers that resampling draws at once: 8 MB

MANY = 5_000
"""Problems, of which the mean is normal: resampling more takes minutes and finds the same."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k answers, drawn from `samples` of which `correct` are right, is
    right: 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    assert 0 <= correct <= samples
    assert 1 <= k <= samples
    draws = math.comb(samples, k)
    draws_without = math.comb(samples - correct, k)
    return (draws - draws_without) / draws  # of integers, so exact to the last bit


def bootstrap_interval(
    values: Sequence[float], counts: Sequence[float] | None = None
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over problems (Efron 1979), the same in every
    call. With the `counts` that the values are sums over, of sum(values) / sum(counts)."""
    if len(values) == 1:  # scipy takes two problems or more
        ratio = values[0] if counts is None else values[0] / counts[0]
        return float(ratio), float(ratio)
    if counts is None and len({*values}) == 1:
        return float(values[0]), float(values[0])
    if counts is None and len(values) > MANY:
        lower, upper = norm.interval(
            LEVEL, numpy.mean(values), numpy.std(values) / math.sqrt(len(values))
        )
        return float(lower), float(upper)
    if counts is None:
        samples = (values,)
        statistic = numpy.mean
    else:
        samples = (values, counts)
        statistic = _ratio
    resampled = bootstrap(
        samples,
        statistic,
        paired=counts is not None,
        method="percentile",
        confidence_level=LEVEL,
        n_resamples=10_000,
        batch=max(1, BLOCK // len(values)),
        rng=0,
    )
    lower, upper = resampled.confidence_interval
    return float(lower), float(upper)


def _ratio(values: numpy.ndarray, counts: numpy.ndarray, axis: int) -> numpy.ndarray:
    return values.sum(axis) / counts.sum(axis)


def interval_where_all_agree(difference: float, problems: int) -> tuple[float, float]:
    """The interval of a difference of scores that is the same on every problem, where resampling
    gives a point: that of a share of problems which differ so, or not at all (Clopper & Pearson
    1934)."""
    share = (ERROR_RATE / 2) ** (1 / problems)
    if difference == 0:
        return share - 1, 1 - share
    lower, upper = sorted((difference * share, difference))
    return lower, upper


def accuracy_interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap interval of an accuracy; `values` are the shares of each problem's answers that
    are right.

    Where no problem or every problem is solved, resampling gives a point, so the interval is the
    exact binomial one instead (Clopper & Pearson 1934).
    """
    if max(values) == 0 or min(values) == 1:
        test = binomtest(int(sum(values)), len(values))
        lower, upper = test.proportion_ci(LEVEL, method="exact")
        return float(lower), float(upper)
    return bootstrap_interval(values)


def sign_flip(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p-value of the paired permutation test of a mean (Fisher 1935): the probability
    of a difference at least as large if a fair coin chose for each problem which run has which of
    the two values. Exact for right and wrong, where it is McNemar's test (1947), and where at most
    13 problems differ; else of random outcomes, the observed one among them, which keeps its error
    rate at any number of them (Phipson & Smyth 2010); normal where more than MANY differ."""
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True) if a != b]
    if not differences:
        return 1.0
    if len({*map(abs, differences)}) == 1:  # only the signs count
        rises = sum(difference > 0 for difference in differences)
        return float(binomtest(rises, len(differences)).pvalue)
    if len(differences) > MANY:
        return float(2 * norm.sf(abs(sum(differences)) / numpy.linalg.norm(differences)))
    test = permutation_test(
        (differences,),
        lambda values, axis: abs(values.mean(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=9_999,
        batch=max(1, BLOCK // len(differences)),
        rng=0,
    )
    return float(test.pvalue)


@dataclass(frozen=True)
class Difference:
    """Difference of the means of two runs, second - first, with its 95 % interval."""

    difference: float
    lower: float
    upper: float


def paired_bootstrap(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Resamples problems with both runs' scores together, so that what makes a problem hard for
    both cancels."""
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    if len({*differences}) == 1:
        [difference] = {*differences}
        lower, upper = interval_where_all_agree(difference, len(differences))
    else:
        difference = sum(differences) / len(differences)
        lower, upper = bootstrap_interval(differences)
    return Difference(difference, lower, upper)


def detectable_difference(standard_error: float, problems: int, tests: int = 1) -> float:
    """The smallest true difference of two runs that gets its verdict with probability POWER, by the
    normal approximation; but at least what an exact test can show, even where all problems that
    differ do so in one direction.

    Args:
        tests: their number, of which this is the first that Holm's method admits.
    """
    level = ERROR_RATE / tests
    by_error = float(ndtri(1 - level / 2) + ndtri(POWER)) * standard_error
    differing = math.ceil(math.log2(2 / level))  # 2 * 0.5^differing is at most the level
    if differing > problems:
        return math.inf
    return max(by_error, float(betaincinv(differing, problems - differing + 1, POWER)))


def holm(p_values: Sequence[float], planned: int = 0, at_least: float = 0.0) -> list[float]:
    """P-values adjusted for their number, in the order given (Holm 1979). Where one is at most
    0.05, the chance of any error among all verdicts stays at most 5 %, however the comparisons
    depend on each other.

    Args:
        planned: the number of planned tests where that is larger, as if the others had p = 1.
        at_least: the largest adjusted p-value of tests that come first: no later one is below.
            Both families together keep the level: serial gatekeeping (Westfall & Krishen 2001, J.
            Statistical Planning and Inference 99).
    """
    adjusted = [0.0] * len(p_values)
    largest = at_least
    tests = max(planned, len(p_values))
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (tests - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
