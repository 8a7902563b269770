"""GSM8K: grade-school word problems whose answer is a number after #### (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from cera_train.common.errors import UserError

if TYPE_CHECKING:
    from cera_train.data.format import Row

QUESTION = "question"
"""The column with the question. The gold answer is in `answer`."""

NUMBER = re.compile(
    r"""(?:(?<![\w.)])[-−]\$?|\$[-−]?)?  # a sign, but not the minus of 10-5
    (?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    (?:/\d+)?  # 1/2 stays a fraction: its 2 is not the answer""",
    re.VERBOSE,
)


def gold(row: Row) -> str:
    """The number after #### in column `answer`.

    Raises:
        ValueError: the column is missing, or has no such number.
    """
    from cera_train.data.format import text_of  # not in the processes that verify: it takes a second

    answer = text_of(row, "answer")
    number = extract(answer) if "####" in answer else None
    if number is None:
        raise UserError(f"column 'answer' should end in #### and a number, and ends in {answer[-60:]!r}.")
    return number


def extract(text: str) -> str | None:
    """The number after the first ####, on its line; in a text without ####, the last number. None where there is none.

    The first, since a model that does not stop goes on with questions of its own. The number comes normalised.
    """
    _, mark, rest = text.partition("####")
    if mark:
        number = NUMBER.search(rest.strip().partition("\n")[0])
        return normalize(number[0]) if number else None
    numbers = NUMBER.findall(text)
    return normalize(numbers[-1]) if numbers else None


def normalize(number: str) -> str:
    """Without currency, thousands separators, percent and a full stop at the end."""
    return re.sub(r"[\s,$%]", "", number).rstrip(".").replace("−", "-")


def is_exact(answer: str, gold: str) -> bool:
    """Whether two numbers are equal: 18 and 18.0 are, 1/2 and 0.5 are not."""
    answer, gold = normalize(answer), normalize(gold)
    try:
        return Decimal(answer) == Decimal(gold)
    except InvalidOperation:
        return answer == gold
