"""Answers -> grades -> scores with their intervals.

Two graders, both reported: `exact` is the published rule of the task; `verified` is mathematical equality by
math-verify, or exact. An answer that a grader cannot take is wrong and counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from cera_train.evaluation.statistics import bootstrap_interval, pass_at_k
from cera_train.tasks import logistic_map
from cera_train.tasks.config import TaskKind
from cera_train.tasks.problems import GRADED
from cera_train.tasks.records import Generation, Grade, Problem


def grade_exactly(kind: TaskKind, problem: Problem, generation: Generation) -> Grade:
    """By the task's published rule."""
    place = {"problem": generation.problem, "sample": generation.sample}
    if kind == TaskKind.logistic_map:
        steps = problem.gold.count(",") + 1
        values = logistic_map.extract(generation.text, steps)
        compared = logistic_map.compare(values, problem.gold, problem.details["decimals"])
        answer = ", ".join(f"{value:.{problem.details['decimals']}f}" for value in values) or None
        details = {"values": values, **asdict(compared)}
        return Grade(**place, answer=answer, exact=all(compared.matches), details=details)
    task, answer = GRADED[kind], None
    try:
        answer = task.extract(generation.text)
        exact = answer is not None and task.is_exact(answer, problem.gold)
    except Exception as error:  # whatever a model may write must not end an evaluation of hours
        return Grade(**place, answer=answer, exact=False, failure=f"crash: {type(error).__name__}: {error}")
    return Grade(**place, answer=answer, exact=exact)


def verify(
    problems: Mapping[str, Problem], answers: Sequence[Generation], grades: Sequence[Grade], seconds: float
) -> list[Grade]:
    """The grades with `verified`: what is exact is verified; the rest is math-verify's to decide, each answer within
    `seconds`, on what was found in the text, or on the whole text where nothing was."""
    from cera_train.evaluation.grading import Candidate, Verifier

    asked = [index for index, grade in enumerate(grades) if not grade.exact]
    candidates = [
        Candidate(problems[grades[index].problem].gold, grades[index].answer, answers[index].text) for index in asked
    ]
    workers = min(len(os.sched_getaffinity(0)), len(candidates) or 1)
    with Verifier(time_limit=seconds, workers=workers) as verifier:
        verdicts = dict(zip(asked, verifier.verify(candidates), strict=True))
    return [
        replace(grade, verified=True)
        if grade.exact
        else replace(grade, verified=verdicts[index].correct, failure=grade.failure or verdicts[index].failure)
        for index, grade in enumerate(grades)
    ]


# --- scores ----------------------------------------------------------------------------------------------------------


def score(kind: TaskKind, problems: Sequence[Problem], answers: Sequence[Generation], grades: Sequence[Grade]) -> dict:
    """The scores of an evaluation, flat, with a 95 % bootstrap interval over problems beside each accuracy."""
    counted = {problem.id for problem in problems if counts_in_scores(problem)}
    everything, grades = grades, [grade for grade in grades if grade.problem in counted]
    answers = [answer for answer in answers if answer.problem in counted]
    if kind == TaskKind.logistic_map:
        scores = _accuracies(grades, "exact") | _trajectories(problems, grades) | _paper_case(problems, everything)
    else:
        scores = _accuracies(grades, "exact") | _accuracies(grades, "verified")
    return scores | {
        "truncated": sum(answer.truncated for answer in answers),
        "no_answer": sum(grade.answer is None for grade in grades),
        "grader_failures": sum(grade.failure is not None for grade in grades),
        "tokens": sum(answer.tokens for answer in answers),
    }


def counts_in_scores(problem: Problem) -> bool:
    """The logistic map's case of the paper is shown by itself."""
    return "paper_case" not in problem.details


def _accuracies(grades: Sequence[Grade], grader: str) -> dict[str, Any]:
    """pass@k for every k up to the number of samples."""
    correct: dict[str, list[bool]] = {}
    for grade in grades:
        correct.setdefault(grade.problem, []).append(getattr(grade, grader))
    scores = {}
    for k in range(1, min(map(len, correct.values()), default=0) + 1):
        values = [pass_at_k(len(samples), sum(samples), k) for samples in correct.values()]
        scores[f"{grader}/pass@{k}"] = sum(values) / len(values)
        scores[f"{grader}/pass@{k}/interval"] = list(bootstrap_interval(values))
    return scores


def _trajectories(problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
    """Step by step over all problems, and in sum for each growth."""
    growth = {problem.id: f"{problem.details['growth']:g}" for problem in problems}
    by_growth = {name: [grade for grade in grades if growth[grade.problem] == name] for name in growth.values()}
    scores = _steps(grades)
    summaries = {
        name: {key: value for key, value in _steps(own).items() if not isinstance(value, list)}
        for name, own in by_growth.items()
        if own
    }
    return scores | {"by_growth": summaries}


def _steps(grades: Sequence[Grade]) -> dict[str, Any]:
    accuracy = [_mean(step) for step in zip(*(grade.details["matches"] for grade in grades), strict=True)]
    all_errors = [grade.details["errors"] for grade in grades]
    errors = [[value for value in step if value is not None] for step in zip(*all_errors, strict=True)]
    error = [_mean(step) for step in errors]
    return {
        "step_accuracy": accuracy,
        "step_accuracy/mean": _mean(accuracy),
        "absolute_error": error,
        "absolute_error/mean": _mean([value for value in error if value is not None]),
        "steps_given": _mean([value is not None for errors in all_errors for value in errors]),
        "state_collapse": _mean([grade.details["collapsed"] for grade in grades]),
    }


def _paper_case(problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
    """The paper's case beside the truth, as written."""
    case = next(problem for problem in problems if not counts_in_scores(problem))
    truth = case.gold.split(", ")
    grade = next((grade for grade in grades if grade.problem == case.id), None)
    if grade is None:
        return {}
    answer = [f"{value:.{case.details['decimals']}f}" for value in grade.details["values"]]
    return {
        "paper_case": {
            "truth": truth,
            "answer": answer + [None] * (len(truth) - len(answer)),
            "collapsed": grade.details["collapsed"],
        }
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
