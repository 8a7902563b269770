"""The uncertainty of an accuracy, and of the mean difference of two runs on the same problems."""

import math
from collections.abc import Sequence

import numpy
from scipy.stats import binomtest, bootstrap, norm, permutation_test

ERROR_RATE = 0.05
"""The share of intervals that miss the truth, and of verdicts where there is no difference."""

LEVEL = 1 - ERROR_RATE  # the confidence of an interval

BLOCK = 1_000_000  # numbers that resampling draws at once: 8 MB

MANY = 5_000
"""Differences, of which the mean is normal: flipping the signs of more takes minutes and finds the
same."""


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
    counts = numpy.ones_like(values) if counts is None else counts
    if len(values) == 1:  # scipy takes two problems or more
        ratio = float(values[0] / counts[0])
        return ratio, ratio
    resampled = bootstrap(
        (values, counts),
        _ratio,
        paired=True,
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
    """The interval of an accuracy: exact where each problem is right or wrong (Clopper & Pearson
    1934), else by bootstrap; `values` are the shares of each problem's answers that are right."""
    if {*values} <= {0, 1}:
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
