"""Rows of the logistic map x' = growth x (1 - x): given x0, the next iterates.

Every iterate is computed from the exact one before it and rounded only for display: iterating on rounded numbers soon
leaves the trajectory.
"""

import random

from cera_train.common.errors import UserError
from cera_train.data.config import LogisticMapConfig

PROMPT = "Question: {question}\nAnswer:"


def trajectory(x0: float, growth: float, steps: int) -> list[float]:
    """The `steps` iterates after x0."""
    values = [x0]
    for _ in range(steps):
        values.append(growth * values[-1] * (1 - values[-1]))
    return values[1:]


def problem(x0: float, config: LogisticMapConfig) -> dict[str, str]:
    """One row: prompt and completion."""
    start, *iterates = (f"{x:.{config.decimals}f}" for x in (x0, *trajectory(x0, config.growth, config.steps)))
    return {
        "prompt": PROMPT.format(
            question=f"x' = {config.growth:g} x (1 - x). Starting from x = {start}, "
            f"what are the next {config.steps} values?"
        ),
        "completion": " " + ", ".join(iterates),
    }


def starting_points(config: LogisticMapConfig, eval_rows: int) -> tuple[list[float], list[float]]:
    """Training and evaluation starting points: all numbers with the config's decimals, split at random by its seed."""
    scale = 10**config.decimals
    starts = [number / scale for number in range(1, scale)]
    if eval_rows >= len(starts):
        there = f"there are {len(starts)} starting points of {config.decimals} decimals"
        mend = "Lower it, or raise data.logistic_map.decimals."
        raise UserError(f"data.eval_rows={eval_rows} leaves nothing to train on: {there}. {mend}")
    random.Random(config.seed).shuffle(starts)
    return starts[eval_rows:], starts[:eval_rows]


def problems(config: LogisticMapConfig, eval_rows: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and evaluation rows."""
    train, evaluation = starting_points(config, eval_rows)
    return [problem(x0, config) for x0 in train], [problem(x0, config) for x0 in evaluation]
