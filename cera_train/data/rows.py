"""A row of a data set, its place and the text in its cells; and the rows of files. Nothing here
imports torch.

The readers of `datasets` change rows: 42 beside 0.5 becomes 42.0, 2026-01-01 a date, a missing
column null. The tokens of a row would then depend on the rows around it.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import infer_compression

from cera_train.common.errors import UserError, errors_as, errors_at
from cera_train.common.files import sha256_of
from cera_train.common.settings import require

Row = dict[str, Any]

PROMPT = "Question: {question}\nAnswer:"  # the prompt of a computed row


def computed_row(question: str, answer: str) -> Row:
    return {"prompt": PROMPT.format(question=question), "completion": f" {answer}"}


def normalized(text: str) -> str:
    """A text normalised to find repeats: lower case, single spaces."""
    return " ".join(text.casefold().split())


# A row after its place, such as `train.jsonl:17`, so that an error can name it.
PlacedRow = tuple[str, Row]


@dataclass
class Source:
    """Rows that are read only when needed."""

    fingerprint: str  # changes when the rows do
    located: Callable[[], Iterable[PlacedRow]]  # reads them
    name: str  # the setting that chose the rows, and its value, for messages
    is_text: bool = False  # whether a .txt file is among its files

    @classmethod
    def numbered(cls, fingerprint: str, rows: Iterable[Row], name: str) -> Source:
        """Rows whose places are their numbers."""
        return cls(
            fingerprint,
            lambda: ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1)),
            name,
        )

    def __iter__(self) -> Iterator[PlacedRow]:
        return iter(self.located())

    def first(self, count: int | None) -> Source:
        """The first rows; None: all."""
        if count is None:
            return self
        fingerprint = f"{self.fingerprint} [0:{count}]"
        return replace(self, fingerprint=fingerprint, located=lambda: itertools.islice(self, count))


def cell_of(row: Row, name: str, fix: str) -> Any:
    """The value of a column. Raises UserError if it is missing."""
    if name not in row:
        raise UserError(
            f"column {name!r} is missing; its columns are {', '.join(row) or 'none'}.{fix}"
        )
    return row[name]


def text_of(row: Row, name: str, setting: str | None = None) -> str:
    """The text of a column that a setting names; null is empty."""
    fix = f" Name another in {setting}." if setting else ""
    return as_text(cell_of(row, name, fix), f"column {name!r}")


def as_text(value: Any, cell: str) -> str:
    """A value as text; null is empty. Messages name it as `cell`."""
    # Some programs write NaN for a missing value.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{cell} holds {kind_of(value)}: expected text.")
    # No tokenizer accepts half of a surrogate pair, as of an emoji that was cut.
    return str(value).encode(errors="replace").decode()


def kind_of(value: Any) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- rows of files --------------------------------------------------------------------------------


def from_files(names: Sequence[str], setting: str, whole_text: bool = False) -> Source:
    """The rows of files, one file after the other. Messages name `setting`, the key that names the
    files. `whole_text` reads a .txt file as one row."""
    paths = check_files(names, setting)
    title = f"{setting}=[{','.join(names[:3])}{',...' if len(names) > 3 else ''}]"
    return Source(
        " ".join(map(sha256_of, paths)),
        lambda: rows_of(paths, whole_text),
        title,
        is_text=".txt" in map(suffix_of, paths),
    )


def rows_of(paths: Iterable[str], whole_text: bool = False) -> Iterator[PlacedRow]:
    """The rows of files, one file after the other."""
    readers = READERS | {".txt": _read_text} if whole_text else READERS
    for path in paths:
        with errors_as(f"{path}: cannot read it", "Fix it, or write it again as UTF-8."):
            yield from readers[suffix_of(path)](path)


def suffix_of(path: str) -> str:
    """The suffix that chooses the reader: .jsonl of rows.jsonl.gz."""
    name = Path(path.lower())
    return Path(name.stem if infer_compression(path) else name).suffix


def check_files(names: Sequence[str], setting: str) -> list[str]:
    """The files of these names; a name with a * stands for all files that match. Opens none: a pipe
    would wait for a writer."""
    paths = []
    for name in names:
        with errors_at(f"{setting}={name}"):
            paths += _matching_files(name)
    return paths


def _matching_files(name: str) -> list[str]:
    # fsspec knows protocols that run programs, such as one that renders a stranger's template.
    require(
        "://" not in name and "::" not in name,
        "files of this machine are read, by their paths: copy it here first, or set data.path to a "
        "data set on the Hub.",
    )
    path = os.path.expanduser(name)
    paths = sorted(glob.glob(path)) if "*" in name else [path]
    with errors_as("cannot read the file", "Name one that is there."):
        for path in paths:
            os.stat(path)
    require(bool(paths), f"no file matches this pattern (from {Path.cwd()}).")
    suffixes = ", ".join(READERS)
    for path in paths:
        require(
            suffix_of(path) in READERS,
            f"unknown kind of file: expected {suffixes}, such as 'folder/*.jsonl'. Convert it, or "
            "rename it.",
        )
    return paths


def _open(path: str) -> Any:
    """The bytes of a file, decompressed."""
    return fsspec.open(path, "rb", compression="infer")


# --- one reader for each kind of file -------------------------------------------------------------


def _read_jsonl(path: str) -> Iterator[PlacedRow]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parse_json(line.rstrip(), path, number)
                if not isinstance(row, dict):
                    fix = "A row is a JSON object; a list of rows is .json."
                    raise UserError(
                        f"{path}:{number}: expected a row's columns, got {kind_of(row)}. {fix}"
                    )
                yield f"{path}:{number}", row


def _read_json(path: str) -> Iterator[PlacedRow]:
    with _open(path) as file:
        text = file.read()
    rows = _parse_json(text, path, 1) if text.strip() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path}: expected a JSON list of objects. One row a line is .jsonl: rename the file."
        )
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _read_csv(path: str) -> Iterator[PlacedRow]:
    """Columns by the first line; every cell is text."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        rows = csv.DictReader(
            text, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True
        )
        try:
            for row in rows:
                # DictReader marks an extra cell by the key None, a missing one by the value None.
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}:{rows.line_num}: more or fewer cells than columns: quote commas."
                    )
                yield f"{path}:{rows.line_num}", row
        except csv.Error as error:
            raise UserError(
                f"{path}:{rows.reader.line_num}: {error}. Write a quote in a quoted cell twice."
            ) from error


