"""The uncertainty of an accuracy, and of a difference between two runs on the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cera_train.common.errors import UserError

BLOCK = 1_000_000
"""Numbers that the bootstrap draws at once: 8 MB."""


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
    """The percentile bootstrap interval of a mean over problems (Efron 1979), the same for the same seed.

    Args:
        values: one for each problem.
        level: the share of resampled means that the interval holds.

    Raises:
        UserError: there are no values.
    """
    import numpy

    means = _resampled_means(values, resamples, seed)
    lower, upper = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def accuracy_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of an accuracy over problems: the bootstrap's.

    Where no problem or every problem is solved, resampling gives a point, so the interval is the exact binomial one
    instead (Clopper & Pearson 1934): 0 to 1 - (alpha/2)^(1/n), or (alpha/2)^(1/n) to 1.

    Args:
        values: the share of each problem's answers that is right.

    Raises:
        UserError: there are no values.
    """
    if len(values) and (max(values) == 0 or min(values) == 1):
        bound = ((1 - level) / 2) ** (1 / len(values))
        return (0.0, 1 - bound) if max(values) == 0 else (bound, 1.0)
    return bootstrap_interval(values, level)


def _resampled_means(values: Sequence[float], resamples: int, seed: int) -> Any:
    """Means of `resamples` draws of as many values, with replacement: [resamples]."""
    import numpy

    if not len(values):
        raise UserError("expected the values of at least one problem, got none.")
    # Drawing problems is drawing how often each distinct value comes up: for right and wrong, one binomial number.
    distinct, counts = numpy.unique(numpy.asarray(values, dtype=float), return_counts=True)
    generator = numpy.random.default_rng(seed)
    block = max(1, BLOCK // len(distinct))
    means = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        times_drawn = generator.multinomial(len(values), counts / len(values), size=size)  # [size, distinct]
        means.append(times_drawn @ distinct / len(values))
    return numpy.concatenate(means)


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the problems that exactly one of two runs solves."""

    only_first: int
    only_second: int
    p_value: float
    """Two-sided and exact: the probability of a split at least as uneven if a fair coin chose the run that solves each
    of these problems."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compares two runs on the same problems, in the same order (McNemar 1947, exact binomial form).

    Raises:
        UserError: the two have different lengths, or empty.
    """
    _check_paired(first, second)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    splits, tail = 1, 0  # ways for k of the n to fall to the run that has fewer, and their sum
    for k in range(min(only_first, only_second) + 1):
        tail += splits
        splits = splits * (n - k) // (k + 1)
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


@dataclass(frozen=True)
class Difference:
    """Difference of the means of two runs, second - first, with its interval."""

    difference: float
    lower: float
    upper: float


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Resamples problems with both runs' values together, so that what makes a problem hard for both cancels.

    Raises:
        UserError: the two have different lengths, or empty.
    """
    _check_paired(first, second)
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    lower, upper = bootstrap_interval(differences, level, resamples, seed)
    return Difference(sum(differences) / len(differences), lower, upper)


def _check_paired(first: Sequence[float], second: Sequence[float]) -> None:
    if len(first) != len(second):
        raise UserError(f"a paired test needs the same problems of both runs, got {len(first)} and {len(second)}.")
    if not len(first):
        raise UserError("expected the values of at least one problem, got none.")
