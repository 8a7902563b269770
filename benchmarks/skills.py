"""Rows that ask for one of K conflicting formats of the same dates, chosen by a word: `python -m
benchmarks.skills`, then `cera-train -m +study=skills`."""

import itertools
import random
from datetime import date, timedelta
from pathlib import Path

from benchmarks.rows import write_rows

FOLDER = Path("outputs/skills")
COUNTS = (8, 32)
"""The numbers of formats K, one file each."""
TRAINED = 2_000
HELD_OUT = 300
WORDS = (  # noqa: SIM905
    "acorn amber basil birch cedar coral daisy delta eagle ember fjord flint grove hazel iris jade "
    "kelp lotus maple north olive pearl quartz river stone tulip umber violet willow xenon "
    "yarrow zinc"
).split()
"""The words that choose a format."""
ORDERS = ("%d %m %y", "%m %d %y", "%y %m %d", "%y %d %m")
SEPARATORS = ("-", ".", "/", " ")
YEARS = ("%y", "%Y")


def formats() -> list[str]:
    """One for each word. All are digits, and about as hard, so that K alone makes a loss."""
    every = [
        order.replace("%y", year).replace(" ", separator)
        for order, separator, year in itertools.product(ORDERS, SEPARATORS, YEARS)
    ]
    return random.Random(0).sample(every, len(every))


def rows(count: int) -> list[dict[str, str]]:
    """The same dates for every K, those held out last; a row asks for a random one of the first K
    formats."""
    draw = random.Random(0)
    numbers = draw.sample(range(36_524), TRAINED + HELD_OUT)
    days = [date(1900, 1, 1) + timedelta(days=number) for number in numbers]
    by_word = list(zip(WORDS, formats(), strict=True))
    chosen = [by_word[int(draw.random() * count)] for _ in days]
    return [
        {"prompt": f"{word}: {day.day} {day:%B %Y} =", "completion": f" {day:{form}}"}
        for day, (word, form) in zip(days, chosen, strict=True)
    ]


def main() -> None:
    for count in COUNTS:
        write_rows(FOLDER / f"k{count}.jsonl", rows(count))


if __name__ == "__main__":
    main()
