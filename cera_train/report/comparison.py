"""Whether runs differ: paired tests on the same problems; and what stands in the way of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import Changes, changes_of
from cera_train.config import Config
from cera_train.evaluation.config import EvalConfig
from cera_train.evaluation.statistics import Difference, McNemar, mcnemar, paired_bootstrap
from cera_train.report.runs import STEPS, Evaluation, Run
from cera_train.report.table import TASK_NAMES, has_column, signed

MOST_RUNS_IN_ALL_PAIRS = 6
LEVEL = 0.05


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same problems of a task. Differences are second - first."""

    task: str
    grader: str
    first: str
    second: str
    means: tuple[float, float]
    problems: int
    difference: Difference
    mcnemar: McNemar | None
    """None where an answer is right in part, or there are several: the test is of one right or wrong answer each."""
    other_settings: tuple[str, ...] = ()
    """Settings of the evaluation in which the two differ."""

    @property
    def is_shown(self) -> bool:
        """Whether a difference is shown at the 5 % level: by McNemar's test, which is exact, where it can be made."""
        return self.mcnemar.p_value < LEVEL if self.mcnemar is not None else self.interval_leaves_out_zero

    @property
    def interval_leaves_out_zero(self) -> bool:
        return self.difference.lower > 0 or self.difference.upper < 0

    @property
    def verdict(self) -> str:
        if not self.is_shown:
            return "no difference shown"
        return f"{self.second if self.difference.difference > 0 else self.first} is better"

    @property
    def evidence(self) -> str:
        """In words: 12 to 9 of 40 problems, p = 0.66; ..."""
        size = self.difference
        points = (
            f"{signed(100 * size.difference, '.1f')} points for {self.second} (95 % interval by paired bootstrap "
            f"{signed(100 * size.lower, '.1f')} to {signed(100 * size.upper, '.1f')})"
        )
        if self.mcnemar is None:
            how = "step by step" if self.grader == STEPS else "several answers each"
            return f"mean over {self.problems:,} problems, {how}: {points}"
        alone = f"{self.mcnemar.only_first:,} to {self.mcnemar.only_second:,} of {self.problems:,} problems"
        if self.interval_leaves_out_zero != self.is_shown:
            points += "; the two tests disagree, and McNemar's, which is exact, decides"
        return f"{alone} that only one of them solves, p {format_p(self.mcnemar.p_value)}; {points}"


def format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}" if value < 0.1 else f"= {value:.2f}"


def paired_tests(runs: Sequence[Run]) -> tuple[list[PairedTest], list[str]]:
    """Every pair of runs on every task that both have; and notes, such as why a test was not made. Of more than 6 runs
    each is tested against the first."""
    tests, notes = [], []
    for task in dict.fromkeys(name for run in runs for name in run.evaluations):
        ready = [run for run in runs if is_graded(run.evaluations.get(task))]
        pairs = list(combinations(ready, 2))
        if len(ready) > MOST_RUNS_IN_ALL_PAIRS:
            pairs = [(ready[0], run) for run in ready[1:]]
            notes.append(
                f"{name_of(task)}: of {len(ready)} runs each is tested against the first, {ready[0].name}, only."
            )
        for first, second in pairs:
            try:
                tests.append(compare(first, second, task))
            except ValueError as error:
                notes.append(f"{name_of(task)}, {first.name} and {second.name}: {error}")
    if len(tests) > 1:
        notes.append(
            f"These are {len(tests)} tests: at the 5 % level about one in twenty shows a difference by chance."
        )
    return tests, notes


def is_graded(evaluation: Evaluation | None) -> bool:
    return evaluation is not None and evaluation.result is not None and not evaluation.is_perplexity


