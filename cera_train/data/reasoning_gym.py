"""Rows of reasoning-gym's generators (Stojanovski et al. 2025, arXiv 2505.24760): a question, and an answer that the
generator's grader takes for right.

Training, held-out and test questions come from different seeds, and a digest of its text puts a question into one of
the three: a generator repeats itself where it has few questions, so different seeds alone would test on trained ones.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, computed_row, normalized
from cera_train.settings.data import ReasoningGymConfig, as_list, check_generators

DRAWS = 1_000_000
"""Draws of a split at most. A generator seeds draw i with seed + i, so seeds that are nearer than this share draws."""

PATIENCE = 5_000
"""A generator has no more questions after so many draws without a new one."""


class Split(IntEnum):
    train = 0
    held_out = 1
    test = 2


@dataclass(frozen=True)
class Draw:
    """A question with what makes it again."""

    generator: str
    level: int | None
    seed: int
    index: int
    question: str
    answer: str


def rows(config: ReasoningGymConfig, train_rows: int, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows, each of the generators in turn. Training rows may repeat a question."""
    train = draws(config, Split.train, train_rows, "data.train_rows")
    held_out = draws(config, Split.held_out, eval_rows, "data.eval_rows")
    return tuple([computed_row(draw.question, draw.answer) for draw in split] for split in (train, held_out))


def draws(config: ReasoningGymConfig, split: Split, count: int, key: str) -> list[Draw]:
    """The first `count` questions of a split, each of the generators in turn.

    Raises:
        UserError: a generator has fewer. It names the number by its `key`.
    """
    questions = {name: _questions(name, config.level, config.seed, split) for name in as_list(config.generator)}
    drawn = []
    for name in itertools.islice(itertools.cycle(questions), count):
        draw = next(questions[name], None)
        if draw is None:
            available = sum(draw.generator == name for draw in drawn)
            level = "" if config.level is None else f" at level {config.level}"
            reason = f"{name}{level} has only {available} different {split.name.replace('_', '-')} questions"
            raise UserError(f"{key}={count}: {reason}. Lower it, or raise the level.")
        drawn.append(draw)
    return drawn


def split_of(question: str) -> Split:
    """The split of a question: an eighth each of all texts are held out and test, and six eighths train."""
    share = hashlib.blake2b(normalized(question).encode(), digest_size=1).digest()[0] % 8
    return {0: Split.held_out, 1: Split.test}.get(share, Split.train)


@functools.lru_cache
def open_generator(name: str, level: int | None, seed: int) -> Any:
    """A generator as reasoning-gym makes it, whose element i is question i."""
    # A stranger's problems.jsonl may name one whose grader runs an answer as Python.
    check_generators("generator", name)
    try:
        from reasoning_gym import factory
    except ImportError:
        reason = "data.layout=reasoning_gym needs the package reasoning-gym"
        raise UserError(f"{reason}: pip install -e '.[tasks]' in the clone of cera-train.") from None
    settings = {"seed": seed, "size": DRAWS}
    if level is not None:
        curriculum = factory.create_curriculum(name)
        highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        require(level <= highest, f"level={level} of {name}: it has levels 0 to {highest}. Choose one.")
        curriculum.set_global_level(level)
        settings = vars(curriculum.generate_configuration(settings))
    try:
        return factory.create_dataset(name, **settings)
    except AssertionError as error:  # how reasoning-gym checks settings, also those of its own levels
        raise UserError(f"level={level} of {name}: reasoning-gym refuses it, {error}. Choose another.") from error


def _questions(name: str, level: int | None, seed: int, split: Split) -> Iterator[Draw]:
    """The questions of a split in the order of their draws. Only training repeats any."""
    seed = (seed * len(Split) + split) * DRAWS
    generator, seen, last = open_generator(name, level, seed), set(), 0
    for index in range(DRAWS):
        entry = generator[index]
        question, answer = entry["question"], entry["answer"]
        if split_of(question) == split and normalized(question) not in seen and answer.strip():
            yield Draw(name, level, seed, index, question, answer)
            last = index
            if split != Split.train:
                seen.add(normalized(question))
        elif index - last > PATIENCE:
            return
