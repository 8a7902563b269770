r"""MATH: competition problems whose answer is the last \boxed{} of the solution.

The exact rule is the published one: the content of the last box, balanced, equal after a light normalisation of its
LaTeX. It knows notation, not mathematics: 1/2 is \frac12, but not 0.5.
"""

from __future__ import annotations

import re

from cera_train.data.format import Row, text_of

QUESTION = "problem"
"""The column with the question."""

BOX = re.compile(r"\\(?:boxed|fbox)\b\s*")
UNIT = r"\\(?:text|textbf|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?"

RULES = [
    (r"\\[!,;:]|(?<!\\)\\ |\\q?quad\b|~|\s", ""),  # spaces
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r"\\[td]frac", r"\\frac"),
    (r"\^\{?\\circ\}?|\\degree|°", ""),
    (r"\\?[$%]", ""),
    (rf"(?<=.){UNIT}$", ""),  # a unit at the end
    (r"^\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}$", r"\1"),
    (r"^[a-zA-Z]{1,2}=", ""),  # x=
    (r"\{,\}", ","),
    (r"\.$", ""),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"\\frac(\w)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
    (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
]
"""What is replaced, in this order."""

THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


def gold(row: Row) -> str:
    r"""The column `answer` where there is one (MATH-500), else the last box of `solution`.

    Raises:
        ValueError: the row has neither.
    """
    if row.get("answer") is not None:
        return text_of(row, "answer")
    answer = extract(text_of(row, "solution"))
    if answer is None:
        raise ValueError(r"the solution has no \boxed{...} with the answer.")
    return answer


def extract(text: str) -> str | None:
    r"""The content of the last \boxed{}; None where there is no box, or the last one is cut off."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):  # \boxed 3
        word = re.match(r"[^\s$]+", rest)
        return word[0] if word else None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ is a brace of the answer, not of LaTeX
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] == "}":
            return rest[1 : mark.start()].strip()
    return None


def normalize(answer: str) -> str:
    """The answer in one way of writing it."""
    for pattern, replacement in RULES:
        answer = re.sub(pattern, replacement, answer)
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer


def is_exact(answer: str, gold: str) -> bool:
    """Whether two answers are written alike."""
    return normalize(answer) == normalize(gold)
