"""A row of a data set: its place and the text in its cells. Nothing here imports torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from cera_train.common.errors import UserError

Row = dict[str, Any]

PROMPT = "Question: {question}\nAnswer:"  # the prompt of a computed row


def computed_row(question: str, answer: str) -> Row:
    return {"prompt": PROMPT.format(question=question), "completion": f" {answer}"}


def normalized(text: str) -> str:
    """A text as it counts in a search for repeats: without case, with single spaces."""
    return " ".join(text.casefold().split())


PlacedRow = tuple[str, Row]  # A row after its place, such as `train.jsonl:17`, so that an error can name it


@dataclass
class Source:
    """Rows that are read only when needed."""

    fingerprint: str  # changes when the rows do
    located: Callable[[], Iterable[PlacedRow]]  # reads them
    name: str  # the setting that chose the rows, and its value, for messages

    @classmethod
    def numbered(cls, fingerprint: str, rows: Iterable[Row], name: str) -> Source:
        """Rows whose places are their numbers."""
        return cls(fingerprint, lambda: ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1)), name)

    def first(self, count: int | None) -> Source:
        """The first rows; None: all."""
        if count is None:
            return self
        fingerprint = f"{self.fingerprint} [0:{count}]"
        return replace(self, fingerprint=fingerprint, located=lambda: itertools.islice(self.located(), count))


def cell_of(row: Row, name: str, mend: str) -> Any:
    """The value of a column. Raises UserError where it is missing."""
    if name not in row:
        raise UserError(f"column {name!r} is missing; its columns are {', '.join(row) or 'none'}.{mend}")
    return row[name]


def text_of(row: Row, name: str, setting: str | None = None) -> str:
    """The text of a column that a setting names; null is empty."""
    mend = f" Name another in {setting}." if setting else ""
    return as_text(cell_of(row, name, mend), f"column {name!r}")


def as_text(value: Any, cell: str) -> str:
    """A value as text; null is empty. Messages name it as `cell`."""
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{cell} holds {kind_of(value)}: expected text.")
    if isinstance(value, float) and not math.isfinite(value):  # some programs write NaN where a value is missing
        raise UserError(f"{cell} holds {value}: expected text, or null where there is none.")
    text = str(value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):  # no tokenizer takes it
        raise UserError(f"{cell} holds half of a surrogate pair: write the whole character.")
    return text


def kind_of(value: Any) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
