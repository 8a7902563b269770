"""Rows of the logistic map x' = growth x (1 - x): given x0, the next iterates. Of several growths, each has a row
from every starting point, and a held-out starting point is held out of all.

Every iterate is computed from the exact one before it and rounded only for display: iterating on rounded numbers soon
leaves the trajectory.
"""

import math
import random

from cera_train.common.errors import UserError
from cera_train.data.rows import Row, computed_row
from cera_train.settings.data import LogisticMapConfig


def trajectory(x0: float, growth: float, steps: int) -> list[float]:
    """The `steps` iterates after x0."""
    values = [x0]
    for _ in range(steps):
        values.append(growth * values[-1] * (1 - values[-1]))
    return values[1:]


def problem(x0: float, growth: float, config: LogisticMapConfig) -> Row:
    """One row: prompt and completion."""
    start, *iterates = (f"{x:.{config.decimals}f}" for x in (x0, *trajectory(x0, growth, config.steps)))
    question = f"x' = {growth:g} x (1 - x). Starting from x = {start}, what are the next {config.steps} values?"
    return computed_row(question, ", ".join(iterates))


def starting_points(config: LogisticMapConfig, eval_rows: int) -> tuple[list[float], list[float]]:
    """Training and evaluation starting points: all numbers with the config's decimals, split at random by its seed."""
    scale = 10**config.decimals
    starts = [number / scale for number in range(1, scale)]
    held_out = math.ceil(eval_rows / len(config.growths))
    if held_out >= len(starts):
        there = f"there are {len(starts)} starting points of {config.decimals} decimals"
        mend = "Lower it, or raise data.logistic_map.decimals."
        raise UserError(f"data.eval_rows={eval_rows} leaves nothing to train on: {there}. {mend}")
    random.Random(config.seed).shuffle(starts)
    return starts[held_out:], starts[:held_out]


def problems(config: LogisticMapConfig, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows: of every starting point, one for each growth."""
    train, evaluation = (
        [problem(x0, growth, config) for x0 in starts for growth in config.growths]
        for starts in starting_points(config, eval_rows)
    )
    return train, evaluation[:eval_rows]
