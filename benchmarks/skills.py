"""Rows that ask for one of K conflicting formats of the same dates, chosen by a word: `python -m
benchmarks.skills`, then `cera-train -m +study=skills`."""

import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

FOLDER = Path("outputs/skills")
COUNTS = (1, 2, 4, 8)
"""The numbers of formats K, one file each."""
TRAINED = 2_000
HELD_OUT = 500
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"]

FORMATS: dict[str, Callable[[date], str]] = {
    "amber": lambda day: f"{day:%Y-%m-%d}",
    "birch": lambda day: f"{day:%d.%m.%Y}",
    "coral": lambda day: f"{day:%m/%d/%y}",
    "delta": lambda day: f"{day:%B} {day.day}, {day.year}",
    "ember": lambda day: f"{day:%y%m%d}",
    "fjord": lambda day: f"{day.day}-{ROMAN[day.month - 1]}-{day.year}",
    "grove": lambda day: f"{day:%A}, {day:%Y/%j}",
    "hazel": lambda day: f"{day:%d %b} '{day:%y}",
}
"""The word that chooses a format."""


def rows(count: int) -> list[dict[str, str]]:
    """The same dates for every K, those held out last; a row asks for a random one of the first K
    formats."""
    draw = random.Random(0)
    numbers = draw.sample(range(36_524), TRAINED + HELD_OUT)
    days = [date(1900, 1, 1) + timedelta(days=number) for number in numbers]
    words = [[*FORMATS][int(draw.random() * count)] for _ in days]
    return [
        {"prompt": f"{word}: {day.day} {day:%B %Y} =", "completion": f" {FORMATS[word](day)}"}
        for day, word in zip(days, words, strict=True)
    ]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for count in COUNTS:
        lines = [json.dumps(row) + "\n" for row in rows(count)]
        (FOLDER / f"k{count}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
