"""The power that is announced is the power that simulated studies have."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.verdicts import Design, by_verdict, found, rates, with_detectable_difference
from cera_train.evaluation.power import detectable, needed, power_of
from cera_train.evaluation.verdict import Variances

VARIANCES = Variances(seed=0.002, problem=2.0, residual=4.0)
DESIGNS = {
    "noise alone": Design(problems=100),
    "seeds dominate": Design(problems=50, seed=(1, 1)),
    "problems dominate": Design(problems=100, problem=1, residual=0.1),
    "all alike": Design(problems=100, seed=(0.1, 0.1), problem=1, residual=1),
}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("comparisons", [1, 10])
@pytest.mark.parametrize("name", DESIGNS)
def test_a_detectable_difference_is_found_by_80_percent(name, comparisons, seeds):
    assert found(replace(DESIGNS[name], seeds=seeds), comparisons, 1_500) == pytest.approx(0.8, abs=0.035)


def test_the_announced_power_is_the_found_one_at_any_difference():
    for difference in (0.1, 0.2, 0.4):
        design = Design(problems=100, seeds=4, seed=(0.1, 0.1), difference=difference)
        announced = power_of(design.variances, difference, 4, 100)
        assert rates(design, by_verdict, 2_000)[0] == pytest.approx(announced, abs=0.035)


def test_the_detectable_difference_has_exactly_its_power():
    for power in (0.5, 0.8, 0.95):
        for comparisons in (1, 7):
            difference = detectable(VARIANCES, 3, 200, comparisons, power)
            assert power_of(VARIANCES, difference, 3, 200, comparisons) == pytest.approx(power, abs=1e-4)


def test_many_seeds_approach_the_normal_formula():
    error = math.sqrt(0.02 / 5_000)
    assert detectable(Variances(0.02, 0, 0), 5_000, 100) == pytest.approx((1.95996 + 0.84162) * error, rel=1e-3)


@pytest.mark.parametrize(
    ("seeds", "comparisons", "standard_errors"),
    [(2, 1, 16.3), (3, 1, 5.7), (5, 1, 3.8), (2, 10, 165), (3, 10, 18.0), (5, 10, 7.1)],
)
def test_the_figures_of_docs_evidence_where_seeds_dominate(seeds, comparisons, standard_errors):
    difference = detectable(Variances(1, 0, 0), seeds, 200, comparisons)
    assert difference / math.sqrt(1 / seeds) == pytest.approx(standard_errors, rel=0.015)


def test_more_seeds_problems_and_power_order_as_they_should():
    base = detectable(VARIANCES, 3, 200)
    assert detectable(VARIANCES, 4, 200) < base
    assert detectable(VARIANCES, 3, 201) < base
    assert detectable(VARIANCES, 3, 200, power=0.9) > base
    assert detectable(VARIANCES, 3, 200, comparisons=2) > base


def test_a_planted_detectable_difference_is_the_announced_one():
    design = with_detectable_difference(DESIGNS["all alike"])
    assert design.difference == detectable(design.variances, 3, 100)


def test_one_seed_or_one_problem_detects_nothing():
    assert detectable(VARIANCES, 1, 200) == detectable(VARIANCES, 3, 1) == math.inf
    assert power_of(VARIANCES, 9.0, 1, 200) == 0


def test_needed_numbers_are_the_smallest_that_suffice():
    seeds, problems = needed(VARIANCES, 0.3, 3, 200)
    assert detectable(VARIANCES, seeds, 200) <= 0.3 < detectable(VARIANCES, seeds - 1, 200)
    assert detectable(VARIANCES, 3, problems) <= 0.3 < detectable(VARIANCES, 3, problems - 1)
    assert needed(VARIANCES, -0.3, 3, 200) == (seeds, problems)


def test_what_no_number_shows_is_none():
    """Problems do not make up for the seeds' variance, nor seeds for the problems'."""
    assert needed(Variances(1.0, 0, 0), 0.1, 3, 200)[1] is None
    assert needed(Variances(0, 1.0, 0), 0.01, 3, 200)[0] is None
    assert needed(VARIANCES, 0.0, 3, 200) == (None, None)


def test_no_variance_detects_anything():
    assert detectable(Variances(0, 0, 0), 3, 200) == pytest.approx(0, abs=1e-200)
    assert needed(Variances(0, 0, 0), 0.1, 3, 200) == (2, 2)


@pytest.mark.parametrize("wrong", [Variances(-1, 0, 0), Variances(0, math.nan, 0)])
def test_variances_below_zero_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 0"):
        detectable(wrong, 3, 200)
