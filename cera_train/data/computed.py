"""Computed rows: of the logistic map, of dates, and of reasoning-gym's generators."""

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from enum import IntEnum
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, computed_row, normalized
from cera_train.settings.data import (
    DataConfig,
    Layout,
    LogisticMapConfig,
    ReasoningGymConfig,
    as_list,
)


def computed_rows(config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a config whose layout is computed."""
    match config.layout:
        case Layout.logistic_map:
            return logistic_map_rows(config.logistic_map, config.eval_rows)
        case Layout.dates:
            return date_rows(config.train_rows, config.eval_rows)
    return reasoning_gym_rows(config.reasoning_gym, config.train_rows, config.eval_rows)


# --- the logistic map -----------------------------------------------------------------------------


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
    random by its seed. A held-out point is held out for all growths."""
    scale = 10**config.decimals
    starts = [number / scale for number in range(1, scale)]
    held_out = math.ceil(eval_rows / len(as_list(config.growth)))
    if held_out >= len(starts):
        there = f"there are {len(starts)} starting points of {config.decimals} decimals"
        fix = "Lower it, or raise data.logistic_map.decimals."
        raise UserError(f"data.eval_rows={eval_rows} leaves nothing to train on: {there}. {fix}")
    random.Random(config.seed).shuffle(starts)
    return starts[held_out:], starts[:held_out]


def logistic_map_row(x0: float, growth: float, config: LogisticMapConfig) -> Row:
    """Rounds iterates only for the text: iterating on rounded numbers soon leaves the
    trajectory."""
    values = [x0]
    for _ in range(config.steps):
        values.append(growth * values[-1] * (1 - values[-1]))
    start, *iterates = (f"{x:.{config.decimals}f}" for x in values)
    question = (
        f"x' = {growth:g} x (1 - x). Starting from x = {start}, what are the next {config.steps} "
        f"values?"
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


# --- reasoning-gym --------------------------------------------------------------------------------

DRAWS = 1_000_000
"""The most draws of a split. A generator seeds draw i with seed + i, so seeds closer than this
share draws."""

PATIENCE = 5_000  # A generator has run out of questions after this many draws without a new one


class Split(IntEnum):
    train = 0
    held_out = 1
    test = 2


@dataclass(frozen=True)
class Draw:
    """A question, and what reproduces it."""

    generator: str
    level: int | None
    seed: int
    index: int
    question: str
    answer: str


def reasoning_gym_rows(
    config: ReasoningGymConfig, train_rows: int, eval_rows: int
) -> tuple[list[Row], list[Row]]:
    """Rows of the generators of Stojanovski et al. 2025 (arXiv 2505.24760), in turn. Training,
    held-out and test questions have different seeds, and a digest of its text assigns a question to
    one of the three: a generator with few questions repeats itself, so seeds alone would test on
    trained questions. Training rows may repeat a question."""
    train = draws(config, Split.train, train_rows, "data.train_rows")
    held_out = draws(config, Split.held_out, eval_rows, "data.eval_rows")
    return tuple(
        [computed_row(draw.question, draw.answer) for draw in split] for split in (train, held_out)
    )


def draws(config: ReasoningGymConfig, split: Split, count: int, key: str) -> list[Draw]:
    """The first `count` questions of a split, from the generators in turn.

    Raises:
        UserError: a generator has fewer. The message names the count by `key`.
    """
    questions = {
        name: _questions(name, config.level, config.seed, split)
        for name in as_list(config.generator)
    }
    drawn = []
    for name in itertools.islice(itertools.cycle(questions), count):
        draw = next(questions[name], None)
        if draw is None:
            available = sum(draw.generator == name for draw in drawn)
            level = "" if config.level is None else f" at level {config.level}"
            reason = (
                f"{name}{level} has only {available} different {split.name.replace('_', '-')} "
                f"questions"
            )
            raise UserError(f"{key}={count}: {reason}. Lower it, or raise the level.")
        drawn.append(draw)
    return drawn


def split_of(question: str) -> Split:
    """The split of a question: an eighth of all texts is held out, an eighth is for tests, the rest
    for training."""
    share = hashlib.blake2b(normalized(question).encode(), digest_size=1).digest()[0] % 8
    return {0: Split.held_out, 1: Split.test}.get(share, Split.train)


@functools.lru_cache
def open_generator(name: str, level: int | None, seed: int) -> Any:
    """reasoning-gym's data set for a generator: element i is question i."""
    try:
        from reasoning_gym import factory
    except ImportError:
        reason = "data.layout=reasoning_gym needs the package reasoning-gym"
        raise UserError(
            f"{reason}: pip install -e '.[tasks]' in the clone of cera-train."
        ) from None
    settings = {"seed": seed, "size": DRAWS}
    if level is not None:
        curriculum = factory.create_curriculum(name)
        highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        require(
            level <= highest, f"level={level} of {name}: it has levels 0 to {highest}. Choose one."
        )
        curriculum.set_global_level(level)
        settings = vars(curriculum.generate_configuration(settings))
    try:
        return factory.create_dataset(name, **settings)
    except AssertionError as error:
        # reasoning-gym checks settings by assertions, also those of its own levels.
        raise UserError(
            f"level={level} of {name}: reasoning-gym refuses it, {error}. Choose another."
        ) from error


def _questions(name: str, level: int | None, seed: int, split: Split) -> Iterator[Draw]:
    """The questions of a split in the order of their draws. Only training repeats questions."""
    seed = (seed * len(Split) + split) * DRAWS
    generator = open_generator(name, level, seed)
    seen = set()
    last = 0
    for index in range(DRAWS):
        entry = generator[index]
        question = entry["question"]
        answer = entry["answer"]
        if split_of(question) == split and normalized(question) not in seen and answer.strip():
            yield Draw(name, level, seed, index, question, answer)
            last = index
            if split != Split.train:
                seen.add(normalized(question))
        elif index - last > PATIENCE:
            return
