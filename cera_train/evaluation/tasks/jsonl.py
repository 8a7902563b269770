r"""A task of your own: rows with a question and an answer, graded by one of four rules.

text: the whole answer, but for spaces. number: the last number, as GSM8K reads it. math: the last \boxed{}, as MATH
reads it. choice: the letter of a choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, text_of
from cera_train.evaluation.tasks import gsm8k, math
from cera_train.evaluation.tasks.task import QuestionTask
from cera_train.settings.evaluation import Grader, TaskConfig

STATED = re.compile(r"(?i:answer)\b(?i:\s+is)?[\s:*(\[]*([A-Z])\b(?!')")
"""The answer is (B). Answer: B"""

FIRST = re.compile(r"\W*([A-Z])(?:[).:,\]*]|\s*(?:\n|\Z))")
"""B. (B) Paris. B, alone on the first line; not the A of `A dog`."""


def single_spaced(text: str) -> str | None:
    return " ".join(text.split()) or None


def chosen(text: str) -> str | None:
    """The letter that a text begins with, else the first that it states as its answer: a model that does not stop goes
    on to make up questions and answer them."""
    match = FIRST.match(text) or STATED.search(text)
    return match[1] if match else None


@dataclass(frozen=True)
class Rule:
    """How a grader finds the gold answer in its cell, finds an answer in a text, and compares the two."""

    expected: str
    """What the cell should hold, for messages."""
    gold: Callable[[str], str | None]
    """None where the cell holds no answer of this kind."""
    extract: Callable[[str], str | None]
    is_exact: Callable[[str, str], bool] = lambda answer, gold: answer == gold
    is_verified: bool = False


RULES = {
    Grader.text: Rule("a text", single_spaced, single_spaced),
    Grader.number: Rule("a number", gsm8k.extract, gsm8k.extract, gsm8k.is_exact, is_verified=True),
    Grader.math: Rule(
        r"an answer in LaTeX, alone or in \boxed{}",
        lambda cell: math.extract(cell) or cell.strip() or None,
        math.extract,
        math.is_exact,
        is_verified=True,
    ),
    Grader.choice: Rule("a letter", lambda cell: cell.strip() if re.fullmatch("[A-Z]", cell.strip()) else None, chosen),
}


def gold(row: Row, column: str, grader: Grader) -> str:
    """The gold answer of a row."""
    cell = text_of(row, column, "task.answer")
    answer = RULES[grader].gold(cell)
    if answer is None:
        reason = f"column {column!r} holds {cell[-60:]!r}, and task.grader={grader} needs {RULES[grader].expected}"
        raise UserError(f"{reason}: mend the row, or choose another grader.")
    return answer


class JsonlTask(QuestionTask):
    def check(self, config: TaskConfig) -> None:
        require(config.grader is not None, f"task.grader is missing: choose one of {', '.join(Grader)}.")
        super().check(config)

    def configured(self, config: TaskConfig) -> JsonlTask:
        rule = RULES[config.grader]
        return replace(
            self,
            question=config.question or self.question,
            gold=partial(gold, column=config.answer or "answer", grader=config.grader),
            extract=rule.extract,
            is_exact=rule.is_exact,
            is_verified=rule.is_verified,
        )


TASK = JsonlTask(
    settings=("question", "answer", "grader"),
    question="question",
    gold=partial(gold, column="answer", grader=Grader.text),  # `configured` puts the rule of task.grader in place
    extract=single_spaced,
    is_exact=RULES[Grader.text].is_exact,
)
