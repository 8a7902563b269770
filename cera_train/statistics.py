"""How sure a measured accuracy is, and a difference between two runs on the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k answers, drawn from `samples` of which `correct` are right, is right:
    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    assert 0 <= correct <= samples
    assert 1 <= k <= samples
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over problems.

    Raises:
        ValueError: there are no values.
    """
    import numpy

    means = _resampled_means(values, resamples, seed)
    lower, upper = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def _resampled_means(values: Sequence[float], resamples: int, seed: int) -> Any:
    import numpy

    if not len(values):
        raise ValueError("there are no values to resample.")
    # Drawing problems with replacement is drawing how often each distinct value comes up.
    distinct, counts = numpy.unique(numpy.asarray(values, dtype=float), return_counts=True)
    generator = numpy.random.default_rng(seed)
    drawn = generator.multinomial(len(values), counts / len(values), size=resamples)
    return drawn @ distinct / len(values)


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the problems that exactly one of two runs solves."""

    only_first: int
    only_second: int
    p_value: float
    """Two-sided and exact: of as uneven a split, if each such problem fell to either run by a fair coin."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compares two runs on the same problems, in the same order (McNemar 1947, exact binomial form).

    Raises:
        ValueError: the two are of different lengths.
    """
    _check_paired(first, second)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, float(min(1, 2 * tail / 2**n)))


@dataclass(frozen=True)
class Difference:
    """Of the means of two runs, second - first, with its interval."""

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
    """Resamples problems, both runs' values together, so that what makes a problem hard for both cancels.

    Raises:
        ValueError: the two are of different lengths, or empty.
    """
    _check_paired(first, second)
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    lower, upper = bootstrap_interval(differences, level, resamples, seed)
    return Difference(sum(differences) / len(differences), lower, upper)


def _check_paired(first: Sequence, second: Sequence) -> None:
    if len(first) != len(second):
        raise ValueError(f"a paired test needs the same problems of both runs, got {len(first)} and {len(second)}.")
