r"""A task of your own: rows with a question and an answer, graded by one of four rules.

text: the whole answer, except for spaces. number: the last number, as GSM8K reads it. math: the
last \boxed{}, as MATH reads it. choice: the letter of a choice.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, text_of
from cera_train.evaluation.tasks import gsm8k, math
from cera_train.evaluation.tasks.task import QuestionTask
from cera_train.settings.evaluation import Grader, TaskConfig

# A and I may be words: they count as letters before no word, or before one of these.
LETTER = (
    r"([A-Z])(?!-?[\w'’])"
    r"(?:(?<![AI])|[^\w\s]|\s*(?:\n|\Z|[-–—=])|\s+(?:is|because|since|as|and|or|not|but)\b)"
)

STATED = re.compile(rf"(?i:answer)\b(?i:\s+is)?[\s:*(\[]*{LETTER}")  # The answer is (B). Answer: B

FIRST = re.compile(rf"\W*{LETTER}")
"""B. (B) Paris. B Paris. A is right. B, alone on the first line; not the X of X-ray, nor the A of
`A dog`."""


def single_spaced(text: str) -> str | None:
    return " ".join(text.split()) or None


def chosen(text: str) -> str | None:
    """The letter that a text begins with, else the first that it states as its answer: a model that
    does not stop goes on to make up questions and answer them."""
    match = FIRST.match(text) or STATED.search(text)
    return match[1] if match else None


EXTRACT = {
    Grader.text: single_spaced,
    Grader.number: gsm8k.find_number,
    Grader.math: math.find_box,
    Grader.choice: chosen,
}
IS_EXACT = {Grader.number: gsm8k.same_number, Grader.math: math.same_latex}
"""The graders of mathematics, which math-verify grades too. Other answers are equal or not."""


def gold_answer(text: str, grader: Grader, setting: str) -> str:
    """What a gold answer says. Raises UserError where the grader of a setting finds nothing."""
    match grader:
        case Grader.math:  # in a box or alone
            answer = math.find_box(text) or text.strip()
        case Grader.choice:
            answer = "".join(re.findall(r"^[A-Z]$", text.strip()))
        case _:
            answer = EXTRACT[grader](text)
    if not answer:
        raise UserError(
            f"{setting}={grader} finds no answer in {text[-60:]!r}: fix the row, or choose another "
            "grader."
        )
    return answer


def gold_of_row(row: Row, column: str, grader: Grader) -> str:
    return gold_answer(text_of(row, column, "task.answer"), grader, "task.grader")


class JsonlTask(QuestionTask):
    def configured(self, config: TaskConfig) -> JsonlTask:
        require(
            config.grader is not None, f"task.grader is missing: choose one of {', '.join(Grader)}."
        )
        return replace(
            super().configured(config),
            question=config.question or self.question,
            gold=partial(gold_of_row, column=config.answer or "answer", grader=config.grader),
        ).graded_by(config.grader)

    def graded_by(self, grader: Grader) -> JsonlTask:
        return replace(
            self,
            extract=EXTRACT[grader],
            is_exact=IS_EXACT.get(grader, self.is_exact),
            is_verified=grader in IS_EXACT,
        )


TASK = JsonlTask(
    question="question",
    # `configured` replaces the rule by that of task.grader.
    gold=partial(gold_of_row, column="answer", grader=Grader.text),
    extract=single_spaced,
)
