"""Whether runs differ: paired tests on the same problems; and what stands in the way of a
comparison."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy
from numpy import ndarray

from cera_train.common.errors import UserError
from cera_train.common.settings import Changes, changes_of, differing_settings, require
from cera_train.evaluation.statistics import (
    ERROR_RATE,
    Difference,
    detectable_difference,
    holm,
    paired_bootstrap,
    sign_flip,
)
from cera_train.evaluation.verdict import contrast, detectable
from cera_train.report.runs import Run, Scores, group_by
from cera_train.settings.evaluation import EvalConfig

MOST_RUNS_IN_ALL_PAIRS = 6

VERDICTS = ("better", "worse", "not shown")

ENGINE = "engines"
NOT_ON_RECORD = "not on record"
SHOWN = 40  # characters of a value in a note


# --- tests ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """The difference of two runs on a task, second - first, and its test."""

    task: str
    grader: str  # exact, verified, or the name of the rule that scored the answers
    first: str
    second: str
    problems: int
    difference: Difference
    p_value: float  # in a report after Holm's correction over the pairs of a task; decides at 5 %
    detectable: float
    """The smallest true difference that gets its verdict with probability 80 %, in Holm's first
    step; infinite where none does."""
    seeds: int = 1
    only: tuple[int, int] | None = None
    """Problems that only the first solves, and only the second; None with several answers each."""

    @property
    def verdict(self) -> str:
        """On the second run."""
        if self.p_value > ERROR_RATE:
            return "not shown"
        return "better" if self.difference.difference > 0 else "worse"

    @property
    def label(self) -> str:
        return f"{self.second} - {self.first}"

    @property
    def words(self) -> str:
        """The verdict, with what could have been detected where nothing was."""
        if self.verdict == "not shown" and self.detectable <= 1:
            return f"not shown (detects {100 * self.detectable:.1f})"
        return self.verdict

    @property
    def points(self) -> list[str]:
        """The difference and the ends of its interval."""
        return [f"{100 * value:+.1f}" for value in astuple(self.difference)]

    @property
    def row(self) -> dict[str, str]:
        """The row of the report's table."""
        points, lower, upper = self.points
        problems = f"{self.problems:,}"
        if self.seeds > 1:
            problems += f", {self.seeds} seeds"
        only = ""
        if self.only is not None:
            only = f"{self.only[0]:,} and {self.only[1]:,}"
        return {
            "runs": self.label,
            "task": f"{self.task}, {self.grader}",
            "verdict": self.words,
            "difference, points": points,
            "95 % interval": f"{lower} to {upper}",
            "p": f"{self.p_value:.2g}",
            "problems": problems,
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
        comparable = []
        for first, second in pairs:
            try:
                comparable.append(pair_of(first, second, task, across_engines))
            except UserError as error:
                notes.append(f"{task}, {first.name} and {second.name}: {error}")
        of_task = [test_pair(pair, len(comparable)) for pair in comparable]
        adjusted = holm([test.p_value for test in of_task])
        of_task = [
            replace(test, p_value=p_value) for test, p_value in zip(of_task, adjusted, strict=True)
        ]
        if len(graded) > MOST_RUNS_IN_ALL_PAIRS:
            counts = Counter(test.verdict for test in of_task)
            verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
            notes.append(
                f"{task}: each of {len(graded)} runs is tested against the first only, "
                f"{graded[0].name}: {verdicts}."
            )
        tests += of_task
    return tests, notes


def task_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def graded_runs(runs: Sequence[Run], task: str) -> list[Run]:
    """The runs with a finished evaluation of answers on a task."""
    return [run for run in runs if task in run.evaluations and run.evaluations[task].is_graded]


@dataclass(frozen=True)
class RunPair:
    """The scores of two runs on a task, by one rule: [seeds, problems] in one order."""

    names: tuple[str, str, str, str]  # of the task, the rule and the runs
    first: ndarray
    second: ndarray


def pair_of(first: Run, second: Run, task: str, across_engines: bool) -> RunPair:
    """The scores by the best rule that graded both runs.

    Raises:
        UserError: they answered by different engines, prompts, shots or problems, or no rule graded
            both.
    """
    evaluations = (first.evaluations[task], second.evaluations[task])
    for name in {**evaluations[0].same, **evaluations[1].same}:
        values = [each.same.get(name, NOT_ON_RECORD) for each in evaluations]
        if values[0] == values[1] or (name == ENGINE and across_engines):
            continue
        words = " and ".join(value[:SHOWN] for value in values)
        fix = "evaluate both alike"
        if name == ENGINE:
            fix = "evaluate both by one engine, or add --across-engines"
        raise UserError(f"{name} differ: {words}: {fix}.")
    ways = {each.is_chat for each in evaluations}
    require(
        None in ways or len(ways) == 1,
        "one was asked in chat markup, the other in plain text: ask the untouched model as its run "
        "is asked, by cera-eval run=base like=RUN.",
    )
    first_scores, second_scores = (evaluation.scores for evaluation in evaluations)
    graders = [name for name in first_scores if name in second_scores]
    require(
        bool(graders),
        f"the rules that graded them differ: {', '.join(first_scores)} and "
        f"{', '.join(second_scores)}: grade both alike.",
    )
    grader = graders[0]
    before = first_scores[grader]
    after = second_scores[grader]
    _check_problems(before, after)
    names = (task, grader, first.name, second.name)
    return RunPair(names, before.values, after.in_order_of(before.problems))


def _check_problems(first: Scores, second: Scores) -> None:
    """Raises UserError for scores of different problems or seeds."""
    problems = {*first.problems}
    others = {*second.problems}
    require(
        problems == others and bool(problems),
        f"evaluated on different problems ({len(problems):,} and {len(others):,}, "
        f"{len(problems & others):,} of them shared), so a paired test would mean nothing: "
        "evaluate both with the same task settings.",
    )
    require(
        first.seeds == second.seeds,
        f"seeds differ: {', '.join(first.seeds)} and {', '.join(second.seeds)}: evaluate both "
        "with the same.",
    )


def test_pair(pair: RunPair, tests: int) -> PairedTest:
    """The test over problems, or over seeds and problems.

    Args:
        tests: the number of tests of the task.
    """
    is_of_seeds = len(pair.first) > 1
    return _compare_over_seeds(pair, tests) if is_of_seeds else _compare_problems(pair, tests)


def _compare_over_seeds(pair: RunPair, tests: int) -> PairedTest:
    """A difference that holds for other seeds and problems."""
    seeds, problems = pair.first.shape
    found = contrast(pair.first, pair.second)
    difference = Difference(found.difference, found.lower, found.upper)
    least = detectable(found.variances, seeds, problems, tests)
    return PairedTest(*pair.names, problems, difference, found.p_value, least, seeds)


def _compare_problems(pair: RunPair, tests: int) -> PairedTest:
    """A difference of these two runs that holds for other problems."""
    [first] = pair.first
    [second] = pair.second
    differences = second - first
    problems = len(differences)
    error = float(differences.std()) / math.sqrt(problems)
    only = None
    if {*numpy.unique([first, second])} <= {0.0, 1.0}:
        only = (int((differences < 0).sum()), int((differences > 0).sum()))
    return PairedTest(
        *pair.names,
        problems,
        paired_bootstrap(first, second),
        sign_flip(first, second),
        detectable_difference(error, problems, tests),
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
    notes += itertools.chain.from_iterable(run.notes for run in runs)
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
            if evaluation is None or not evaluation.is_finished:
                notes.append(f"{run.name} has no finished evaluation on {task}.")
    if not tasks:
        notes.append("No run has an evaluation: cera-eval run=DIR task=TASK adds accuracies.")
    return notes
