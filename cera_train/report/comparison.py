"""Whether runs differ: paired tests on the same problems; and what stands in the way of a
comparison."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import AUTO, Changes, changes_of, require, word_of
from cera_train.report.runs import Run, Settings, group_by
from cera_train.settings.evaluation import EvalConfig
from cera_train.verdicts.contrast import contrast_of_runs
from cera_train.verdicts.power import detectable_between_runs
from cera_train.verdicts.verdict import JudgedContrast, holm

MOST_RUNS_IN_ALL_PAIRS = 6

SHOWN = 40  # characters of a value in a note


# --- tests ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairedTest(JudgedContrast):
    """The difference of two runs on a task after Holm's correction over the pairs of the task. Its
    detectable difference is that of Holm's first step."""

    task: str
    grader: str  # exact, verified, or the name of the rule that scored the answers
    only: tuple[int, int] | None
    """Problems that only the first solves, and only the second; None with several answers each."""

    def judged(self, p_holm: float, tests: int) -> PairedTest:
        """This test as one of so many."""
        return replace(
            self,
            p_holm=p_holm,
            verdict=self.verdict_at(p_holm, higher_is_better=True),
            detectable=detectable_between_runs(self.variances.problem, self.problems, tests),
        )

    @property
    def label(self) -> str:
        return f"{self.second} - {self.first}"

    @property
    def row(self) -> dict[str, str]:
        """The row of the report's table."""
        only = ""
        if self.only is not None:
            only = f"{self.only[0]:,} and {self.only[1]:,}"
        return {
            "runs": self.label,
            "task": f"{self.task}, {self.grader}",
            "verdict": self.words,
            "difference, points": self.difference_text,
            "95 % interval": self.interval_text,
            "p": f"{self.p_holm:.2g}",
            "problems": f"{self.problems:,}",
            "only the first / second solves": only,
        }


def paired_tests(runs: Sequence[Run]) -> tuple[list[PairedTest], list[str]]:
    """A test of every pair of runs on every task that both have, or of each of more than 6 runs
    against the first; and notes, such as why a test was not made."""
    tests: list[PairedTest] = []
    notes = []
    for task in task_names(runs):
        evaluated = [run for run in runs if task in run.evaluations]
        graded = [run for run in evaluated if run.evaluations[task].scores]
        pairs = list(itertools.combinations(graded, 2))
        if len(graded) > MOST_RUNS_IN_ALL_PAIRS:
            pairs = pairs[: len(graded) - 1]
            notes.append(
                f"{task}: each of {len(graded)} runs is tested against the first only, "
                f"{graded[0].name}."
            )
        of_task = []
        for first, second in pairs:
            try:
                of_task.append(compare_pair(first, second, task))
            except UserError as error:
                notes.append(f"{task}, {first.name} and {second.name}: {error}")
        adjusted = holm([test.p_value for test in of_task])
        tests += [
            test.judged(p_holm, len(of_task))
            for test, p_holm in zip(of_task, adjusted, strict=True)
        ]
    return tests, notes


def task_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def compare_pair(first: Run, second: Run, task: str) -> PairedTest:
    """The difference by the best rule that graded both runs, not judged yet.

    Raises:
        UserError: they answered by different engines, prompts, shots or problems, or no rule graded
            both.
    """
    evaluations = (first.evaluations[task], second.evaluations[task])
    for name, value in evaluations[0].same.items():
        other = evaluations[1].same.get(name, value)
        words = f"{value[:SHOWN]} and {other[:SHOWN]}"
        require(value == other, f"{name} differ: {words}: evaluate both alike.")
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
    shared = before.keys() & after.keys()
    require(
        before.keys() == after.keys() and bool(shared),
        f"evaluated on different problems ({len(before):,} and {len(after):,}, {len(shared):,} of "
        "them shared), so a paired test would mean nothing: evaluate both with the same task "
        "settings.",
    )
    pairs = [(score, after[problem]) for problem, score in before.items()]
    contrast = contrast_of_runs(*zip(*pairs, strict=True))
    only = None
    if {*before.values(), *after.values()} <= {0.0, 1.0}:
        counts = Counter(pairs)
        only = (counts[1.0, 0.0], counts[0.0, 1.0])
    return PairedTest(
        **vars(contrast),
        first=first.name,
        second=second.name,
        task=task,
        grader=grader,
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


def differing_settings(configs: Mapping[str, Settings], schema: type) -> dict[str, dict[str, str]]:
    """What differs between flat configs, except what changes nothing measured: key -> name -> value
    in words."""
    different = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(configs.values())):
        words = {name: word_of(config.get(key)) for name, config in configs.items()}
        # A setting that means nothing to a method stays auto.
        if len({*words.values()} - {AUTO}) > 1 and changes_of(schema, key) != Changes.nothing:
            different[key] = words
    return different


def _difference(text: str, groups: dict[Any, list[Run]]) -> str:
    """A note on runs that differ: the text, and the names of the runs by value; empty where all
    have one value."""
    if len(groups) < 2:
        return ""
    values = [f"{', '.join(run.name for run in runs)}: {value}" for value, runs in groups.items()]
    return f"{text}: {'; '.join(values)}."
