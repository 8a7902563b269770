"""A row of a data set: its columns, the place it was read from, the text in its cells, and the segments it becomes.
Nothing here imports torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cera_train.common.errors import UserError

Row = dict[str, Any]


class LocatedRow(dict):
    """A row that knows its place, such as `train.jsonl:17`, so that an error can name it."""

    __slots__ = ("place",)

    def __init__(self, columns: Row, place: str) -> None:
        super().__init__(columns)
        self.place = place


def place_of(row: Row, otherwise: str) -> str:
    """The row's place in its file; `otherwise` for a row that was not read from a file."""
    return row.place if isinstance(row, LocatedRow) else otherwise


@dataclass
class Segment:
    """A stretch of text. A supervised one ends with the end token."""

    text: str
    supervised: bool

    def __post_init__(self) -> None:
        check_unicode(self.text, "the text")  # a chat template can show more of a message than its role and content


@dataclass
class Source:
    """Rows that are read only when needed."""

    fingerprint: str
    """Changes when the rows do."""
    read: Callable[[], Iterable[Row]]
    name: str = "these rows"
    """The setting that chose the rows, and its value, for messages."""


def head(source: Source, count: int | None) -> Source:
    """The first rows; None: all."""
    if count is None:
        return source
    fingerprint = f"{source.fingerprint} [:{count}]"
    return Source(fingerprint, lambda: itertools.islice(source.read(), count), source.name)


# --- cells -----------------------------------------------------------------------------------------------------------


def column(row: Row, name: str, setting: str | None = None, mend: str = "") -> Any:
    """A cell of a row.

    Args:
        setting: the key that names the column, for the message.
        mend: what to do where the column is missing.

    Raises:
        UserError: the row has no such column.
    """
    if not isinstance(row, dict):
        raise UserError(f"{_cell(name, setting)} is missing: expected an object, got {kind_of(row)}.")
    if name not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(f"{_cell(name, setting)} is missing; its columns are {columns}.{mend and f' {mend}'}")
    return row[name]


def text_of(row: Row, name: str, setting: str | None = None, mend: str = "") -> str:
    """A cell as text; null is empty.

    Raises:
        UserError: the row has no such column, or its cell holds no text.
    """
    return as_text(column(row, name, setting, mend), _cell(name, setting))


def as_text(value: Any, cell: str) -> str:
    """A value as text; null is empty.

    Args:
        cell: where the value stands, for the message.
    """
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"{cell} holds {kind_of(value)}: expected text.")
    if isinstance(value, float) and not math.isfinite(value):  # some programs write NaN where a value is missing
        raise UserError(f"{cell} holds {value}: expected text, or null where there is none.")
    text = "" if value is None else str(value)
    check_unicode(text, cell)
    return text


def check_unicode(text: str, cell: str) -> None:
    """Refuses half of a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(
            f"{cell} holds {half!r}, half of a surrogate pair ({error.reason}): write the whole character."
        ) from None


def list_of(row: Row, name: str) -> list[Row]:
    """A cell with a list of turns; null is empty."""
    value = column(row, name)
    if value is not None and not isinstance(value, list):
        mend = " Write the list itself, not a JSON text of it." if isinstance(value, str) else ""
        raise UserError(f"column {name!r} holds {kind_of(value)}: expected a list of turns.{mend}")
    return value or []


def kind_of(value: Any) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _cell(name: str, setting: str | None) -> str:
    return f"column {name!r}" + (f" (named in {setting})" if setting else "")
