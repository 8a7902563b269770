"""GSM8K: grade-school word problems whose answer is a number, written after ####."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from cera_train.data.format import Row, text_of

QUESTION = "question"
"""The column with the question."""

NUMBER = re.compile(r"-?\$?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def gold(row: Row) -> str:
    """The number after #### in the column `answer`.

    Raises:
        ValueError: there is none.
    """
    answer = text_of(row, "answer")
    _, mark, number = answer.partition("####")
    if not mark or not NUMBER.search(number):
        raise ValueError(f"the answer {answer[-60:]!r} does not end in #### and a number.")
    return normalize(number)


def extract(text: str) -> str | None:
    """The number after the first ####, else the last number of the text; None where there is no number."""
    _, mark, rest = text.partition("####")
    if mark:
        found = NUMBER.search(rest.split("\n")[0])
        return normalize(found[0]) if found else None
    numbers = NUMBER.findall(text)
    return normalize(numbers[-1]) if numbers else None


def normalize(number: str) -> str:
    """Without currency, thousands separators, percent and a full stop at the end."""
    return re.sub(r"[\s,$%]", "", number).rstrip(".")


def is_exact(answer: str, gold: str) -> bool:
    """Whether two numbers are equal: 18 and 18.0 are."""
    try:
        return Decimal(normalize(answer)) == Decimal(normalize(gold))
    except InvalidOperation:
        return normalize(answer) == normalize(gold)
