"""The logistic map x' = growth x (1 - x): the paper's case study of a model that has to keep moving.

A problem gives x0 and asks for the next iterates. Every iterate comes from the exact one before it and is rounded only
for display, so an answer cannot be had by iterating on the rounded numbers for long.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cera_train.config import LogisticMapConfig

EVAL_ROWS = 20
"""Starting points of an evaluation where the run was not trained on this task: those of conf/data/logistic_map.yaml."""

PAPER_X0, PAPER_CASE = 0.4, LogisticMapConfig(growth=3.5, steps=5, decimals=4)
"""The paper's case study of state collapse."""


def trajectory(x0: float, growth: float, steps: int) -> list[float]:
    """The `steps` iterates after x0."""
    values = []
    for _ in range(steps):
        x0 = growth * x0 * (1 - x0)
        values.append(x0)
    return values


def problem(x0: float, config: LogisticMapConfig) -> dict[str, str]:
    """One row: prompt and completion."""
    show = f"{{:.{config.decimals}f}}".format
    iterates = trajectory(x0, config.growth, config.steps)
    return {
        "prompt": f"Question: x' = {config.growth:g} x (1 - x). Starting from x = {show(x0)}, "
        f"what are the next {config.steps} values?\nAnswer:",
        "completion": " " + ", ".join(show(x) for x in iterates),
    }


def starting_points(config: LogisticMapConfig, eval_rows: int) -> tuple[list[float], list[float]]:
    """Training and evaluation starting points: all of so many decimals, split at random by the seed.

    Raises:
        ValueError: there are not more starting points than `eval_rows`.
    """
    scale = 10**config.decimals
    starts = [number / scale for number in range(1, scale)]
    if eval_rows >= len(starts):
        raise ValueError(
            f"data.eval_rows={eval_rows} leaves nothing to train on: there are {len(starts)} starting points of "
            f"{config.decimals} decimals. Lower it, or raise data.logistic_map.decimals."
        )
    random.Random(config.seed).shuffle(starts)
    return starts[eval_rows:], starts[:eval_rows]


def problems(config: LogisticMapConfig, eval_rows: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and evaluation rows."""
    train, evaluation = starting_points(config, eval_rows)
    return [problem(x0, config) for x0 in train], [problem(x0, config) for x0 in evaluation]


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
