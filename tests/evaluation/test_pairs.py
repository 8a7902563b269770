"""The tests of two runs: they agree with other formulas on 1,000 made pairs, and keep their error
rate and their power on 10,000 simulated ones."""

import math
from dataclasses import astuple

import numpy
import pytest
from scipy.stats import binom, hypergeom, permutation_test

from cera_train.evaluation import statistics
from cera_train.evaluation.statistics import (
    POWER,
    detectable_difference,
    fisher,
    paired_bootstrap,
    sign_flip,
    unpaired_difference,
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


def test_fishers_p_is_that_of_the_hypergeometric_on_1000_made_pairs(draw) -> None:
    for _ in range(1_000):
        problems = draw.integers(2, 400, size=2)
        first = right_or_wrong(draw, draw.random(1), problems[0])[0]
        second = right_or_wrong(draw, draw.random(1), problems[1])[0]
        right = int(first.sum() + second.sum())
        chances = hypergeom(sum(problems), right, problems[0]).pmf(numpy.arange(right + 1))
        as_rare = chances <= chances[int(first.sum())] * (1 + 1e-9)
        assert fisher(first, second) == pytest.approx(min(1, chances[as_rare].sum()))


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


@pytest.mark.parametrize(
    ("first", "second", "interval"),
    [
        ((48, 80), (56, 70), (0.0524, 0.3339)),
        ((3, 10), (9, 10), (0.1705, 0.8090)),
        ((0, 29), (5, 56), (-0.0381, 0.1926)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
        ((0, 10), (10, 10), (0.6075, 1.0)),
    ],
)
def test_unpaired_intervals_are_those_that_newcombe_printed(first, second, interval) -> None:
    """Newcombe 1998, "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 17, table II, method 10."""
    values = [[1] * right + [0] * (problems - right) for right, problems in (first, second)]
    found = unpaired_difference(*values)
    assert (found.lower, found.upper) == pytest.approx(interval, abs=5e-5)


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
    """Paired, problems are easy or hard for both runs."""
    paired = 0
    unpaired = 0
    for _ in range(10_000):
        ease = draw.beta(0.5, 0.5, size=problems)
        first, second = (draw.random((2, problems)) < ease).astype(float)
        paired += sign_flip(first, second) <= 0.05
        first, second = right_or_wrong(draw, (0.48, 0.48), problems)
        unpaired += fisher(first, second) <= 0.05
    # at most 500 are expected, with a standard deviation of 22
    assert 100 < paired < 566
    assert 100 < unpaired < 566


@pytest.mark.slow
@pytest.mark.parametrize("problems", [200, pytest.param(1_319, marks=NIGHTLY)])
@pytest.mark.parametrize("tests", [1, pytest.param(62, marks=NIGHTLY)])
def test_a_detectable_difference_is_shown_in_80_percent_of_pairs(
    draw, problems: int, tests: int
) -> None:
    """A third of the problems differ by chance; unpaired, about half are solved."""
    shown = {"paired": 0, "unpaired": 0}
    difference = detectable_difference(math.sqrt(1 / 3 / problems), problems, tests)
    unpaired = detectable_difference(math.sqrt(0.5 / problems), problems, tests)
    chances = [(1 / 3 - difference) / 2, (1 / 3 + difference) / 2]
    for _ in range(2_000):
        falls, rises, _ = draw.multinomial(problems, [*chances, 2 / 3])
        values = numpy.repeat([[1, 0], [0, 1]], [falls, rises], axis=0)
        shown["paired"] += sign_flip(*values.T) <= 0.05 / tests
        shares = right_or_wrong(draw, (0.5 - unpaired / 2, 0.5 + unpaired / 2), problems)
        shown["unpaired"] += fisher(*shares) <= 0.05 / tests
    assert all(count / 2_000 == pytest.approx(POWER, abs=0.06) for count in shown.values())
