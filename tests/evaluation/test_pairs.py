"""The tests of two runs: they agree with other formulas on 1,000 made pairs, and keep their error
rate and their power on 10,000 simulated ones."""

import math
from dataclasses import astuple

import numpy
import pytest
from scipy.stats import binom, permutation_test

from cera_train.evaluation import statistics
from cera_train.evaluation.statistics import (
    POWER,
    detectable_difference,
    paired_bootstrap,
    sign_flip,
)

NIGHTLY = pytest.mark.nightly


@pytest.fixture
def draw() -> numpy.random.Generator:
    return numpy.random.default_rng(0)


def right_or_wrong(draw: numpy.random.Generator, shares, problems: int) -> numpy.ndarray:
    """[runs, problems]"""
    return (draw.random((len(shares), problems)) < numpy.reshape(shares, (-1, 1))).astype(float)


def test_mcnemars_p_is_that_of_the_binomial_on_1000_made_pairs(draw) -> None:
    for _ in range(1_000):
        first, second = right_or_wrong(draw, draw.random(2), int(draw.integers(2, 400)))
        only = [(first > second).sum(), (second > first).sum()]
        tail = binom.cdf(min(only), sum(only), 0.5)
        assert sign_flip(first, second) == pytest.approx(min(1, 2 * tail))


def test_the_p_of_scores_is_that_of_all_flips(draw) -> None:
    for _ in range(30):
        first, second = draw.random((2, int(draw.integers(2, 9)))).round(1)
        every = permutation_test(
            (first, second),
            lambda a, b, axis: abs(numpy.mean(b - a, axis=axis)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=numpy.inf,
        )
        assert sign_flip(first, second) == pytest.approx(every.pvalue)


def test_beyond_many_problems_normal_formulas_continue_the_resampling(draw, monkeypatch) -> None:
    first, second = draw.random((2, 500))
    resampled = paired_bootstrap(first, second)
    p_value = sign_flip(first, second)
    monkeypatch.setattr(statistics, "MANY", 499)
    normal = paired_bootstrap(first, second)
    assert astuple(normal) == pytest.approx(astuple(resampled), abs=2e-3)
    assert normal != resampled
    assert sign_flip(first, second) == pytest.approx(p_value, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problems", [pytest.param(50, marks=NIGHTLY), 200, pytest.param(1_319, marks=NIGHTLY)]
)
def test_equal_runs_differ_in_at_most_5_percent_of_10000_pairs(draw, problems: int) -> None:
    """Problems are easy or hard for both runs."""
    shown = 0
    for _ in range(10_000):
        ease = draw.beta(0.5, 0.5, size=problems)
        first, second = (draw.random((2, problems)) < ease).astype(float)
        shown += sign_flip(first, second) <= 0.05
    # at most 500 are expected, with a standard deviation of 22
    assert 100 < shown < 566


@pytest.mark.slow
@pytest.mark.parametrize("problems", [200, pytest.param(1_319, marks=NIGHTLY)])
@pytest.mark.parametrize("tests", [1, pytest.param(62, marks=NIGHTLY)])
def test_a_detectable_difference_is_shown_in_80_percent_of_pairs(
    draw, problems: int, tests: int
) -> None:
    """A third of the problems differ by chance."""
    shown = 0
    difference = detectable_difference(math.sqrt(1 / 3 / problems), problems, tests)
    chances = [(1 / 3 - difference) / 2, (1 / 3 + difference) / 2]
    for _ in range(2_000):
        falls, rises, _ = draw.multinomial(problems, [*chances, 2 / 3])
        values = numpy.repeat([[1, 0], [0, 1]], [falls, rises], axis=0)
        shown += sign_flip(*values.T) <= 0.05 / tests
    assert shown / 2_000 == pytest.approx(POWER, abs=0.06)