def _read_parquet(path: str) -> Iterator[PlacedRow]:
    import pyarrow.parquet

    numbers = itertools.count(1)
    with _open(path) as file:
        # As Python objects, rows take many times as much memory: read a thousand at a time.
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                yield f"{path}, row {next(numbers)}", row


def _read_text(path: str) -> Iterator[PlacedRow]:
    """One row of one column, `text`."""
    with _open(path) as file:
        yield path, {"text": file.read().decode("utf-8-sig")}


def _read_documents(path: str) -> Iterator[PlacedRow]:
    """Rows of one column, `text`. Blank lines separate them; in a file without blank lines every
    line is a row."""
    [(_, row)] = _read_text(path)
    text = row["text"].replace("\r\n", "\n").strip("\n")
    blank_lines = re.compile(r"\n\s*\n")
    documents = blank_lines.split(text) if blank_lines.search(text.strip()) else text.split("\n")
    for number, document in enumerate(filter(str.strip, documents), start=1):
        yield f"{path}, row {number}", {"text": document}


READERS: dict[str, Callable[[str], Iterator[PlacedRow]]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
    ".txt": _read_documents,
}


def _parse_json(text: bytes, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # Also bytes that are not UTF-8, thousands of digits, deeply nested lists.
        line = first_line + getattr(error, "lineno", 1) - 1
        fix = "One row a line is .jsonl, a list of rows .json; both are UTF-8."
        raise UserError(f"{path}:{line}: broken JSON: {error}. {fix}") from error
