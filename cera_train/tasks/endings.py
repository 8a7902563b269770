"""How an answer ended, so that failures are told apart: right; collapsed, a state that stands still; loop, a text that
repeats itself; truncated, cut by max_new_tokens without a loop; wrong, any other answer that is not right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cera_train.common.records import Record, key

if TYPE_CHECKING:
    from cera_train.tasks.records import Generation, Grade, Problem
    from cera_train.tasks.task import AnswerTask

ENDINGS = RIGHT, WRONG, LOOP, TRUNCATED, COLLAPSED = "right", "wrong", "loop", "truncated", "collapsed"

LOOP_TIMES = 3
LOOP_CHARACTERS = 50
LONGEST_SEGMENT = 1_000


def ending_of(task: AnswerTask, problem: Problem, answer: Generation, grade: Grade) -> str:
    """The first of right, collapsed, loop, truncated and wrong that an answer is. An answer whose gold answer repeats
    itself too, such as a cycle of a map, is no loop."""
    if grade.is_right:
        return RIGHT
    if task.is_collapsed(grade):
        return COLLAPSED
    if is_loop(answer.text) and not is_loop(problem.gold):
        return LOOP
    return TRUNCATED if answer.truncated else WRONG


def is_loop(text: str) -> bool:
    """Whether a text ends in a segment that comes at least 3 times in a row, the last or first time perhaps in part,
    over at least 50 characters: repetition at the end, as Holtzman et al. 2020 (arXiv 1904.09751) count it in tokens.
    """
    for length in range(1, min(len(text) // LOOP_TIMES, LONGEST_SEGMENT) + 1):
        start = len(text) - max(LOOP_TIMES * length, LOOP_CHARACTERS)
        # The tail repeats with this period where it equals itself moved by one segment.
        if start >= 0 and text.startswith(text[start + length :], start):
            return True
    return False


@dataclass
class EndingShares(Record):
    """The share of an evaluation's answers that ended in each way."""

    right: float | None = key("ending/right")
    wrong: float | None = key("ending/wrong")
    loop: float | None = key("ending/loop")
    truncated: float | None = key("ending/truncated")
    collapsed: float | None = key("ending/collapsed")

    @classmethod
    def of(cls, endings: Sequence[str | None]) -> Self:
        """The shares, where it is known how every answer ended."""
        counts = Counter(endings)
        if not endings or None in counts:
            return cls()
        return cls(*(counts[name] / len(endings) for name in ENDINGS))

    @property
    def by_name(self) -> dict[str, float]:
        """The shares by the names of the endings; empty where one is not known."""
        shares = {name: getattr(self, name) for name in ENDINGS}
        return {} if None in shares.values() else shares
