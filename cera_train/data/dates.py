"""Rows of dates of the twentieth century: a question has a date in one of several ways, the answer is YYYY-MM-DD.

What no model can guess is the rows' convention: 3.5.87 is in May, and of 1987. No two rows have one answer.
"""

import itertools
import random
from datetime import date, timedelta

from cera_train.data.rows import Row, computed_row

TO_TWENTIETH = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
    "twentieth",
)
ORDINALS = (*TO_TWENTIETH, *(f"twenty-{unit}" for unit in TO_TWENTIETH[:9]), "thirtieth", "thirty-first")
WAYS = (
    "the {ordinal} of {day:%B %Y}",
    "{day.day} {day:%B %Y}",
    "{day:%B} {day.day}, {day.year}",
    "{day.day}.{day.month}.{day:%y}",
    "the day after {day:%B} {day.day}, {day.year}",
)


def rows(train_rows: int | None, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows; None trains on every day that does not evaluate."""
    days = [date(1900, 1, 1) + timedelta(days=number) for number in range(36_524)]
    random.Random(0).shuffle(days)
    train, evaluation = days[eval_rows:][:train_rows], days[:eval_rows]
    return tuple([row(day, way) for day, way in zip(split, itertools.cycle(WAYS))] for split in (train, evaluation))


def row(answer: date, way: str) -> Row:
    """The row with this answer."""
    day = answer - timedelta(days="the day after" in way)
    text = way.format(day=day, ordinal=ORDINALS[day.day - 1])
    return computed_row(f"Write {text} as YYYY-MM-DD.", answer.isoformat())
