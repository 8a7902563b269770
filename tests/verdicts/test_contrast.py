"""Verdicts keep their error rate and their power on simulated studies, equal textbook tests where
those apply, and are those of docs/evidence."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import scipy.stats

from benchmarks.verdicts import (
    DESIGNS,
    TUNINGS,
    Design,
    error_of,
    p_values,
    wrong_after_tuning,
)
from cera_train.common.files import read_json
from cera_train.verdicts.contrast import Contrast, Spread, Variances, contrast
from cera_train.verdicts.interval import sign_flip
from cera_train.verdicts.power import detectable
from cera_train.verdicts.tuning import around, by_chords, could_gain
from cera_train.verdicts.verdict import holm

STUDIES = 1_500
EVIDENCE = sorted(Path(__file__).parents[2].glob("docs/evidence/*.json"))
assert len(EVIDENCE) >= 10


def at_most(rate: float, studies: int) -> float:
    """The largest share that this rate gives in all but one of 1,000 simulations."""
    return rate + 3.1 * (rate * (1 - rate) / studies) ** 0.5


def values(seeds: int = 3, problems: int = 60, shift: float = 0.0, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).normal(size=(seeds, problems)) + shift


def recomputed(each: dict) -> Contrast:
    """From differences by seed and variance components, as rounded there; rows count by their
    number."""
    variances = Variances(**each["variances"])
    seeds = each["seeds"]
    problems = each["problems"]
    residual = variances.residual / (seeds * problems)
    by_seeds = float(numpy.var(each["by_seed"], ddof=1)) / seeds
    spread = Spread(by_seeds, seeds - 1, residual, variances.problem / problems, problems - 1)
    difference = each["difference"]
    between = each.get("between", 0.0)
    half = float(spread.half_width()) + between
    p_value = float(spread.p_value(max(abs(difference) - between, 0.0)))
    ends = (difference - half, difference + half)
    return Contrast(difference, *ends, p_value, variances, seeds, problems, between)


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_the_verdicts_of_the_evidence_are_reproduced(path):
    """Over all files of a family. Earlier studies have Holm in each outcome."""
    results = read_json(path)
    names = results.get("family", [path.stem])
    family = [read_json(path.with_stem(name))["contrasts"] for name in names]
    for outcome in {each["outcome"] for each in results["contrasts"]}:
        contrasts = [
            each for contrasts in family for each in contrasts if each["outcome"] == outcome
        ]
        planned = results.get("planned_contrasts", len(contrasts))
        again = list(map(recomputed, contrasts))
        adjusted = holm([each.p_value for each in again], planned)
        for each, result, p_value in zip(contrasts, again, adjusted, strict=True):
            # The weights of rows, which the page does not keep, take degrees of freedom from the
            # problems' part.
            assert [result.lower, result.upper] == pytest.approx(
                each.get("interval") or [each["lower"], each["upper"]],
                abs=0.01 * (result.upper - result.lower),
            )
            least = detectable(result.variances, result.seeds, result.problems, planned)
            assert least + result.between == pytest.approx(each["detectable"], rel=0.01)
            verdict = result.verdict_at(p_value, higher_is_better=outcome != "loss")
            assert verdict == each["verdict"]
            assert p_value == pytest.approx(each["p_holm"], rel=0.02)


@pytest.mark.parametrize("seeds", [2, 5])
def test_without_a_difference_at_most_5_percent_get_a_verdict(seeds):
    for design in DESIGNS[:-1]:
        error = error_of(replace(design, seeds=seeds), STUDIES)
        assert error <= at_most(0.05, STUDIES), design.name


@pytest.mark.parametrize(("seeds", "tune_seeds"), [(3, 0), (5, 3)])
def test_the_choice_of_tuned_values_adds_no_error(seeds, tune_seeds):
    for tuning in TUNINGS:
        _, widened = wrong_after_tuning(tuning, seeds, tune_seeds, STUDIES)
        assert widened <= at_most(0.03, STUDIES), tuning.name


def test_no_convex_loss_falls_further_than_a_grid_could_gain():
    """Losses a |d|^2, |d| and e^|d| in their distance d from a best value between two of a grid,
    each side with its own slope, and steps of different lengths."""
    draw = numpy.random.default_rng(0)
    for _ in range(300):
        places = draw.uniform(0.3, 2, 5).cumsum()
        distance = places - draw.uniform(places[1], places[3])
        slopes = numpy.where(distance < 0, *draw.exponential(size=(2, 1)))
        for shape in (numpy.square, numpy.abs, lambda d: numpy.expm1(abs(d)) - abs(d)):
            losses = slopes * shape(distance)
            chords = by_chords(around(losses, places))
            assert losses.min() <= chords + 1e-12
            assert could_gain(losses, places) <= chords + 1e-12


def test_no_parabola_falls_further_than_a_grid_could_gain():
    draw = numpy.random.default_rng(0)
    for _ in range(300):
        places = draw.uniform(0.3, 2, 5).cumsum()
        losses = (places - draw.uniform(places[1], places[3])) ** 2
        if 0 < losses.argmin() < 4:
            assert losses.min() <= could_gain(losses, places) + 1e-12


def test_a_neighbour_that_breaks_down_bends_no_curve():
    losses = [0.05, 0.01, 0.0, 0.8, math.inf]
    assert could_gain(losses, range(5)) == pytest.approx(0.03 * 0.8 / 0.84)
    assert could_gain([0.01, 0.0, math.inf], range(3)) == pytest.approx(0.01 / 4)


def test_after_holm_at_most_5_percent_of_studies_have_any_wrong_verdict():
    design = Design(seeds=3, problems=50, seed=(0.3, 0.3), problem=0.3)
    assert error_of(design, studies=300, arms=10) <= at_most(0.05, 300)


@pytest.mark.parametrize("comparisons", [1, 10])
def test_a_detectable_difference_is_found_by_80_percent(comparisons):
    for seeds, (problems, seed, problem) in itertools.product((2, 5), ((50, 1, 0), (100, 0.1, 1))):
        variances = Variances(2 * seed**2, 2 * problem**2, 2)
        least = detectable(variances, seeds, problems, comparisons)
        design = Design("", seeds, problems, (seed, seed), problem, difference=least)
        differences, tests = p_values(design, STUDIES)
        is_found = (differences > 0) & (tests <= 0.05 / comparisons)
        assert is_found.mean() == pytest.approx(0.8, abs=0.035)


@pytest.mark.parametrize("axis", [0, 1], ids=["seeds", "problems"])
def test_what_changes_nothing_leaves_the_paired_t_test_over_the_other(axis):
    first, second = (values(1, 9, seed=seed)[0] for seed in (0, 1))
    expected = scipy.stats.ttest_rel(second, first)
    result = contrast(
        *(numpy.repeat(numpy.expand_dims(arm, axis), 50, axis) for arm in (first, second))
    )
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (result.lower, result.upper) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_a_weighted_mean_is_nats_over_tokens():
    tokens = numpy.array([1.0, 10, 100])
    first, second = (values(3, 3, seed=seed) for seed in (0, 1))
    expected = ((second - first) * tokens).sum() / (3 * 111)
    assert contrast(first, second, tokens).difference == pytest.approx(expected)
    assert contrast(first, second, tokens).p_value == pytest.approx(
        contrast(first, second, tokens / 7).p_value
    )


def test_swapping_the_arms_swaps_the_sign():
    there = contrast(values(), values(seed=1))
    back = contrast(values(seed=1), values())
    assert (there.difference, there.lower, there.upper) == pytest.approx(
        (-back.difference, -back.upper, -back.lower)
    )
    assert there.p_value == pytest.approx(back.p_value)
    assert there.verdict_at(0.01, True) == back.verdict_at(0.01, False) != "not shown"
    assert there.verdict_at(0.051, True) == "not shown"


def test_identical_losses_are_a_point_and_identical_scores_are_not():
    """That two arms solve the same of 60 problems, such as none, leaves a share of others on which
    they may differ."""
    result = contrast(values(), values(), numpy.ones(60))
    assert (result.difference, result.lower, result.upper, result.p_value) == (0, 0, 0, 1)
    scores = contrast(numpy.zeros((3, 60)), numpy.zeros((3, 60)))
    assert scores.upper == -scores.lower == pytest.approx(1 - 0.025 ** (1 / 60))
    assert (scores.p_value, scores.variances) == (1, None)


def test_all_right_against_all_wrong_is_exact():
    result = contrast(numpy.zeros((3, 50)), numpy.ones((3, 50)))
    assert result.p_value == sign_flip([0] * 50, [1] * 50)
    assert (result.lower, result.upper) == pytest.approx((0.025 ** (1 / 50), 1))


def test_one_right_answer_of_all_seeds_is_not_shown():
    """Seeds agree by chance, so that their means have no variance; the answers do."""
    first = numpy.zeros((2, 50))
    second = numpy.zeros((2, 50))
    second[0, 3] = second[1, 7] = 1
    result = contrast(first, second)
    assert result.lower < 0 < result.upper
    assert result.p_value > 0.1


def test_one_seed_or_one_problem_shows_nothing():
    for shape in ((1, 60), (3, 1)):
        result = contrast(values(*shape), values(*shape, shift=9, seed=1))
        assert (result.lower, result.upper, result.p_value, result.variances) == (
            -numpy.inf,
            numpy.inf,
            1,
            None,
        )


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        contrast(values(1, 3), [[1, 2, numpy.nan]])


def test_holm_multiplies_the_smallest_by_all_and_never_decreases():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
