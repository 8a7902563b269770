"""Whether runs differ: paired tests on the same problems; and what stands in the way of a
comparison."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import Changes, changes_of, differing_settings
from cera_train.evaluation.statistics import (
    ERROR_RATE,
    Difference,
    holm,
    paired_bootstrap,
    sign_flip,
)
from cera_train.report.runs import Run, group_by
from cera_train.settings.evaluation import EvalConfig

MOST_RUNS_IN_ALL_PAIRS = 6


# --- paired tests ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same problems of a task. Differences are second - first."""

    task: str
    grader: str  # exact, verified, or the name of the task's score
    first: str
    second: str
    problems: int
    difference: Difference
    p_value: float  # in a report after Holm's correction over the pairs of a task; decides at 5 %
    only: tuple[int, int] | None
    """Problems that only the first solves, and only the second; None with several answers each."""

    @property
    def verdict(self) -> str:
        """On the second run."""
        if self.p_value > ERROR_RATE:
            return "not shown"
        return "better" if self.difference.difference > 0 else "worse"

    @property
    def row(self) -> dict[str, str]:
        """The row of the report's table; differences are in points."""
        points, lower, upper = (f"{100 * value:+.1f}" for value in astuple(self.difference))
        only = ""
        if self.only is not None:
            only = f"{self.only[0]:,} and {self.only[1]:,}"
        return {
            "runs": f"{self.second} - {self.first}",
            "task": f"{self.task}, {self.grader}",
            "verdict": self.verdict,
            "difference, points": points,
            "95 % interval": f"{lower} to {upper}",
            "p": f"{self.p_value:.2g}",
            "problems": f"{self.problems:,}",
            "only the first / second solves": only,
        }


def paired_tests(
    runs: Sequence[Run], across_engines: bool = False
) -> tuple[list[PairedTest], list[str]]:
    """A test of every pair of runs on every task that both have, or of each of more than 6 runs
    against the first; and notes, such as why a test was not made.

    Args:
        across_engines: also tests runs whose answers are of different engines.
    """
    tests: list[PairedTest] = []
    notes = []
    for task in task_names(runs):
        graded = graded_runs(runs, task)
        pairs = list(itertools.combinations(graded, 2))
        if len(graded) > MOST_RUNS_IN_ALL_PAIRS:
            pairs = [(graded[0], run) for run in graded[1:]]
            notes.append(
                f"{task}: each of {len(graded)} runs is tested against the first only, "
                f"{graded[0].name}."
            )
        of_task = []
        for first, second in pairs:
            try:
                of_task.append(paired_test(first, second, task, across_engines))
            except UserError as error:
                notes.append(f"{task}, {first.name} and {second.name}: {error}")
        adjusted = holm([test.p_value for test in of_task])
        for test, p_value in zip(of_task, adjusted, strict=True):
            tests.append(replace(test, p_value=p_value))
    return tests, notes


def task_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def graded_runs(runs: Sequence[Run], task: str) -> list[Run]:
    """The runs with a finished evaluation of answers on a task."""
    return [run for run in runs if task in run.evaluations and run.evaluations[task].is_graded]


def paired_test(first: Run, second: Run, task: str, across_engines: bool) -> PairedTest:
    """Tests two runs by the task's score where it has one, else by math-verify's verdicts where
    both runs have them, else by the exact rule.

    Raises:
        UserError: they answered by different engines or different problems, or lack grades.
    """
    evaluations = (first.evaluations[task], second.evaluations[task])
    engines = {evaluation.settings.get("engine") or "this program" for evaluation in evaluations}
    if len(engines) > 1 and not across_engines:
        fix = "evaluate both by one engine, or add --across-engines"
        raise UserError(f"by {' and '.join(sorted(engines))}: {fix}.")
    first_grades, second_grades = (evaluation.grades for evaluation in evaluations)
    if first_grades.keys() != second_grades.keys() or not first_grades:
        shared = len(first_grades.keys() & second_grades.keys())
        raise UserError(
            f"evaluated on different problems ({len(first_grades):,} and {len(second_grades):,}, "
            f"{shared:,} of them shared), so a paired test would mean nothing: evaluate both with "
            "the same task settings."
        )
    kind = evaluations[0].task
    answers = [*first_grades.values(), *second_grades.values()]
    if kind.score_name:
        grader = kind.score_name
    elif all(grade.verified is not None for grades in answers for grade in grades):
        grader = "verified"
    else:
        grader = "exact"

    # the two may have the problems in another order
    first_scores, second_scores = (
        [fmean(kind.paired_value(grade, grader) for grade in grades[name]) for name in first_grades]
        for grades in (first_grades, second_grades)
    )
    only = None
    if all(len(grades) == 1 for grades in answers) and not kind.score_name:
        pairs = list(zip(first_scores, second_scores, strict=True))
        only = (sum(a > b for a, b in pairs), sum(b > a for a, b in pairs))
    return PairedTest(
        task,
        grader,
        first.name,
        second.name,
        problems=len(first_grades),
        difference=paired_bootstrap(first_scores, second_scores),
        p_value=sign_flip(first_scores, second_scores),
        only=only,
    )


# --- what to know before comparing ----------------------------------------------------------------


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes figures of these runs not comparable, or less than they seem."""
    trained = [run for run in runs if run.figures.perplexity is not None]
    measured = [run for run in trained if run.environment.machine]
    notes = [
        _difference(
            "Perplexities and spectra are on different held-out rows or tokens, so do not rank "
            "them, by digest",
            group_by(trained, lambda run: run.environment.held_out),
        ),
        _difference("The runs are on different base models", group_by(runs, lambda run: run.base)),
        _difference(
            "Speed, time and peak memory are of different machines",
            group_by(measured, lambda run: run.environment.machine),
        ),
    ]
    for task in task_names(runs):
        settings = {
            run.name: run.evaluations[task].settings for run in runs if task in run.evaluations
        }
        for key, words in differing_settings(settings, EvalConfig).items():
            is_compared = key.startswith(("adapter_digest", "model."))  # models and adapters are
            if not is_compared and changes_of(EvalConfig, key) != Changes.cost:
                values = "; ".join(f"{name}: {word}" for name, word in words.items())
                notes.append(f"Evaluations on {task} differ in {key}: {values}.")
    return [note for note in notes if note]


def _difference(text: str, groups: dict[Any, list[Run]]) -> str:
    """A note on runs that differ: the text, and the names of the runs by value; empty where all
    have one value."""
    if len(groups) < 2:
        return ""
    values = [f"{', '.join(run.name for run in runs)}: {value}" for value, runs in groups.items()]
    return f"{text}: {'; '.join(values)}."


def missing_pieces(runs: Sequence[Run]) -> list[str]:
    """What is missing: updates of a run, or an evaluation that another run has."""
    notes = []
    tasks = task_names(runs)
    for run in runs:
        if run.is_unfinished and run.has_diverged:
            notes.append(f"{run.name} diverged after update {run.metrics.last_update:,}.")
        elif run.is_unfinished:
            notes.append(f"{run.name} is unfinished (update {run.metrics.last_update:,}).")
        for task in tasks:
            evaluation = run.evaluations.get(task)
            if evaluation is None or evaluation.result is None:
                notes.append(f"{run.name} has no finished evaluation on {task}.")
    if not tasks:
        notes.append("No run has an evaluation: cera-eval run=DIR task=TASK adds accuracies.")
    return notes