def compare(first: Run, second: Run, task: str) -> PairedTest:
    """McNemar's test and the paired bootstrap, by math-verify's verdicts where both runs have them, else by the exact
    rule; of trajectories the bootstrap alone, by the share of steps that are right.

    Raises:
        ValueError: the runs were evaluated on different problems, or grades are missing.
    """
    a, b = first.evaluations[task], second.evaluations[task]
    check_same_problems(a, b)
    is_stepwise = a.kind == b.kind == "logistic_map"
    grader = STEPS if is_stepwise else "verified" if a.is_verified and b.is_verified else "exact"
    names = list(a.grades)
    shares = [[own.share_right(name, grader) for name in names] for own in (a, b)]
    is_single = a.samples == b.samples == 1 and not is_stepwise
    solved = [[share == 1 for share in own] for own in shares]
    return PairedTest(
        task=task,
        grader=grader,
        first=first.name,
        second=second.name,
        means=(sum(shares[0]) / len(names), sum(shares[1]) / len(names)),
        problems=len(names),
        difference=paired_bootstrap(*shares),
        mcnemar=mcnemar(*solved) if is_single else None,
        other_settings=tuple(_evaluation_settings(a, b)),
    )


def check_same_problems(first: Evaluation, second: Evaluation) -> None:
    """Raises ValueError where the two evaluations are of different problems."""
    a, b = first.problems.keys(), second.problems.keys()
    if a != b:
        raise UserError(
            f"evaluated on different problems ({len(a):,} and {len(b):,}, {len(a & b):,} of them shared), so a paired "
            "test would mean nothing: evaluate both with the same task settings."
        )


def _evaluation_settings(first: Evaluation, second: Evaluation) -> list[str]:
    return [
        f"{key} {show(first.settings.get(key))} and {show(second.settings.get(key))}"
        for key in sorted(first.settings.keys() | second.settings.keys())
        if first.settings.get(key) != second.settings.get(key) and _changes_answers(key)
    ]


def _changes_answers(key: str) -> bool:
    if key in ("adapter_digest", "task.name") or key.startswith("model."):
        return False  # what is compared differs in these
    return changes_of(EvalConfig, key) not in (Changes.cost, Changes.nothing)


# --- what to know before comparing -----------------------------------------------------------------------------------


def cautions(runs: Sequence[Run], tests: Sequence[PairedTest]) -> list[str]:
    """What makes figures of these runs not comparable, or less than they seem."""
    notes = []
    trained = [run for run in runs if run.measured("eval/perplexity") is not None]
    if len(groups := group_by(trained, lambda run: run.evaluation_rows)) > 1:
        keys = _differing([dict(rows) for rows in groups])
        notes.append(
            "Perplexities are on different evaluation rows or tokens, and cannot be ranked against each other; nor are "
            "the spectra taken on the same rows: "
            f"{_in_groups(groups)} ({', '.join(keys)} differ)."
        )
    if len(groups := group_by(trained, lambda run: run.base)) > 1:
        named = "; ".join(f"{', '.join(run.name for run in own)}: {base}" for base, own in groups.items())
        notes.append(
            "The runs are on different base models, so a difference is not the adapter's alone, and perplexities "
            f"compare only where the models share a tokenizer: {named}."
        )
    if len(groups := group_by([run for run in trained if run.machine], lambda run: run.machine)) > 1:
        named = "; ".join(f"{', '.join(run.name for run in own)}: {machine}" for machine, own in groups.items())
        notes.append(
            "Speed, time and peak memory are of different machines, and a CPU's peak is resident memory with the "
            f"libraries, a GPU's what its tensors took: {named}."
        )
    if len(groups := group_by(trained, lambda run: run.settings.get("train.probe_tokens"))) > 1:
        notes.append(f"Spectra are taken on more tokens of some runs than of others: {_in_groups(groups)}.")
    for task in dict.fromkeys(name for run in runs for name in run.evaluations):
        graded = [run for run in runs if is_graded(run.evaluations.get(task))]
        if len(groups := group_by(graded, lambda run, task=task: _problem_ids(run.evaluations[task]))) > 1:
            notes.append(f"Accuracies on {name_of(task)} are of different problems: {_in_groups(groups)}.")
        done = [run for run in runs if run.evaluations.get(task) and run.evaluations[task].result]
        if not any(run.evaluations[task].is_perplexity for run in done):
            continue
        if len(groups := group_by(done, lambda run, task=task: perplexity_rows(run, run.evaluations[task]))) > 1:
            notes.append(
                f"The perplexities of task {name_of(task)} are on different rows or base models, and cannot be ranked "
                f"against each other: {_in_groups(groups)}."
            )
    for task, settings in dict.fromkeys((test.task, test.other_settings) for test in tests if test.other_settings):
        notes.append(f"{name_of(task)} was not evaluated alike: {'; '.join(settings)}.")
    return notes


