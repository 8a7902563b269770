"""Whether runs differ: paired tests on the same problems; and what stands in the way of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import Changes, changes_of
from cera_train.evaluation.statistics import ERROR_RATE, Difference, McNemar, holm, mcnemar, paired_bootstrap, sign_flip
from cera_train.evaluation.tasks.task import display_name
from cera_train.report.runs import Evaluation, Run, Settings
from cera_train.runs.results import PerplexityResult
from cera_train.settings.data import evaluation_rows
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.run import Config

MOST_RUNS_IN_ALL_PAIRS = 6


# --- paired tests ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same problems of a task. Differences are second - first."""

    task: str
    grader: str
    """exact, verified, or the name of the task's score."""
    first: str
    second: str
    means: tuple[float, float]
    problems: int
    difference: Difference
    p_value: float
    """After Holm's correction over the pairs of a task, in a report: decides at 5 %."""
    mcnemar: McNemar | None
    """Decides where each run has one answer to a problem, right or wrong. None: a sign-flip permutation test does."""
    other_settings: tuple[str, ...] = ()
    """Settings of the evaluation in which the two differ."""

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
        counts = self.mcnemar and f"{self.mcnemar.only_first:,} and {self.mcnemar.only_second:,}"
        return {
            "runs": f"{self.second} - {self.first}",
            "task": f"{display_name(self.task)}, {self.grader}",
            "verdict": self.verdict,
            "difference, points": points,
            "95 % interval": f"{lower} to {upper}",
            "p": f"{self.p_value:.2g}",
            "problems": f"{self.problems:,}",
            "only the first / second solves": counts or "",
        }


def paired_tests(runs: Sequence[Run]) -> tuple[list[PairedTest], list[str]]:
    """A test of every pair of runs on every task that both have, or of each of more than 6 runs against the first; and
    notes, such as why a test was not made."""
    tests, notes = [], []
    for task in task_names(runs):
        name, ready = display_name(task), graded(runs, task)
        pairs = list(itertools.combinations(ready, 2))
        if len(ready) > MOST_RUNS_IN_ALL_PAIRS:
            pairs = pairs[: len(ready) - 1]
            notes.append(f"{name}: each of {len(ready)} runs is tested against the first only, {ready[0].name}.")
        comparisons = []
        for first, second in pairs:
            try:
                comparisons.append(compare(first, second, task))
            except UserError as error:
                notes.append(f"{name}, {first.name} and {second.name}: {error}")
        adjusted = holm([test.p_value for test in comparisons])
        tests += [replace(test, p_value=p_value) for test, p_value in zip(comparisons, adjusted, strict=True)]
    return tests, notes


def task_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def graded(runs: Sequence[Run], task: str) -> list[Run]:
    """The runs with a finished evaluation of answers on a task."""
    return [run for run in runs if task in run.evaluations and run.evaluations[task].is_graded]


def compare(first: Run, second: Run, task: str) -> PairedTest:
    """The paired test of two runs, by the task's score where it has one, else by math-verify's verdicts where both runs
    have them, else by the exact rule. UserError: they answered different problems, or lack grades."""
    evaluations = first.evaluations[task], second.evaluations[task]
    a, b = (evaluation.answers for evaluation in evaluations)
    if (names := a.grades.keys()) != (others := b.grades.keys()):
        raise UserError(
            f"evaluated on different problems ({len(names):,} and {len(others):,}, {len(names & others):,} of them "
            "shared), so a paired test would mean nothing: evaluate both with the same task settings."
        )
    score = evaluations[0].task.score_name
    grader = score or ("verified" if a.is_verified and b.is_verified else "exact")
    one, other = (scores_by_problem(evaluation, grader) for evaluation in evaluations)
    scores = [list(one.values()), [other[name] for name in one]]  # the two may have the problems in another order
    problems, test = len(one), None
    if a.samples == b.samples == 1 and not score:
        test = mcnemar(*([score == 1 for score in values] for values in scores))
    return PairedTest(
        *(task, grader, first.name, second.name),
        means=(sum(scores[0]) / problems, sum(scores[1]) / problems),
        problems=problems,
        difference=paired_bootstrap(*scores),
        p_value=test.p_value if test else sign_flip(*scores),
        mcnemar=test,
        other_settings=differing_in_evaluation(*(evaluation.settings for evaluation in evaluations)),
    )


def scores_by_problem(evaluation: Evaluation, grader: str) -> dict[str, float]:
    """The share of each problem that is right: of its answers, or by the task's score."""
    return evaluation.answers.scores(lambda grade: evaluation.task.paired_value(grade, grader))


# --- settings that differ --------------------------------------------------------------------------------------------


def differing_keys(settings: Sequence[Settings]) -> list[str]:
    keys = dict.fromkeys(itertools.chain.from_iterable(settings))
    return [key for key in keys if any(other.get(key) != settings[0].get(key) for other in settings)]


