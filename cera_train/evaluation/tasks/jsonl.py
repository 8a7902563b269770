r"""A task of your own: rows with a question and an answer, graded by one of four rules.

text: the whole answer, but for spaces. number: the last number, as GSM8K reads it. math: the last \boxed{}, as MATH
reads it. choice: the letter of a choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from string import ascii_uppercase

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, as_text, kind_of, text_of
from cera_train.evaluation.tasks import gsm8k, math
from cera_train.evaluation.tasks.task import QuestionTask
from cera_train.settings.tasks import Grader, TaskConfig

CHOICES = "choices"
"""The column with the texts to choose from; in a prompt, {choices} is a line for each after its letter."""

STATED = re.compile(r"(?i:answer)\b(?i:\s+is)?[\s:*(\[]*([A-Z])\b(?!')")
"""The answer is (B). Answer: B"""

FIRST = re.compile(r"\W*([A-Z])(?:[).:,\]*]|\s*(?:\n|\Z))")
"""B. (B) Paris. B, alone on the first line; not the A of `A dog`."""


@dataclass(frozen=True)
class Rule:
    """How a grader finds the gold answer in its cell, finds an answer in a text, and compares the two."""

    gold: Callable[[str, Row], str | None]
    """None where the cell, or the row's choices, hold no answer of this kind."""
    expected: str
    """What the cell should hold, for messages."""
    extract: Callable[[str], str | None]
    is_exact: Callable[[str, str], bool] = lambda answer, gold: answer == gold
    is_verified: bool = False


def single_spaced(text: str) -> str | None:
    return " ".join(text.split()) or None


def letter_of(answer: str, row: Row) -> str | None:
    """The letter of the right choice: written so, by the choice's text, or by its number from 0."""
    texts, answer = choices_of(row), answer.strip()
    letters = ascii_uppercase[: len(texts)] if texts else ascii_uppercase
    if len(answer) == 1 and answer in letters:
        return answer
    if answer in texts:
        return letters[texts.index(answer)]
    is_number = texts and re.fullmatch(r"\d{1,2}", answer) and int(answer) < len(texts)
    return letters[int(answer)] if is_number else None


def choices_of(row: Row) -> list[str]:
    """The texts to choose from; empty where the row has none, since its question may hold them."""
    choices = row.get(CHOICES)
    if choices is None:
        return []
    if not isinstance(choices, list) or not 1 < len(choices) <= len(ascii_uppercase):
        what = f"{len(choices)} texts" if isinstance(choices, list) else kind_of(choices)
        raise UserError(f"column {CHOICES!r} holds {what}: expected a list of 2 to 26 texts.")
    return [as_text(choice, f"{CHOICES}[{number}]").strip() for number, choice in enumerate(choices)]


def chosen(text: str) -> str | None:
    """The letter that a text begins with, else the first that it states as its answer: a model that does not stop goes
    on to make up questions and answer them."""
    match = FIRST.match(text) or STATED.search(text)
    return match[1] if match else None


def cell(row: Row, name: str) -> str:
    """A column's text in the prompt; of the choices, a line for each."""
    if name == CHOICES and (texts := choices_of(row)):
        return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))
    return text_of(row, name)


RULES = {
    Grader.text: Rule(lambda answer, row: single_spaced(answer), "a text", single_spaced),
    Grader.number: Rule(lambda answer, row: gsm8k.extract(answer), "a number", gsm8k.extract, gsm8k.is_exact, True),
    Grader.math: Rule(
        gold=lambda answer, row: math.extract(answer) or answer.strip() or None,
        expected=r"an answer in LaTeX, alone or in \boxed{}",
        extract=math.extract,
        is_exact=math.is_exact,
        is_verified=True,
    ),
    Grader.choice: Rule(letter_of, f"a letter, or the text or the number from 0 of one in {CHOICES!r}", chosen),
}


def gold(row: Row, config: TaskConfig) -> str:
    """The gold answer of a row."""
    if config.grader == Grader.choice and row.get(CHOICES) is not None and f"{{{CHOICES}}}" not in config.prompt:
        raise UserError(f"task.prompt does not show column {CHOICES!r}: write {{{CHOICES}}} where they belong.")
    column, rule = config.answer or "answer", RULES[config.grader]
    answer = text_of(row, column, "task.answer")
    reference = rule.gold(answer, row)
    if reference is None:
        reason = f"column {column!r} holds {answer[-60:]!r}, and task.grader={config.grader} needs {rule.expected}"
        raise UserError(f"{reason}: mend the row, or choose another grader.")
    return reference


class JsonlTask(QuestionTask):
    def configured(self, config: TaskConfig) -> JsonlTask:
        rule = RULES[config.grader]
        return replace(
            self,
            question=config.question or self.question,
            gold=partial(gold, config=config),
            extract=rule.extract,
            is_exact=rule.is_exact,
            is_verified=rule.is_verified,
        )

    def check(self, config: TaskConfig) -> None:
        require(config.grader is not None, f"task.grader is missing: choose one of {', '.join(Grader)}.")
        super().check(config)


TASK = JsonlTask(
    name="jsonl",
    settings=("question", "answer", "grader"),
    question="question",
    cell=cell,
    gold=lambda row: text_of(row, "answer"),  # `configured` puts the rule of task.grader in place of these
    extract=single_spaced,
    is_exact=lambda answer, gold: answer == gold,
)
