"""A row of a data set: its place, the text in its cells, and the segments it becomes. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cera_train.common.errors import UserError

Row = dict[str, Any]

PROMPT = "Question: {question}\nAnswer:"
"""The prompt of a computed row."""


def computed_row(question: str, answer: str) -> Row:
    return {"prompt": PROMPT.format(question=question), "completion": f" {answer}"}


def normalized(text: str) -> str:
    """A text as it counts in a search for repeats: without case, with single spaces."""
    return " ".join(text.casefold().split())


PlacedRow = tuple[str, Row]
"""A row after its place, such as `train.jsonl:17`, so that an error can name it."""


@dataclass
class Source:
    """Rows that are read only when needed."""

    fingerprint: str
    """Changes when the rows do."""
    located: Callable[[], Iterable[PlacedRow]]
    """Reads them."""
    name: str
    """The setting that chose the rows, and its value, for messages."""

    @classmethod
    def numbered(cls, fingerprint: str, rows: Iterable[Row], name: str) -> Source:
        """Rows whose places are their numbers."""
        return cls(fingerprint, lambda: ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1)), name)

    def read(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def head(self, count: int | None) -> Source:
        """The first `count` rows; None: all."""
        return self if count is None else self.between(0, count)

    def between(self, start: int, stop: int | None) -> Source:
        """The rows from number `start` to the one before `stop`; None: to the last."""
        fingerprint = f"{self.fingerprint} [{start}:{stop}]"
        return replace(self, fingerprint=fingerprint, located=lambda: itertools.islice(self.located(), start, stop))


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Puts a place before the UserErrors of what is done there."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def text_of(row: Row, name: str, setting: str = "", mend: str = "") -> str:
    """A cell as text; null is empty. Where the column is missing, the message names the setting that wants it and the
    mend."""
    cell = f"column {name!r}" + (f" (named in {setting})" if setting else "")
    if name not in row:
        raise UserError(f"{cell} is missing; its columns are {', '.join(row) or 'none'}. {mend}".rstrip())
    return as_text(row[name], cell)


def as_text(value: Any, cell: str) -> str:
    """A value as text; null is empty. Messages name it as `cell`."""
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{cell} holds {kind_of(value)}: expected text.")
    if isinstance(value, float) and not math.isfinite(value):  # some programs write NaN where a value is missing
        raise UserError(f"{cell} holds {value}: expected text, or null where there is none.")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, and no tokenizer takes it
        reason = f"half of a surrogate pair ({error.reason}): write the whole character."
        raise UserError(f"{cell} holds {text[error.start]!r}, {reason}") from None
    return text


def kind_of(value: Any) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
