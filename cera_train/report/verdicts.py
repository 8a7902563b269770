"""Paired tests of runs as rows of a forest plot, in points."""

from collections.abc import Sequence
from dataclasses import astuple

from cera_train.report.comparison import PairedTest
from cera_train.report.forest import Forest, Group, Row

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
        rows = list(map(test_row, same))
        problems = " or ".join(dict.fromkeys(f"{test.problems:,}" for test in same))
        graders = " or ".join(dict.fromkeys(test.grader for test in same))
        groups.append(Group(task, f"{graders}, {problems} problems", rows))
    return Forest("verdicts", "Which run is better?", CAPTION, groups) if groups else None


def test_row(test: PairedTest) -> Row:
    difference, lower, upper = (100 * value for value in astuple(test.difference))
    least = 100 * test.detectable
    words = test.verdict
    if words == "not shown" and test.detectable <= 1:
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
