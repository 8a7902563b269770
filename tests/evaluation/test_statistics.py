"""Scores and tests against enumeration and scipy."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats

from cera_train.evaluation.statistics import (
    accuracy_interval,
    bootstrap_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    pass_at_k,
    sign_flip,
)

ACCURACY = [1.0] * 120 + [0.0] * 280


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_bootstrap_interval_of_an_accuracy_approaches_the_normal_one():
    half = scipy.stats.norm.ppf(0.975) * math.sqrt(0.3 * 0.7 / 400)
    assert bootstrap_interval(ACCURACY) == pytest.approx((0.3 - half, 0.3 + half), abs=3e-3)


@pytest.mark.parametrize("problems", [1, 7, 1319])
def test_the_interval_of_none_or_all_problems_is_clopper_and_pearsons(problems):
    """Resampling would give a point, which is not how sure the accuracy is."""
    for right in (0, problems):
        expected = scipy.stats.binomtest(right, problems).proportion_ci(0.95, method="exact")
        values = [1.0] * right + [0.0] * (problems - right)
        assert accuracy_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert accuracy_interval(ACCURACY) == bootstrap_interval(ACCURACY)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (6, 0), (3, 10)])
def test_sign_flip_of_right_and_wrong_is_mcnemars(only_first, only_second):
    first = [True] * only_first + [False] * only_second + [True, False]
    second = [False] * only_first + [True] * only_second + [True, False]
    assert sign_flip(first, second) == pytest.approx(mcnemar(first, second).p_value)


def test_paired_bootstrap_uses_the_pairing():
    """Two runs that differ on 20 of 400 problems: their intervals overlap widely, the difference is sure."""
    second = [1.0] * 140 + [0.0] * 260
    difference = paired_bootstrap(ACCURACY, second)
    assert bootstrap_interval(ACCURACY)[1] > bootstrap_interval(second)[0]
    half = 1.96 * math.sqrt(0.05 * 0.95 / 400)
    assert difference.difference == pytest.approx(0.05)
    assert (difference.lower, difference.upper) == pytest.approx((0.05 - half, 0.05 + half), abs=3e-3)


@pytest.mark.parametrize("test", [mcnemar, sign_flip, paired_bootstrap])
def test_runs_on_different_problems_are_refused(test):
    with pytest.raises(ValueError, match="zip"):
        test([True, False], [True, False, True])


def test_holm_multiplies_the_smallest_by_all_and_never_decreases():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
