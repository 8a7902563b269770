"""Computed rows: of the logistic map, and of dates."""

import itertools
import math
import random
from datetime import date, timedelta

from cera_train.common.errors import UserError
from cera_train.data.rows import Row, computed_row
from cera_train.settings.data import DataConfig, Layout, LogisticMapConfig, as_list


def computed_rows(config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a config whose layout is computed."""
    if config.layout == Layout.logistic_map:
        return logistic_map_rows(config.logistic_map, config.eval_rows)
    return date_rows(config.train_rows, config.eval_rows)


# --- the logistic map -----------------------------------------------------------------------------


STEPS = 6  # iterates that a row asks for


def logistic_map_rows(config: LogisticMapConfig, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """Rows of x' = growth x (1 - x): given x0, the next iterates. Every starting point has a row
    for each growth."""
    train, evaluation = (
        [logistic_map_row(x0, growth, config) for x0 in starts for growth in as_list(config.growth)]
        for starts in starting_points(config, eval_rows)
    )
    return train, evaluation[:eval_rows]


def starting_points(config: LogisticMapConfig, eval_rows: int) -> tuple[list[float], list[float]]:
    """Training and held-out starting points: all numbers with the config's decimals, split at
    random. A held-out point is held out for all growths."""
    scale = 10**config.decimals
    starts = [number / scale for number in range(1, scale)]
    held_out = math.ceil(eval_rows / len(as_list(config.growth)))
    if held_out >= len(starts):
        there = f"there are {len(starts)} starting points of {config.decimals} decimals"
        fix = "Lower it, or raise data.logistic_map.decimals."
        raise UserError(f"data.eval_rows={eval_rows} leaves nothing to train on: {there}. {fix}")
    random.Random(0).shuffle(starts)
    return starts[held_out:], starts[:held_out]


def logistic_map_row(x0: float, growth: float, config: LogisticMapConfig) -> Row:
    """Rounds iterates only for the text: iterating on rounded numbers soon leaves the
    trajectory."""
    values = [x0]
    for _ in range(STEPS):
        values.append(growth * values[-1] * (1 - values[-1]))
    start, *iterates = (f"{x:.{config.decimals}f}" for x in values)
    question = (
        f"x' = {growth:g} x (1 - x). Starting from x = {start}, what are the next {STEPS} values?"
    )
    return computed_row(question, ", ".join(iterates))


# --- dates ----------------------------------------------------------------------------------------

TO_TWENTIETH = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
)
ORDINALS = (
    *TO_TWENTIETH,
    *(f"twenty-{unit}" for unit in TO_TWENTIETH[:9]),
    "thirtieth",
    "thirty-first",
)
WAYS = (
    "the {ordinal} of {day:%B %Y}",
    "{day.day} {day:%B %Y}",
    "{day:%B} {day.day}, {day.year}",
    "{day.day}.{day.month}.{day:%y}",
    "the day after {day:%B} {day.day}, {day.year}",
)
"""The model must learn the convention: 3.5.87 is in May, and of 1987."""


def date_rows(train_rows: int | None, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """Rows of dates of the twentieth century, written in several ways. No two rows share an answer;
    `train_rows` None trains on every day that is not held out."""
    days = [date(1900, 1, 1) + timedelta(days=number) for number in range(36_524)]
    random.Random(0).shuffle(days)
    splits = days[eval_rows:][:train_rows], days[:eval_rows]
    return tuple(
        [date_row(day, way) for day, way in zip(split, itertools.cycle(WAYS))] for split in splits
    )


def date_row(answer: date, way: str) -> Row:
    day = answer - timedelta(days="the day after" in way)
    text = way.format(day=day, ordinal=ORDINALS[day.day - 1])
    return computed_row(f"Write {text} as YYYY-MM-DD.", answer.isoformat())
