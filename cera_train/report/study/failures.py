"""Failures apart: how answers end, pass@k, and the loss by the difficulty of a token for the untouched base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from cera_train.evaluation.statistics import accuracy_interval, pass_at_k
from cera_train.report.study.cells import CellResult
from cera_train.runs.outcomes import GradedProblem, loss_by_difficulty
from cera_train.runs.results import ENDINGS

PARTS = 5
"""Parts of the held-out tokens, equally large, from easy to difficult."""


def ending_shares(cell: CellResult, outcome: str) -> dict[str, float]:
    """The share of the answers of all seeds that end in each way."""
    found = Counter(ending for graded in cell.grades[outcome] for problem in graded for ending in problem.endings)
    return {ending: found[ending] / found.total() for ending in ENDINGS}


@dataclass(frozen=True)
class PassAtK:
    k: int
    value: float
    interval: tuple[float, float]
    """95 % over problems, of the mean over seeds."""


def pass_at(cell: CellResult, outcome: str) -> list[PassAtK]:
    """pass@1 and pass@n of n answers to each problem; nothing where there is one answer."""
    grades = cell.grades[outcome]
    samples = min(len(problem.scores) for graded in grades for problem in graded)
    return [_pass_at(grades, samples, k) for k in (1, samples)] if samples > 1 else []


def _pass_at(grades: Sequence[Sequence[GradedProblem]], samples: int, k: int) -> PassAtK:
    solved: dict[str, list[float]] = {}
    for problem in (problem for graded in grades for problem in graded):
        right = sum(score == 1 for score in problem.scores[:samples])
        solved.setdefault(problem.problem, []).append(pass_at_k(samples, right, k))
    values = list(map(fmean, solved.values()))
    return PassAtK(k, fmean(values), accuracy_interval(values))


@dataclass(frozen=True)
class Difficulty:
    """Mean loss in parts of the held-out tokens, set apart by the untouched base model's loss on each."""

    task: str
    """The study's task; empty where it names none."""
    ranges: list[tuple[float, float]]
    """The base model's losses in each part, from easy to difficult."""
    base: list[float]
    """Their means."""
    losses: dict[str, list[tuple[float, float | None]]]
    """After training, by the name of a cell: the mean over seeds in each part, and its standard error."""


def by_difficulty(task: str, cells: Sequence[CellResult]) -> Difficulty | None:
    """The losses of the cells of one task; None where no run kept them."""
    before = next((before for own in cells for before, _ in own.losses if before is not None), None)
    if before is None:
        return None
    parts = loss_by_difficulty(before, [after for own in cells for _, after in own.losses], PARTS)
    by_run = iter(zip(*(part.after for part in parts), strict=True))
    losses = {}
    for own in cells:
        by_part = zip(*(next(by_run) for _ in own.losses), strict=True)
        losses[own.name] = [(fmean(seeds), _standard_error(seeds)) for seeds in by_part]
    return Difficulty(task, [(part.lowest, part.highest) for part in parts], [part.before for part in parts], losses)


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
