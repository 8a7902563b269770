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


class LocatedRow(dict):
    """A row that knows its place, such as `train.jsonl:17`, so that an error can name it."""

    __slots__ = ("place",)

    def __init__(self, columns: Row, place: str) -> None:
        super().__init__(columns)
        self.place = place


@dataclass
class Source:
    """Rows that are read only when needed."""

    fingerprint: str
    """Changes when the rows do."""
    read: Callable[[], Iterable[Row]]
    name: str
    """The setting that chose the rows, and its value, for messages."""

    def head(self, count: int | None) -> Source:
        """The first `count` rows; None: all."""
        if count is None:
            return self
        fingerprint = f"{self.fingerprint} [:{count}]"
        return replace(self, fingerprint=fingerprint, read=lambda: itertools.islice(self.read(), count))

    def tail(self, start: int) -> Source:
        """The rows after the first `start`."""
        fingerprint = f"{self.fingerprint} [{start}:]"
        return replace(self, fingerprint=fingerprint, read=lambda: itertools.islice(self.read(), start, None))

    def located(self) -> Iterator[tuple[str, Row]]:
        """Each row after its place: in its file, else by its number."""
        for number, row in enumerate(self.read(), start=1):
            yield row.place if isinstance(row, LocatedRow) else f"{self.name}, row {number}", row


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
