"""Rows of files on this machine, or wherever fsspec reaches: s3://..., hf://..., https://.... A row knows the file and
line it stands in. Nothing here imports torch.

The readers of `datasets` give other rows than a file holds: of a column with 42 and 0.5 they make 42.0, of 2026-01-01 a
date, of a missing column null. The tokens of a row would depend on the rows around it.
"""

import collections
import csv
import glob
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from cera_train.common.errors import UserError, words_of
from cera_train.data.rows import PlacedRow, Row, Source, at, kind_of

COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")

STORAGES = ("s3", "gs", "az", "hf", "https", "http")
"""Where files are read from but this machine. fsspec knows more, such as one that renders templates of a stranger's."""


def from_files(names: Sequence[str], setting: str = "files") -> Source:
    """The rows of files, one file after the other. Messages name `setting`, the key that names the files."""
    paths = check_files(names, setting)
    title = f"{setting}=[{','.join(names[:3])}{',...' if len(names) > 3 else ''}]"
    return Source(" ".join(map(_content_digest, paths)), lambda: rows_of(paths), title)


def rows_of(paths: Iterable[str]) -> Iterator[PlacedRow]:
    """The rows of files, one file after the other."""
    for path in paths:
        try:
            yield from READERS[suffix_of(path)](path)
        except UserError:
            raise
        except Exception as error:  # each storage and each compression raises its own
            raise UserError(f"{path}: cannot read it: {words_of(error)}.") from error


def suffix_of(path: str) -> str:
    """The suffix that chooses the reader: .jsonl of rows.jsonl.gz."""
    name = path.lower()
    return Path(name.removesuffix(Path(name).suffix) if name.endswith(COMPRESSED) else name).suffix


def check_files(names: Sequence[str], setting: str) -> list[str]:
    """The files of these names; a name with a * stands for all files that match. Opens none of this machine: a pipe
    would wait for a writer, and a device may never end."""
    paths = []
    for name in names:
        with at(f"{setting}={name}"):
            paths += _check_name(name)
    return paths


def _check_name(name: str) -> list[str]:
    import fsspec

    if not name.strip():
        raise UserError("an empty name: write the name of a file.")
    is_local, storage = "://" not in name, name.partition("://")[0]
    if "::" in name or not (is_local or storage in STORAGES):
        storages = ", ".join(f"{storage}://" for storage in STORAGES)
        raise UserError(f"files are read from this machine and {storages}: copy it to one of these.")
    try:
        system = fsspec.filesystem("file" if is_local else storage)
        paths = [os.path.expanduser(name) if is_local else name]
        if "*" in name:
            paths = glob.glob(paths[0]) if is_local else map(system.unstrip_protocol, system.glob(name))
        kinds = {path: system.info(path)["type"] for path in sorted(paths)}
    except Exception as error:  # each storage raises its own
        place = f" (from {Path.cwd()})" if is_local else ""
        raise UserError(f"cannot read the file: {words_of(error)}{place}. Name one that is there.") from error
    for path, kind in kinds.items():
        if kind == "directory":
            raise UserError(f"it is a folder: name the files in it, such as {os.path.join(path, '*.jsonl')}.")
        if kind != "file":
            raise UserError("it is a pipe, a socket or a device: rows are read more than once, write them to a file.")
        if suffix_of(path) not in READERS:
            raise UserError(f"unknown kind of file: expected {', '.join(READERS)}. Convert it, or rename it.")
    if not kinds:
        raise UserError(f"no file matches this pattern (from {Path.cwd()}).")
    return list(kinds)


def _content_digest(path: str) -> str:
    """Changes when the content does. A storage elsewhere knows the size and the version of its files."""
    if "://" in path:
        import fsspec

        return str(fsspec.filesystem(path.partition("://")[0]).info(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: str) -> AbstractContextManager[BinaryIO]:
    """The bytes of a file, decompressed."""
    if "://" not in path and not path.lower().endswith(COMPRESSED):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb", compression="infer")


# --- one reader for each kind of file --------------------------------------------------------------------------------


def _read_jsonl(path: str) -> Iterator[PlacedRow]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parse(line.rstrip(), path, number)
                mend = " A list of rows is .json: rename the file." if isinstance(row, list) else ""
                yield f"{path}:{number}", _as_row(row, f"{path}:{number}", mend)


def _read_json(path: str) -> Iterator[PlacedRow]:
    with _open(path) as file:
        text = file.read()
    rows = _parse(text, path, 1) if text.strip() else []
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        mend = f"Write the list in {lists[0]!r} alone." if lists else "One row a line is .jsonl: rename the file."
        raise UserError(f"{path}: expected a JSON list of rows, got {kind_of(rows)}. {mend}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _as_row(row, f"{path}, row {number}")


def _read_csv(path: str) -> Iterator[PlacedRow]:
    """Columns by the first line; every cell is text."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            for cells in filter(None, reader):
                place = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise UserError(f"{place}: {len(cells)} cells, and {len(header)} columns: quote cells with commas.")
                with at(place):
                    yield place, _unique(zip(header, cells, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error.reason}. Convert it with iconv -t UTF-8.") from error
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}. Write a quote in a quoted cell twice.") from error


def _read_parquet(path: str) -> Iterator[PlacedRow]:
    import pyarrow.parquet

    numbers = itertools.count(1)
    with _open(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _unique((name, "") for name in table.schema_arrow.names)
            # As Python's objects, rows take many times as much memory: a thousand at a time.
            for batch in table.iter_batches(1000):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(numbers)}", row
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            # ValueError: text that is not UTF-8, or a date that Python has no object for.
            reason = str(error).strip().splitlines()[0].rstrip(".")
            mend = "Write or download it again: it may be cut off."
            raise UserError(f"{path}: not a readable parquet file: {reason}. {mend}") from error


def _read_text(path: str) -> Iterator[PlacedRow]:
    """One row of one column, `text`."""
    with _open(path) as file:
        content = file.read()
    try:
        yield path, {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8: {error.reason} at byte {error.start}"
        raise UserError(f"{path}:{line}: {reason}. Convert it with iconv -t UTF-8.") from error


READERS: dict[str, Callable[[str], Iterable[PlacedRow]]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of keys and values. Of a key that stands twice, json would keep the last in silence."""
    pairs = list(pairs)
    columns = dict(pairs)
    if len(columns) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"{name!r} stands twice in {str(pairs)[:60]}: remove or rename one.")
    return columns


def _parse(text: bytes, path: str, first_line: int) -> Any:
    """The value of a JSON text."""
    line, mend = 0, "Mend this line."
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except UserError as error:
        raise UserError(f"{path}{'' if suffix_of(path) == '.json' else f':{first_line}'}: {error}") from error
    except UnicodeDecodeError as error:
        line, reason = text.count(b"\n", 0, error.start), f"not UTF-8: {error.reason}"
        mend = "Write it as UTF-8, such as with iconv -t UTF-8."
    except json.JSONDecodeError as error:
        line, reason = error.lineno - 1, f"broken JSON: {error.msg} (column {error.colno})"
        if suffix_of(path) == ".json" and error.msg == "Extra data":
            mend = "One row a line is .jsonl: rename the file."
        elif suffix_of(path) != ".json" and text.strip() in (b"{", b"[", b"[{"):
            mend = "A row must stand on one line; a list of rows is .json."
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        reason = f"unusable JSON: {error}"
    raise UserError(f"{path}:{first_line + line}: {reason}. {mend}")


def _as_row(value: Any, place: str, mend: str = "") -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object with a row's columns, got {kind_of(value)}.{mend}")
    return value
