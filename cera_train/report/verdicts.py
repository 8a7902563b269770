"""Paired tests of runs as rows of a forest plot, in points."""

from collections.abc import Sequence
from dataclasses import astuple

from scipy.special import ndtri

from cera_train.evaluation.statistics import ERROR_RATE
from cera_train.report.comparison import PairedTest
from cera_train.report.forest import Forest, Group, Row

POWER = 0.8  # the probability with which a difference counts as detected

CAPTION = (
    "The first-named run minus the second, in points (dotted: 1); the axis is linear near zero and "
    "logarithmic far from it. Line: 95 % interval for other problems. Grey: differences that these "
    "problems would miss in more than one of five repeats."
)


def forest_of(tests: Sequence[PairedTest]) -> Forest | None:
    """The tests by task; None without any."""
    by_task: dict[str, list[PairedTest]] = {}
    for test in tests:
        by_task.setdefault(test.task, []).append(test)
    groups = []
    for task, same in by_task.items():
        rows = [row_of(test, len(same)) for test in same]
        problems = " or ".join(dict.fromkeys(f"{test.problems:,}" for test in same))
        graders = " or ".join(dict.fromkeys(test.grader for test in same))
        groups.append(Group(task, f"{graders}, {problems} problems", rows))
    return Forest("verdicts", "Which run is better?", CAPTION, groups) if groups else None


def row_of(test: PairedTest, tests: int) -> Row:
    """
    Args:
        tests: their number in the task, over which Holm's method corrects.
    """
    difference, lower, upper = (100 * value for value in astuple(test.difference))
    least = detectable(lower, upper, tests)
    words = test.verdict
    if words == "not shown":
        words += f" (detects {least:.1f})"
    numbers = f"{difference:+.1f} ({lower:+.1f} to {upper:+.1f})"
    # The better side of the plot is below zero.
    return Row(
        f"{test.second} - {test.first}",
        numbers,
        words,
        test.verdict,
        -difference,
        -upper,
        -lower,
        least,
        repeats=(),
    )


def detectable(lower: float, upper: float, tests: int) -> float:
    """The true difference that gets its verdict with probability POWER in Holm's first step, by the
    normal approximation, from a 95 % interval."""
    standard_error = (upper - lower) / 2 / ndtri(1 - ERROR_RATE / 2)
    return float(ndtri(1 - ERROR_RATE / tests / 2) + ndtri(POWER)) * standard_error
