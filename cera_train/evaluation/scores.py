"""Answers -> grades -> scores with their intervals.

Two graders, both reported: `exact` is the task's published rule; `verified` is mathematical equality by math-verify, or
exact. An answer that a grader cannot read is wrong and counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cera_train.evaluation.statistics import accuracy_interval, pass_at_k
from cera_train.tasks.records import Generation, Grade, Problem
from cera_train.tasks.task import AnswerTask


def verify(
    problems: Mapping[str, Problem], answers: Sequence[Generation], grades: Sequence[Grade], seconds: float
) -> list[Grade]:
    """Fills in `verified`: true for an exact answer, else what math-verify finds.

    math-verify reads the extracted answer, or the whole text where nothing was extracted, within `seconds` each.
    """
    from cera_train.evaluation.grading import Candidate, Verifier

    open_indices = [index for index, grade in enumerate(grades) if not grade.exact]
    candidates = [
        Candidate(problems[grades[index].problem].gold, grades[index].answer, answers[index].text)
        for index in open_indices
    ]
    workers = min(len(os.sched_getaffinity(0)), len(candidates) or 1)
    with Verifier(time_limit=seconds, workers=workers) as verifier:
        verdicts = dict(zip(open_indices, verifier.verify(candidates), strict=True))
    return [
        replace(grade, verified=True)
        if grade.exact
        else replace(grade, verified=verdicts[index].correct, failure=grade.failure or verdicts[index].failure)
        for index, grade in enumerate(grades)
    ]


def score(
    task: AnswerTask, problems: Sequence[Problem], answers: Sequence[Generation], grades: Sequence[Grade]
) -> dict[str, Any]:
    """The scores of an evaluation by the keys of result.json, each accuracy with its 95 % interval."""
    counted = {problem.id for problem in problems if task.counts(problem)}
    counted_grades = [grade for grade in grades if grade.problem in counted]
    counted_answers = [answer for answer in answers if answer.problem in counted]
    scores = _accuracies(counted_grades, "exact")
    if task.is_verified:
        scores |= _accuracies(counted_grades, "verified")
    return (
        scores
        | task.scores(problems, grades)
        | {
            "truncated": sum(answer.truncated for answer in counted_answers),
            "no_answer": sum(grade.answer is None for grade in counted_grades),
            "grader_failures": sum(grade.failure is not None for grade in counted_grades),
            "tokens": sum(answer.tokens for answer in counted_answers),
        }
    )


def _accuracies(grades: Sequence[Grade], grader: str) -> dict[str, Any]:
    """pass@k for every k up to the number of samples."""
    correct: dict[str, list[bool]] = {}
    for grade in grades:
        correct.setdefault(grade.problem, []).append(getattr(grade, grader))
    scores = {}
    for k in range(1, min(map(len, correct.values()), default=0) + 1):
        values = [pass_at_k(len(samples), sum(samples), k) for samples in correct.values()]
        scores[f"{grader}/pass@{k}"] = sum(values) / len(values)
        scores[f"{grader}/pass@{k}/interval"] = list(accuracy_interval(values))
    return scores
