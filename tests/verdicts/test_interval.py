"""The tests of two runs: they agree with other formulas on 1,000 made pairs, and have their power
on 2,000 simulated ones."""

import itertools
import math

import numpy
import pytest
import scipy.stats
from scipy.stats import binom, permutation_test

from cera_train.verdicts import interval
from cera_train.verdicts.interval import (
    accuracy_interval,
    bootstrap_interval,
    pass_at_k,
    sign_flip,
)
from cera_train.verdicts.power import POWER, detectable_between_runs


@pytest.fixture
def draw() -> numpy.random.Generator:
    return numpy.random.default_rng(0)


def test_mcnemars_p_is_that_of_the_binomial_on_1000_made_pairs(draw):
    for _ in range(1_000):
        values = draw.random((2, int(draw.integers(2, 400))))
        first, second = (values < draw.random((2, 1))).astype(float)
        only = [(first > second).sum(), (second > first).sum()]
        tail = binom.cdf(min(only), sum(only), 0.5)
        assert sign_flip(first, second) == pytest.approx(min(1, 2 * tail))


def test_the_p_of_scores_is_that_of_all_flips(draw):
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


def test_beyond_many_problems_a_normal_p_continues_the_flips(draw, monkeypatch):
    first, second = draw.random((2, 500))
    resampled = sign_flip(first, second)
    monkeypatch.setattr(interval, "MANY", 499)
    normal = sign_flip(first, second)
    assert normal == pytest.approx(resampled, abs=0.02)
    assert normal != resampled


@pytest.mark.slow
@pytest.mark.parametrize("tests", [1, pytest.param(62, marks=pytest.mark.nightly)])
def test_a_detectable_difference_is_shown_in_80_percent_of_pairs(draw, tests):
    """A third of 200 problems differ by chance."""
    problems = 200
    shown = 0
    difference = detectable_between_runs(1 / 3, problems, tests)
    chances = [(1 / 3 - difference) / 2, (1 / 3 + difference) / 2]
    for _ in range(2_000):
        falls, rises, _ = draw.multinomial(problems, [*chances, 2 / 3])
        values = numpy.repeat([[1, 0], [0, 1]], [falls, rises], axis=0)
        shown += sign_flip(*values.T) <= 0.05 / tests
    assert shown / 2_000 == pytest.approx(POWER, abs=0.06)


# --- one accuracy ---------------------------------------------------------------------------------


ACCURACY = [1.0] * 120 + [0.0] * 280


@pytest.mark.parametrize("samples", [1, 5])
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-15
            )


def test_bootstrap_interval_of_an_accuracy_approaches_the_normal_one():
    half = scipy.stats.norm.ppf(0.975) * math.sqrt(0.3 * 0.7 / 400)
    assert bootstrap_interval(ACCURACY) == pytest.approx((0.3 - half, 0.3 + half), abs=3e-3)


@pytest.mark.parametrize("problems", [1, 1319])
def test_the_interval_of_an_accuracy_is_clopper_and_pearsons(problems):
    """Resampling would give a point for none or all, and 94 to 100 % for 49 of 50."""
    for right in {0, problems - 1, problems}:
        expected = scipy.stats.binomtest(right, problems).proportion_ci(0.95, method="exact")
        values = [1.0] * right + [0.0] * (problems - right)
        assert accuracy_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-9)
    shares = [*ACCURACY, 0.5]
    assert accuracy_interval(shares) == bootstrap_interval(shares)
