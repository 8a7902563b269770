"""GSM8K: grade-school word problems whose answer is a number after #### (Cobbe et al. 2021, arXiv
2110.14168)."""

import re
from decimal import Decimal, InvalidOperation

from cera_train.common.errors import UserError
from cera_train.data.rows import Row, text_of
from cera_train.evaluation.tasks.task import QuestionTask

NUMBER = re.compile(
    r"""(?:(?<![\w.)])[-−]\$?|\$[-−]?)?  # a sign, but not the minus of 10-5
    (?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    (?:/\d+)?  # 1/2 stays a fraction: its 2 is not the answer""",
    re.VERBOSE,
)


def gold_number(row: Row) -> str:
    """The number after #### in column `answer`."""
    answer = text_of(row, "answer")
    number = find_number(answer) if "####" in answer else None
    if number is None:
        raise UserError(
            f"column 'answer' should end in #### and a number, but ends in {answer[-60:]!r}: fix "
            f"the row."
        )
    return number


def find_number(text: str) -> str | None:
    """The number after the first ####, on its line; in a text without ####, the last number. It is
    normalised. Not the last ####: a model that does not stop goes on to make up questions and
    answer them."""
    _, mark, rest = text.partition("####")
    numbers = NUMBER.findall(rest.strip().partition("\n")[0])[:1] if mark else NUMBER.findall(text)
    return plain_number(numbers[-1]) if numbers else None


def plain_number(number: str) -> str:
    """Removes currency, thousands separators, percent and a full stop at the end."""
    return re.sub(r"[\s,$%]", "", number).rstrip(".").replace("−", "-")


def same_number(answer: str, gold: str) -> bool:
    """Whether two numbers are equal: 18 and 18.0 are, 1/2 and 0.5 are not."""
    answer = plain_number(answer)
    gold = plain_number(gold)
    try:
        return Decimal(answer) == Decimal(gold)
    except InvalidOperation:
        return answer == gold


TASK = QuestionTask(
    question="question", gold=gold_number, extract=find_number, is_exact=same_number
)
