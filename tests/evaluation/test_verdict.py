"""Verdicts keep their error rate on simulated studies, and equal textbook tests where those apply."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import scipy.stats

from benchmarks.verdicts import (
    DESIGNS,
    DOMINATED,
    Design,
    by_bootstrap,
    by_satterthwaite,
    by_verdict,
    draw_studies,
    error_of,
    family_error,
)
from cera_train.evaluation.statistics import mcnemar
from cera_train.evaluation.verdict import Contrast, contrast, estimate_mean, holm, verdict

COLLAPSE = DESIGNS[-1]
STUDIES = 1_500


def at_most(rate: float, studies: int) -> float:
    """The largest share that this rate gives in all but one of 1,000 simulations."""
    return rate + 3.1 * (rate * (1 - rate) / studies) ** 0.5


def values(seeds: int = 3, problems: int = 60, shift: float = 0.0, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).normal(size=(seeds, problems)) + shift


def made(difference: float, lower: float, upper: float, reason: str = "") -> Contrast:
    return Contrast(difference, lower, upper, 0.01, None, 3, 50, reason)


# --- error rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("design", DESIGNS[:-1], ids=lambda design: design.name)
def test_without_a_difference_at_most_5_percent_get_a_verdict(design, seeds):
    studies = STUDIES * 200 // max(200, design.problems)
    assert error_of(replace(design, seeds=seeds), by_verdict, studies) <= at_most(0.05, studies)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 0.03, 0.1, 0.3, 1, 10])
def test_the_error_rate_holds_from_no_variance_of_seeds_to_nothing_else(seeds, seed):
    design = Design(seeds=seeds, problems=100, seed=(seed, seed), problem=0.3, residual=0.3)
    assert error_of(design, by_verdict, STUDIES) <= at_most(0.05, STUDIES)


@pytest.mark.parametrize(("seeds", "documented"), [(2, 0.122), (3, 0.030), (5, 0.025)])
def test_seeds_that_collapse_err_as_often_as_documented(seeds, documented):
    assert error_of(replace(COLLAPSE, seeds=seeds), by_verdict, STUDIES) == pytest.approx(documented, abs=0.02)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_after_holm_at_most_5_percent_of_studies_have_any_wrong_verdict(seeds):
    design = Design(seeds=seeds, problems=50, seed=(0.3, 0.3), problem=0.3)
    assert family_error(design, arms=10, studies=300) <= at_most(0.05, 300)


def test_what_is_not_used_errs_more_often():
    """The hierarchical bootstrap and one t quantile, at 3 seeds: why `verdict` has its interval."""
    assert error_of(DOMINATED, by_bootstrap, 500) > 0.15
    unequal = Design(seed=(1, 0.01), seeds=2, problems=50, problem=2, residual=0.01)
    assert error_of(unequal, by_satterthwaite, STUDIES) > at_most(0.05, STUDIES)
    assert error_of(unequal, by_verdict, STUDIES) <= at_most(0.05, STUDIES)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_interval_covers_a_planted_difference(weighted):
    design = Design(seed=(0.1, 0.1), problem=0.5, weighted=weighted, difference=1.0)
    missed = 0
    for first, second, weights in draw_studies(design, STUDIES, numpy.random.default_rng(1)):
        difference, spread, _ = estimate_mean(second - first, weights)
        missed += (numpy.abs(difference - 1.0) > spread.half_width()).sum()
    assert missed / STUDIES <= at_most(0.05, STUDIES)


def test_variance_components_are_those_of_the_simulation():
    design = Design(seeds=5, shared=2, seed=(0.3, 0.4), problem=0.5, residual=0.6)
    (first, second, weights), *_ = draw_studies(design, 1_000, numpy.random.default_rng(0))
    _, _, variances = estimate_mean(second - first, weights)
    assert variances.seed.mean() == pytest.approx(0.25, rel=0.05)
    assert variances.problem.mean() == pytest.approx(0.5, rel=0.05)
    assert variances.residual.mean() == pytest.approx(0.72, rel=0.05)


# --- equal to known tests --------------------------------------------------------------------------------------------


def test_seeds_that_change_nothing_leave_the_paired_t_test_over_problems():
    first, second = (numpy.repeat(values(1, seed=seed), 3, axis=0) for seed in (0, 1))
    expected = scipy.stats.ttest_rel(second[0], first[0])
    result = contrast(first, second)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (result.lower, result.upper) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_problems_that_change_nothing_leave_the_paired_t_test_over_seeds():
    first, second = [0.0, 1.0, 2.0], [5.0, 5.5, 7.5]
    expected = scipy.stats.ttest_rel(second, first)
    result = contrast(*(numpy.repeat(numpy.array(arm)[:, None], 50, axis=1) for arm in (first, second)))
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (result.lower, result.upper) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_the_p_value_is_the_error_rate_whose_interval_ends_at_zero():
    _, spread, _ = estimate_mean(values(), numpy.ones(60))
    for difference in (0.01, 0.3, 2.0):
        assert spread.half_width(spread.p_value(difference)) == pytest.approx(difference)
    assert spread.p_value(0.0) == 1


def test_a_weighted_mean_is_nats_over_tokens():
    tokens = numpy.array([1.0, 10, 100])
    first, second = (values(3, 3, seed=seed) for seed in (0, 1))
    expected = (second * tokens).sum() / (3 * 111) - (first * tokens).sum() / (3 * 111)
    assert contrast(first, second, tokens).difference == pytest.approx(expected)


def test_the_unit_of_the_weights_changes_nothing():
    tokens = numpy.arange(1, 61)
    first, second = values(), values(seed=1)
    assert contrast(first, second, tokens).p_value == pytest.approx(contrast(first, second, tokens / 7).p_value)
    assert contrast(first, second, numpy.full(60, 9)).upper == pytest.approx(contrast(first, second).upper)


def test_rows_without_tokens_are_left_out():
    first, second = values(), values(seed=1)
    first[:, :10] = numpy.nan
    weights = numpy.array([0] * 10 + [1] * 50)
    assert contrast(first, second, weights) == contrast(first[:, 10:], second[:, 10:])


def test_problems_are_paired():
    """Problems differ by 100 times what the arms differ by."""
    difficulty = 100 * values(1, seed=9)
    assert contrast(values() + difficulty, values(shift=1, seed=1) + difficulty).p_value < 0.01


def test_seeds_are_paired():
    """Seeds differ by 100 times what the arms differ by."""
    order = 100 * values(3, 1, seed=9)
    assert contrast(values() + order, values(shift=2, seed=1) + order).p_value < 0.05


def test_swapping_the_arms_swaps_the_sign():
    there, back = contrast(values(), values(seed=1)), contrast(values(seed=1), values())
    assert (there.difference, there.lower, there.upper) == pytest.approx((-back.difference, -back.upper, -back.lower))
    assert there.p_value == pytest.approx(back.p_value)


# --- degenerate data -------------------------------------------------------------------------------------------------


def test_identical_arms_are_a_point():
    result = contrast(values(), values())
    assert (result.difference, result.lower, result.upper, result.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_all_right_against_all_wrong_is_exact(sign):
    first, second = (numpy.full((3, 50), share) for share in ((0.0, 1.0) if sign > 0 else (1.0, 0.0)))
    result = contrast(first, second)
    assert result.p_value == mcnemar([False] * 50, [True] * 50).p_value
    assert sorted((abs(result.lower), abs(result.upper))) == pytest.approx([0.025 ** (1 / 50), 1])
    assert result.lower * sign > 0


def test_one_right_answer_of_all_seeds_is_not_shown():
    """Seeds agree by chance, so that their means have no variance; the answers do."""
    first, second = numpy.zeros((2, 50)), numpy.zeros((2, 50))
    second[0, 3] = second[1, 7] = 1
    result = contrast(first, second)
    assert result.lower < 0 < result.upper
    assert result.p_value > 0.1


def test_one_seed_shows_nothing_and_says_why():
    first, second = values(1), values(1, shift=9, seed=1)
    result = contrast(first, second)
    assert result.difference == pytest.approx(second.mean() - first.mean())
    assert (result.lower, result.upper, result.p_value, result.variances) == (-numpy.inf, numpy.inf, 1, None)
    assert "one seed an arm" in result.reason
    assert verdict(result, 0.0, higher_is_better=True) == "not shown"
    assert not result.within(1e9)


def test_two_runs_on_graded_problems_have_mcnemars_test():
    first, second = [[1, 0, 0, 1, 0]], [[1, 1, 1, 1, 0]]
    assert contrast(first, second).mcnemar == mcnemar([1, 0, 0, 1, 0], [1, 1, 1, 1, 0])
    assert contrast(first, [[1, 1, 0.5, 1, 0]]).mcnemar is None
    assert contrast(first * 2, second * 2).mcnemar is None


def test_one_problem_shows_nothing_and_says_why():
    assert "one problem" in contrast([[1.0], [2]], [[3.0], [4]]).reason
    assert "one problem" in contrast(values(3, 2), values(3, 2), [1, 0]).reason


@pytest.mark.parametrize(
    ("first", "second", "weights", "match"),
    [
        (values(3, 4), values(3, 5), None, "same problems of both arms, got 4 and 5"),
        (values(3, 4), values(2, 4), None, "same seeds of both arms, got 3 and 2"),
        (values(1, 4), [[1, 2, numpy.nan, 4]], None, "second arm: row 0 .* diverged"),
        ([[1, 2], [1]], values(3, 2), None, "first arm: its seeds have different numbers of problems"),
        ([1, 2], values(3, 2), None, r"first arm: expected values of \[seeds, problems\]"),
        (values(3, 4), values(3, 4), [1, 2, 3], "weights: expected 4 numbers"),
        (values(3, 2), values(3, 2), [1, -1], "weights: expected 2 numbers of at least 0"),
        (values(3, 2), values(3, 2), [0, 0], "weights: all are 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, weights, match):
    with pytest.raises(ValueError, match=match):
        contrast(first, second, weights)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_holm_multiplies_the_smallest_by_all_and_never_decreases():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(("higher_is_better", "expected"), [(True, "better"), (False, "worse")])
def test_a_verdict_names_the_second_arm(higher_is_better, expected):
    assert verdict(made(0.2, 0.1, 0.3), 0.05, higher_is_better) == expected
    assert verdict(made(-0.2, -0.3, -0.1), 0.05, not higher_is_better) == expected
    assert verdict(made(0.2, 0.1, 0.3), 0.051, higher_is_better) == "not shown"


def test_no_difference_that_matters_is_an_interval_within_the_bounds():
    assert made(0.0, -0.1, 0.1).within(0.1)
    assert not made(0.0, -0.1, 0.11).within(0.1)
    assert not made(0.05, -0.11, 0.1).within(0.1)


def test_values_are_plain_numbers():
    """For JSON."""
    result = contrast(values(), values(seed=1))
    numbers = [result.difference, result.lower, result.upper, result.p_value, *vars(result.variances).values()]
    assert {type(number) for number in numbers} == {float}


def test_the_same_data_in_a_batch_give_the_same_result():
    studies = [(values(seed=seed), values(seed=seed + 50)) for seed in range(4)]
    differences = numpy.stack([second - first for first, second in studies])
    difference, spread, _ = estimate_mean(differences, numpy.ones(60))
    for index, (first, second) in enumerate(studies):
        single = contrast(first, second)
        assert difference[index] == pytest.approx(single.difference)
        assert spread.half_width()[index] == pytest.approx((single.upper - single.lower) / 2)


def test_a_design_planted_with_a_difference_is_simulated_without_it_for_errors():
    design = replace(DOMINATED, difference=9.0)
    assert error_of(design, by_verdict, 200) < 0.2