def _problem_ids(evaluation: Evaluation) -> frozenset[str]:
    try:
        return frozenset(evaluation.problems)
    except ValueError:  # the paired tests say what is wrong with the file
        return frozenset()


def perplexity_rows(run: Run, evaluation: Evaluation) -> tuple:
    """Equal for evaluations of perplexity on the same tokens."""
    is_own_data = evaluation.kind == "perplexity" and not any(key.startswith("data.") for key in evaluation.settings)
    return run.base, evaluation.rows, run.evaluation_rows if is_own_data else ()


def missing_pieces(runs: Sequence[Run]) -> list[str]:
    """What is not there, by name."""
    lines = []
    tasks = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    for run in runs:
        if run.is_unfinished:
            lines.append(
                f"{run.name} is unfinished (update {run.last_update:,}): its row has what it has written so far."
            )
        perplexity = run.measured("eval/perplexity")
        if perplexity is not None and not math.isfinite(perplexity):
            lines.append(f"{run.name} has diverged (perplexity {perplexity}): pictures leave out what is not finite.")
        if not run.is_training:
            lines.append(f"{run.name} has evaluations only: no training figures.")
        if run.result is not None:
            named = {"eval/perplexity": "perplexity", "spectrum/effective_rank/mean": "effective rank",
                     "spectrum/manifold_dimension/mean": "manifold dimension", "tokens_per_s": "tokens/s",
                     "peak_memory_bytes": "peak memory", "seconds": "time",
                     "trainable_parameters": "parameters"}  # fmt: skip
            if absent := [name for key, name in named.items() if run.result.get(key) is None]:
                lines.append(f"{run.name}: result.json has no {', '.join(absent)}.")
            if not run.spectrum:
                lines.append(f"{run.name}: there is no spectrum.json, so the spectra are without it.")
            if not run.metrics:
                lines.append(f"{run.name}: there is no metrics.jsonl, so the curves are without it.")
        nowhere = [key for key in run.published if not has_column(key)]
        lines += [f"{run.name}: the paper's {key}, {run.published[key]:g}, has no column." for key in nowhere]
        unknown = {path.parent.name for path in run.folder.glob("eval/*/result.json")} - run.evaluations.keys()
        lines += [f"{run.name}: eval/{name} has no config.yaml and is left out." for name in sorted(unknown)]
        unfinished = [name for name, own in run.evaluations.items() if own.result is None]
        lines += [f"{run.name}: the evaluation on {name_of(name)} is unfinished." for name in unfinished]
        for name, own in run.evaluations.items():
            if own.result and own.result.get("missing"):
                lines.append(f"{run.name}: {own.result['missing']:,} answers on {name_of(name)} are missing.")
    for task in tasks:
        if absent := [run.name for run in runs if task not in run.evaluations]:
            lines.append(f"Not evaluated on {name_of(task)}: {', '.join(absent)}.")
    if not tasks:
        lines.append("No run has an evaluation: cera-eval run=DIR task=TASK adds accuracies.")
    unnamed = [run.name for run in runs if run.is_training and not run.published]
    if unnamed:
        lines.append(
            f"No figure of the paper's applies to {', '.join(unnamed)}: "
            "its recipe names none, or a setting was overridden."
        )
    return lines


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which training runs differ: key -> a text for each training run."""
    trained = [run.settings for run in runs if run.is_training]
    return {
        key: [show(settings.get(key)) for settings in trained]
        for key in _differing(trained)
        if changes_of(Config, key) != Changes.nothing
    }


def group_by(runs: Sequence[Run], key: Any) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if any(own.get(key) != settings[0].get(key) for own in settings)]


def _in_groups(groups: dict[Any, list[Run]]) -> str:
    return " | ".join(", ".join(run.name for run in own) for own in groups.values())


def name_of(task: str) -> str:
    return TASK_NAMES.get(task, task)


def show(value: Any) -> str:
    """A setting as one writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
