"""The logistic map x' = growth x (1 - x): the paper's case study of a model that has to keep moving.

A problem gives x0 and asks for the next iterates. Every iterate comes from the exact one before it and is rounded only
for display, so an answer cannot be had by iterating on the rounded numbers for long.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cera_train.data.config import LogisticMapConfig

EVAL_ROWS = 20
"""Starting points of an evaluation where the run was not trained on this task: those of conf/data/logistic_map.yaml."""

PAPER_X0, PAPER_CASE = 0.4, LogisticMapConfig(growth=3.5, steps=5, decimals=4)
"""The paper's case study of state collapse."""


# --- grading ---------------------------------------------------------------------------------------------------------


def extract(text: str, steps: int) -> list[float]:
    """The first `steps` values of an answer's first line; fewer where it gives fewer.

    Between commas, a value is the last number: the 0.84 of `x1 = 3.5 * 0.4 * 0.6 = 0.84`. In a line without commas,
    every number with a decimal point is one.
    """
    line = text.strip().partition("\n")[0]
    if "," in line:
        numbers = [numbers[-1] for part in line.split(",") if (numbers := re.findall(r"-?\d*\.?\d+", part))]
    else:
        # Digits are taken from their first one on only, else a long row of them is searched from each.
        numbers = re.findall(r"-?(?:(?<!\d)\d++)?\.\d+", line)
    return [value for value in map(float, numbers) if math.isfinite(value)][:steps]


@dataclass(frozen=True)
class Steps:
    """An answer beside the truth, step by step."""

    matches: list[bool]
    """Whether a step agrees in every decimal; one that is missing does not."""
    errors: list[float | None]
    """Absolute error of a step; None where it is missing."""
    collapsed: bool


def compare(values: Sequence[float], gold: str, decimals: int) -> Steps:
    """Grades an answer.

    Args:
        values: what `extract` found.
        gold: the true iterates as a completion writes them, separated by commas.
    """
    truth = [number.strip() for number in gold.split(",")]
    shown = [f"{value:.{decimals}f}" for value in values] + [None] * (len(truth) - len(values))
    matches = [value == true for value, true in zip(shown, truth, strict=True)]
    errors = [
        None if value is None else abs(value - float(true)) for value, true in itertools.zip_longest(values, truth)
    ]
    return Steps(matches, errors, is_collapsed(shown[: len(values)], truth))


def is_collapsed(answer: Sequence[str], truth: Sequence[str]) -> bool:
    """State collapse: from some step on the answer repeats one value to its end, where the truth moves."""
    repeated = len(list(itertools.takewhile(lambda value: value == answer[-1], reversed(answer))))
    return repeated > 1 and len(set(truth[len(answer) - repeated : len(answer)])) > 1
