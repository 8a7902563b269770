"""Slopes per doubling of the rank, and where they end."""

from __future__ import annotations

import math

import numpy
import pytest
import scipy.stats

from cera_train.evaluation.slope import slope, slope_difference

RANKS = [2, 4, 6, 8]  # r = 4, 16, 64, 256
NOISE = [[-0.01, 0.0, 0.01], [0.01, -0.01, 0.0], [0.0, 0.01, -0.01], [-0.01, 0.01, 0.0]]  # [ranks][seeds]


def outcome(*means: float) -> list[list[float]]:
    return [[mean + each for each in seeds] for mean, seeds in zip(means, NOISE, strict=False)]


def test_the_overall_slope_is_that_of_least_squares():
    means = [3.0, 2.5, 2.4, 1.0]
    result = slope(RANKS, outcome(*means))
    assert result.overall.value == pytest.approx(numpy.polyfit(RANKS, means, 1)[0])
    assert [step.value for step in result.steps] == pytest.approx([-0.25, -0.05, -0.7])


def test_a_step_is_the_paired_t_test_of_two_ranks():
    """Per doubling."""
    first, second = [1.0, 1.1, 1.3], [0.9, 1.05, 1.1]
    expected, step = scipy.stats.ttest_rel(second, first), slope([2, 4], [first, second]).steps[0]
    assert step.p_value == pytest.approx(expected.pvalue)
    assert step.upper == pytest.approx(expected.confidence_interval(0.95).high / 2)


def test_what_seeds_have_in_common_at_all_ranks_cancels():
    near = outcome(3.0, 2.0, 2.5)
    far = [[10 * seed + value for seed, value in enumerate(row)] for row in near]
    assert vars(slope([2, 4, 6], far).overall) == pytest.approx(vars(slope([2, 4, 6], near).overall))


def test_two_ranks_have_one_slope():
    result = slope([2, 4], outcome(1.0, 0.5))
    assert result.overall == result.steps[0] == result.tails[0]


@pytest.mark.parametrize(
    ("means", "plateau"),
    [
        ([3.0, 2.0, 1.0, 0.0], None),
        ([3.0, 2.0, 1.0, 1.0], 64),
        ([3.0, 2.0, 2.0, 2.0], 16),
        ([2.0, 2.0, 2.0, 2.0], 4),
        ([2.0, 2.0, 2.0, 1.0], None),
        ([2.0, 3.0, 2.0, 2.0], 64),
        ([2.0, 1.982, 1.964, 1.946], 16),  # no step is shown, but the slope of all four is
    ],
)
def test_the_plateau_starts_where_no_change_is_shown(means, plateau):
    assert slope(RANKS, outcome(*means)).plateau == plateau


def test_a_plateau_of_wide_intervals_is_not_flat():
    result = slope(RANKS, outcome(3.0, 2.0, 2.0, 2.0))
    assert result.plateau == 16
    assert result.is_flat(0.03)
    assert not result.is_flat(0.01)
    assert not slope(RANKS, outcome(3.0, 2.0, 1.0, 0.0)).is_flat(10)


def test_one_seed_has_no_interval_and_no_plateau():
    result = slope([2, 4, 6], [[3.0], [2.0], [2.0]])
    assert (result.overall.lower, result.overall.upper, result.overall.p_value) == (-math.inf, math.inf, 1)
    assert result.plateau is None
    assert not result.is_flat(10)


def test_seeds_without_variance_give_points():
    result = slope([2, 4, 6], [[1.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    assert (result.steps[0].lower, result.steps[0].upper, result.steps[0].p_value) == (-0.25, -0.25, 0)
    assert (result.steps[1].lower, result.steps[1].upper, result.steps[1].p_value) == (0, 0, 1)
    assert result.plateau == 16


def test_a_difference_of_slopes_is_second_minus_first():
    first, second = slope(RANKS, outcome(1.0, 1.0, 1.0, 1.0)), slope(RANKS[:2], outcome(1.0, 0.5))
    difference = slope_difference(first, second)
    assert difference.value == pytest.approx(-0.25)
    assert difference.upper < 0
    assert slope_difference(second, first).lower == pytest.approx(-difference.upper)
    assert slope_difference(first, first).p_value == pytest.approx(1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_flat_outcome_has_a_slope_in_at_most_5_percent(seeds):
    generator, studies = numpy.random.default_rng(0), 250
    wrong = numpy.zeros(3)
    for _ in range(studies):
        first, second = (slope(RANKS, generator.normal(size=(4, seeds))) for _ in range(2))
        slopes = first.overall, first.steps[0], slope_difference(first, second)
        wrong += [not estimate.includes_zero for estimate in slopes]
    assert (wrong / studies <= 0.093).all()  # what 5 % gives in all but one of 1,000 simulations


def test_the_interval_covers_a_slope_where_variances_differ():
    generator, studies = numpy.random.default_rng(0), 500
    deviations = numpy.array([[3.0], [1.0], [0.3], [0.1]])
    missed = 0
    for _ in range(studies):
        overall = slope(
            [1, 2, 3, 4], 2.0 * numpy.arange(4)[:, None] + deviations * generator.normal(size=(4, 3))
        ).overall
        missed += not overall.lower <= 2 <= overall.upper
    assert missed / studies <= 0.08


@pytest.mark.parametrize(
    ("log2_ranks", "values", "match"),
    [
        ([2], [[1.0, 2.0]], "at least two ranks"),
        ([2, 4], [[1.0, 2.0]], "got 2 ranks, 1 values"),
        ([2, 4], [[1.0], []], "at least two ranks"),
        ([2, 4, 6], [[1.0, 2.0], [1.0], [1.0, 2.0]], "same seeds at every rank, got 1 and 2"),
        ([4, 2], [[1.0], [2.0]], "ascending ranks"),
        ([2, 4], [[1.0, math.nan], [2.0, 1.0]], "diverged"),
    ],
)
def test_what_has_no_slope_is_refused(log2_ranks, values, match):
    with pytest.raises(ValueError, match=match):
        slope(log2_ranks, values)
