"""Whether runs differ: paired tests on the same problems; and what stands in the way of a
comparison."""

import itertools
from collections.abc import Callable, Sequence
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
    p_value: float  # after Holm's correction over the pairs of a task, in a report: decides at 5 %
    only: (
        tuple[int, int] | None
    )  # problems that the first alone solves, and the second; of one answer to each

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
        return {
            "runs": f"{self.second} - {self.first}",
            "task": f"{self.task}, {self.grader}",
            "verdict": self.verdict,
            "difference, points": points,
            "95 % interval": f"{lower} to {upper}",
            "p": f"{self.p_value:.2g}",
            "problems": f"{self.problems:,}",
            "only the first / second solves": "{:,} and {:,}".format(*self.only)
            if self.only
            else "",
        }


def paired_tests(
    runs: Sequence[Run], across_engines: bool = False
) -> tuple[list[PairedTest], list[str]]:
    """A test of every pair of runs on every task that both have, or of each of more than 6 runs
    against the first; and notes, such as why a test was not made.

    Args:
        across_engines: also of runs whose answers are of different engines.
    """
    tests = []
    notes = []
    for task in task_names(runs):
        ready = graded(runs, task)
        pairs = list(itertools.combinations(ready, 2))
        if len(ready) > MOST_RUNS_IN_ALL_PAIRS:
            pairs = pairs[: len(ready) - 1]
            notes.append(
                f"{task}: each of {len(ready)} runs is tested against the first only, "
                f"{ready[0].name}."
            )
        comparisons = []
        for first, second in pairs:
            try:
                comparisons.append(compare(first, second, task, across_engines))
            except UserError as error:
                notes.append(f"{task}, {first.name} and {second.name}: {error}")
        adjusted = holm([test.p_value for test in comparisons])
        tests += [
            replace(test, p_value=p_value)
            for test, p_value in zip(comparisons, adjusted, strict=True)
        ]
    return tests, notes


def task_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def graded(runs: Sequence[Run], task: str) -> list[Run]:
    """The runs with a finished evaluation of answers on a task."""
    return [run for run in runs if task in run.evaluations and run.evaluations[task].is_graded]


def compare(first: Run, second: Run, task: str, across_engines: bool) -> PairedTest:
    """The paired test of two runs, by the task's score where it has one, else by math-verify's
    verdicts where both runs have them, else by the exact rule. UserError: they answered by
    different engines or different problems, or lack grades."""
    evaluations = first.evaluations[task], second.evaluations[task]
    engines = {evaluation.settings.get("engine") or "this program" for evaluation in evaluations}
    if len(engines) > 1 and not across_engines:
        fix = "evaluate both by one engine, or add --across-engines"
        raise UserError(f"by {' and '.join(sorted(engines))}: {fix}.")
    a, b = (evaluation.grades for evaluation in evaluations)
    names = a.keys()
    others = b.keys()
    if names != others or not names:
        raise UserError(
            f"evaluated on different problems ({len(names):,} and {len(others):,}, "
            f"{len(names & others):,} of them "
            "shared), so a paired test would mean nothing: evaluate both with the same task "
            "settings."
        )
    score = evaluations[0].task.score_name
    answers = [*a.values(), *b.values()]
    is_verified = all(grade.verified is not None for grades in answers for grade in grades)
    grader = score or ("verified" if is_verified else "exact")
    paired_value = evaluations[0].task.paired_value
    # the two may have the problems in another order
    scores = [
        [fmean(paired_value(grade, grader) for grade in grades[name]) for name in a]
        for grades in (a, b)
    ]
    only = None
    if all(len(grades) == 1 for grades in answers) and not score:
        only = tuple(
            sum(a > b for a, b in zip(*pair, strict=True)) for pair in (scores, scores[::-1])
        )
    return PairedTest(
        *(task, grader, first.name, second.name),
        problems=len(a),
        difference=paired_bootstrap(*scores),
        p_value=sign_flip(*scores),
        only=only,
    )


# --- what to know before comparing ----------------------------------------------------------------


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes figures of these runs not comparable, or less than they seem."""
    notes: list[str] = []

    def check(text: str, key: Callable[[Run], Any], runs: Sequence[Run]) -> None:
        """Adds the text where the runs differ in a key."""
        groups = group_by(runs, key)
        if len(groups) > 1:
            names = (
                f"{', '.join(run.name for run in same)}: {value}" for value, same in groups.items()
            )
            notes.append(f"{text}: {'; '.join(names)}.")

    trained = [run for run in runs if run.figures.perplexity is not None]
    text = (
        "Perplexities and spectra are on different evaluation rows or tokens, so do not rank "
        "them, by digest"
    )
    check(text, lambda run: run.environment.held_out, trained)
    check("The runs are on different base models", lambda run: run.base, runs)
    measured = [run for run in trained if run.environment.machine]
    check(
        "Speed, time and peak memory are of different machines",
        lambda run: run.environment.machine,
        measured,
    )
    for task in task_names(runs):
        settings = {
            run.name: run.evaluations[task].settings for run in runs if task in run.evaluations
        }
        for key, words in differing_settings(settings, EvalConfig).items():
            # Models and adapters are what is compared.
            if (
                not key.startswith(("adapter_digest", "model."))
                and changes_of(EvalConfig, key) != Changes.cost
            ):
                texts = "; ".join(f"{name}: {word}" for name, word in words.items())
                notes.append(f"Evaluations on {task} differ in {key}: {texts}.")
    return notes


def missing_pieces(runs: Sequence[Run]) -> list[str]:
    """What is not there, by name."""
    lines = []
    tasks = task_names(runs)
    for run in runs:
        if run.is_unfinished:
            state = (
                "diverged after update {:,}."
                if run.has_diverged
                else "is unfinished (update {:,})."
            )
            lines.append(f"{run.name} {state.format(run.metrics.last_update)}")
        for task in tasks:
            evaluation = run.evaluations.get(task)
            if evaluation is None or evaluation.result is None:
                lines.append(f"{run.name} has no finished evaluation on {task}.")
    if not tasks:
        lines.append("No run has an evaluation: cera-eval run=DIR task=TASK adds accuracies.")
    return lines