def differing_settings(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """The settings in which training runs differ: key -> a text for each run."""
    keys = [key for key in differing_keys(settings) if changes_of(Config, key) != Changes.nothing]
    # A setting that means nothing to a method stays auto.
    keys = [key for key in keys if len({repr(each.get(key)) for each in settings} - {"'auto'"}) > 1]
    return {key: [shown(each.get(key)) for each in settings] for key in keys}


def differing_in_evaluation(first: Settings, second: Settings) -> tuple[str, ...]:
    """The settings in which two evaluations of a task differ, beside what is compared: their models and adapters."""
    compared = ("adapter_digest", "task.name", "model.")
    return tuple(
        f"{key} {shown(first.get(key))} and {shown(second.get(key))}"
        for key in sorted(differing_keys([first, second]))
        if not key.startswith(compared) and changes_of(EvalConfig, key) not in (Changes.cost, Changes.nothing)
    )


def shown(value: Any) -> str:
    """A setting as one writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- what to know before comparing -----------------------------------------------------------------------------------


def cautions(runs: Sequence[Run], tests: Sequence[PairedTest]) -> list[str]:
    """What makes figures of these runs not comparable, or less than they seem."""
    notes: list[str] = []

    def check(text: str, key: Callable[[Run], Any], runs: Sequence[Run], with_keys: bool = False) -> None:
        """Adds the text where the runs fall into several groups by a key."""
        groups = {key: ", ".join(run.name for run in same) for key, same in group_by(runs, key).items()}
        if len(groups) > 1:
            texts = "; ".join(f"{names}: {key}" for key, names in groups.items())
            notes.append(f"{text}: {texts if with_keys else ' | '.join(groups.values())}.")

    trained = [run for run in runs if run.figures.perplexity is not None]
    keys = ", ".join(differing_keys([dict(run.evaluation_rows) for run in trained]))
    check(f"Perplexities and spectra are on different evaluation rows or tokens ({keys}), and cannot be ranked",
          lambda run: run.evaluation_rows, trained)  # fmt: skip
    check("The runs are on different base models", lambda run: run.base, trained, True)
    check("Speed, time and peak memory are of different machines", lambda run: run.files.environment.machine,
          [run for run in trained if run.files.environment.machine], True)  # fmt: skip
    check("Spectra are taken on probes of different size", lambda run: run.settings.get("train.probe_tokens"), trained)
    for task in task_names(runs):
        name, evaluations = display_name(task), {run.name: run.evaluations.get(task) for run in runs}
        check(f"Accuracies on {name} are of different problems",
              lambda run, by_name=evaluations: _problem_ids(by_name[run.name]), graded(runs, task))  # fmt: skip
        measured = [
            run for run in runs if (each := evaluations[run.name]) and isinstance(each.result, PerplexityResult)
        ]
        check(f"The perplexities of task {name} are on different rows or base models, and cannot be ranked",
              lambda run, by_name=evaluations: _perplexity_rows(run, by_name[run.name]), measured)  # fmt: skip
    for task, settings in dict.fromkeys((test.task, test.other_settings) for test in tests if test.other_settings):
        notes.append(f"Evaluations on {display_name(task)} differ in their settings: {'; '.join(settings)}.")
    return notes


def _problem_ids(evaluation: Evaluation) -> frozenset[str]:
    try:
        return frozenset(evaluation.answers.problems)
    except UserError:  # the paired tests name what is wrong with the file
        return frozenset()


def _perplexity_rows(run: Run, evaluation: Evaluation) -> tuple:
    """Equal for evaluations of perplexity on the same tokens."""
    settings = {key: value for key, value in evaluation.settings.items() if key.startswith(("task.", "data"))}
    is_own_data = evaluation.known.task_kind != "text" and not any(key.startswith("data.") for key in settings)
    return run.base, evaluation_rows(settings), run.evaluation_rows if is_own_data else ()


def missing_pieces(runs: Sequence[Run]) -> list[str]:
    """What is not there, by name."""
    lines, tasks = [], task_names(runs)
    for run in runs:
        perplexity, name = run.figures.perplexity, run.name
        if run.is_unfinished:
            lines.append(f"{name} is unfinished (update {run.files.metrics.last_update:,}).")
        if perplexity is not None and not math.isfinite(perplexity):
            lines.append(f"{name} has diverged (perplexity {perplexity}).")
        unreadable = {path.parent.name for path in run.folder.glob("eval/*/result.json")} - run.evaluations.keys()
        lines += [f"{name} has no config.yaml in eval/{task}, which is left out." for task in sorted(unreadable)]
        for task in tasks:
            evaluation = run.evaluations.get(task)
            if evaluation is None or evaluation.result is None:
                lines.append(f"{name} has no finished evaluation on {display_name(task)}.")
            elif evaluation.is_graded and evaluation.result.missing:
                lines.append(f"{name} lacks {evaluation.result.missing:,} answers on {display_name(task)}.")
    if not tasks:
        lines.append("No run has an evaluation: cera-eval run=DIR task=TASK adds accuracies.")
    return lines


def comparable(run: Run) -> tuple:
    """Equal for runs whose perplexities can be ranked."""
    return run.evaluation_rows, run.base


def group_by(runs: Sequence[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups
