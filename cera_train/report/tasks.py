"""What the report shows of each kind of task, beside the accuracies that every task with answers has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation's result.json that gets a column in the table."""

    key: str
    label: str
    """Stands behind the task's name."""
    is_share: bool = True
    """A share of problems or steps, shown in per cent; else a number with three decimals."""
    in_picture: bool = False
    """Whether the accuracy picture shows it in place of pass@1."""


@dataclass(frozen=True)
class TaskReport:
    """How one kind of task appears in a report."""

    display_names: dict[str, str] = field(default_factory=dict)
    """By the name in conf/task/."""
    shown: tuple[Metric, ...] = ()
    score_name: str = ""
    """What `paired_score` counts, in the plural, such as steps; stands where others have the name of a grader."""
    paired_score: Callable[[Any], float] | None = None
    """From a GradeLine the share of an answer that is right; None: an answer is right or wrong by its grader."""
    counts: Callable[[Any], bool] = lambda problem: True
    """Whether a ProblemLine counts in the accuracies."""


REPORTS = {
    "math": TaskReport({"math": "MATH", "math500": "MATH-500", "math_hard": "MATH level 5"}),
    "gsm8k": TaskReport({"gsm8k": "GSM8K"}),
    "logistic_map": TaskReport(
        {"logistic_map": "logistic map"},
        (Metric("step_accuracy/mean", "steps right", in_picture=True), Metric("state_collapse", "state collapse")),
        "steps",
        paired_score=lambda grade: sum(grade.details["matches"]) / len(grade.details["matches"]),
        counts=lambda problem: not problem.details.get("paper_case"),
    ),
}
"""By kind of task."""


def task_report(kind: str | None) -> TaskReport:
    return REPORTS.get(kind or "", TaskReport())


def display_name(task: str) -> str:
    """The name for people of a task in conf/task/; its own name where it has none."""
    names = (report.display_names for report in REPORTS.values())
    return next((own[task] for own in names if task in own), task)
