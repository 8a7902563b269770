"""The uncertainty of an accuracy, and of a difference between two runs on the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cera_train.common.errors import UserError

BLOCK = 1_000_000  # numbers that the bootstrap draws at once: 8 MB


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k answers, drawn from `samples` of which `correct` are right, is right:
    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    assert 0 <= correct <= samples
    assert 1 <= k <= samples
    draws = math.comb(samples, k)
    return (draws - math.comb(samples - correct, k)) / draws  # of integers, so exact to the last bit


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over problems (Efron 1979), the same for the same seed. It holds a
    share of `level` of the resampled means."""
    import numpy

    _require_problems(values)
    # Drawing problems is drawing how often each distinct value comes up: for right and wrong, one binomial number.
    distinct, counts = numpy.unique(numpy.asarray(values, dtype=float), return_counts=True)
    generator = numpy.random.default_rng(seed)
    block = max(1, BLOCK // len(distinct))
    means = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        times_drawn = generator.multinomial(len(values), counts / len(values), size=size)  # [size, distinct]
        means.append(times_drawn @ distinct / len(values))
    lower, upper = numpy.quantile(numpy.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def accuracy_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of an accuracy; `values` are the shares of each problem's answers that are right.

    Where no problem or every problem is solved, resampling gives a point, so the interval is the exact binomial one
    instead (Clopper & Pearson 1934): 0 to 1 - (alpha/2)^(1/n), or (alpha/2)^(1/n) to 1.
    """
    if len(values) and (max(values) == 0 or min(values) == 1):
        bound = ((1 - level) / 2) ** (1 / len(values))
        return (0.0, 1 - bound) if max(values) == 0 else (bound, 1.0)
    return bootstrap_interval(values, level)


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the problems that exactly one of two runs solves."""

    only_first: int
    only_second: int
    p_value: float
    """Two-sided and exact: the probability of a split at least as uneven if a fair coin chose the run that solves each
    of these problems."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compares two runs on the same problems, in the same order (McNemar 1947, exact binomial form)."""
    pairs = _paired(first, second)
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


MOST_COINS = 13  # all outcomes of that many are 8,192


def sign_flip(first: Sequence[float], second: Sequence[float], resamples: int = 9_999, seed: int = 0) -> float:
    """The two-sided p-value of the paired permutation test of a mean (Fisher 1935): the probability of a difference at
    least as large if a fair coin chose for each problem which run has which of the two values. For right and wrong it
    is McNemar's. Exact where at most 13 problems differ; else of random outcomes, the observed one among them, which
    keeps its error rate at any number of them (Phipson & Smyth 2010)."""
    import numpy

    differences = numpy.array([float(b) - float(a) for a, b in _paired(first, second) if a != b])
    coins = len(differences)
    least = abs(differences.sum()) - 1e-9 * abs(differences).sum()  # equal sums may differ by rounding

    def extreme(heads: numpy.ndarray) -> int:  # [outcomes, coins]
        return numpy.count_nonzero(abs(differences.sum() - 2 * (heads @ differences)) >= least)

    if coins <= MOST_COINS:
        return extreme(numpy.arange(2**coins)[:, None] >> numpy.arange(coins) & 1) / 2**coins
    generator, block = numpy.random.default_rng(seed), max(1, BLOCK // coins)
    sizes = (min(block, resamples - start) for start in range(0, resamples, block))
    found = sum(extreme(generator.integers(2, size=(size, coins), dtype=bool)) for size in sizes)
    return (found + 1) / (resamples + 1)


@dataclass(frozen=True)
class Difference:
    """Difference of the means of two runs, second - first, with its 95 % interval."""

    difference: float
    lower: float
    upper: float


def paired_bootstrap(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Resamples problems with both runs' values together, so that what makes a problem hard for both cancels."""
    differences = [float(b) - float(a) for a, b in _paired(first, second)]
    return Difference(sum(differences) / len(differences), *bootstrap_interval(differences))


def _paired(first: Sequence[float], second: Sequence[float]) -> list[tuple[float, float]]:
    if len(first) != len(second):
        raise UserError(f"a paired test needs the same problems of both runs, got {len(first)} and {len(second)}.")
    _require_problems(first)
    return list(zip(first, second, strict=True))


def _require_problems(values: Sequence[float]) -> None:
    if not len(values):
        raise UserError("expected the values of at least one problem, got none.")
