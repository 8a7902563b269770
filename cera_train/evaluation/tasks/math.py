r"""MATH: competition problems whose answer is the last \boxed{} of the solution.

The exact rule follows the published one (Hendrycks et al. 2021, arXiv 2103.03874): two answers are
equal when a light normalisation writes them alike. It knows notation, not mathematics: 1/2 equals
\frac12, but not 0.5. Beyond the published rule it reads thousands separators, mixed numbers such as
1 1/2, and a fraction's arguments as TeX does.
"""

import re

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, text_of
from cera_train.evaluation.tasks.task import QuestionTask

BOXED = re.compile(r"\\boxed(?![a-zA-Z])\s*")
FBOX = re.compile(r"\\fbox(?![a-zA-Z])\s*")

TEXT = r"\\(?:text|textbf|mbox|mathrm)(?!\{[ie]\})"
WORD = re.compile(rf"^{TEXT}\{{([^{{}}]*)\}}\Z")
GROUP = r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"

RULES = (
    (r"(?<!\\)\\!", ""),
    (r"(?:(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z]))|~|\s)+", " "),
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r"\\[tdc]frac", r"\\frac"),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree|°", ""),
    (r"\\?[$%]", ""),
    # The lookbehind keeps a long row of dots from being searched from each dot.
    (r"(?<![ .])[ .]+$|^ +", ""),
    (rf"(?<=[\w)}}\]! ]) ?{TEXT}\{{[^{{}}]*\}}(?: ?\^ ?(?:\d|\{{\d\}}))?$", ""),  # a unit
    (r"^[a-zA-Z]{1,2} ?= ?(?=[^=]*$)", ""),  # x = 5
    (r"\{,\}", ","),
    (r"^-?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?$", lambda number: re.sub("[, ]", "", number[0])),
    (r", *", ", "),  # so that math-verify takes 1,234 for a number and 1, 234 for a list
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"^(-?)(\d+) ?/ ?(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^(-?\d+) (\d+) ?/ ?(\d+)$", r"\1\\frac{\2}{\3}"),
    # spaces, except in \pi r, 1 000 and after a list's comma
    (r"(\\[a-zA-Z]+ (?=[a-zA-Z])|\d (?=\d)|, )| ", r"\1"),
    (r"\\sqrt ?(\w)", r"\\sqrt{\1}"),
    (r"\\frac ?(\w) ?", r"\\frac{\1}"),
    (rf"(\\frac{GROUP}) ?(\w)", r"\1{\2}"),
)
"""Replacements, in this order."""


def gold_latex(row: Row) -> str:
    """The reference answer: column `answer` where there is one (MATH-500), in a box or alone, else
    the last box of column `solution`."""
    if row.get("answer") is not None:
        cell = text_of(row, "answer")
        require(bool(cell.strip()), "column 'answer' is empty: fix the row.")
        return find_box(cell) or cell.strip()
    solution = text_of(row, "solution")
    answer = find_box(solution)
    if answer is None:
        raise UserError(
            rf"column 'solution' has no \boxed{{...}} with the answer; it ends in "
            rf"{solution[-60:]!r}: fix the row."
        )
    return answer


def find_box(text: str) -> str | None:
    r"""The content of the last \boxed{}, else of the last \fbox{}; None where that is empty or cut
    off. A box without braces, as in `$\boxed 3$`, ends with the formula or the line."""
    boxes = [*BOXED.finditer(text)] or [*FBOX.finditer(text)]
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):
        return re.match(r"[^$\n]*", rest)[0].strip() or None
    depth = 0
    # \{ is a brace of the answer, not of LaTeX.
    for mark in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] == "}":
            return rest[1 : mark.start()].strip() or None
    return None


def plain_latex(answer: str) -> str:
    """Writes equal answers alike, still in LaTeX."""
    for pattern, replacement in RULES:
        answer = re.sub(pattern, replacement, answer)
    return answer


def same_latex(answer: str, gold: str) -> bool:
    r"""Whether two answers are the same after normalisation, and \text{even} the same as even.
    `plain_latex` leaves the former, since math-verify would read the latter as a product of
    variables."""
    answer, gold = (WORD.sub(r"\1", plain_latex(text)) for text in (answer, gold))
    return answer == gold


TASK = QuestionTask(
    question="problem",
    gold=gold_latex,
    extract=find_box,
    is_exact=same_latex,
)
