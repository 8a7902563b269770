"""Rows of local files. A row knows the file and line it stands in. Nothing here imports torch."""

import collections
import glob
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError, words_of
from cera_train.data.rows import LocatedRow, Source, at, kind_of

DECOMPRESSORS = {".gz": "gunzip", ".zip": "unzip", ".zst": "zstd -d", ".xz": "unxz", ".bz2": "bunzip2"}
CONVERSIONS = {suffix: f"decompress it with {program}" for suffix, program in DECOMPRESSORS.items()} | {
    ".csv": "convert it with pandas.read_csv(file).to_json('rows.jsonl', orient='records', lines=True)",
    ".tsv": "convert it with pandas.read_csv(file, sep='\\t').to_json('rows.jsonl', orient='records', lines=True)",
    ".arrow": "convert it with datasets.Dataset.from_file(file).to_json('rows.jsonl')",
    ".ndjson": "rename it to .jsonl",
}
"""How to turn a file of an unknown kind into one that is read."""

OTHER_CONTENT = {
    b"\x1f\x8b": "It is compressed: decompress it with gunzip.",
    b"PK\x03\x04": "It is a zip archive: decompress it with unzip.",
    b"PAR1": "It is a parquet file: rename it to .parquet.",
    b"version https://git-lfs": "It is a Git LFS pointer: get the file with git lfs pull.",
    b"<": "It is a web page or XML: download the file itself.",
    b"\xff\xfe": "It is UTF-16: convert it with iconv -f UTF-16 -t UTF-8.",
    b"\xfe\xff": "It is UTF-16: convert it with iconv -f UTF-16 -t UTF-8.",
}
"""First bytes of a file that is not JSON, and the mend."""


def from_files(names: Sequence[str], setting: str = "files") -> Source:
    """The rows of local files, one file after the other. Messages name `setting`, the key that names the files."""
    paths = check_files(names, setting)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Source(digest.hexdigest(), lambda: rows_of(paths), name_of(paths, setting))


def rows_of(paths: Sequence[Path]) -> Iterator[LocatedRow]:
    """The rows of files, one file after the other."""
    return (row for path in paths for row in READERS[path.suffix.lower()](path))


def name_of(paths: Sequence[Path], setting: str) -> str:
    """Files as a message names them: the first three."""
    return f"{setting}=[{','.join(map(str, paths[:3]))}{',...' if len(paths) > 3 else ''}]"


def check_files(names: Sequence[str], setting: str) -> list[Path]:
    """The files of these names. Opens none: a pipe would wait for a writer, and a device may never end."""
    for name in names:
        with at(f"{setting}={name}"):
            _check_file(name)
    return list(map(Path, names))


def _check_file(name: str) -> None:
    path = Path(name)
    kind = path.suffix.lower()
    if not name.strip():
        raise UserError("an empty name: write the name of a file.")
    if "://" in name:
        raise UserError("only local files are read: download it first.")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a ValueError: the name holds a zero byte
        raise UserError(f"cannot read the file: {words_of(error)} (from {Path.cwd()}). {_other_name(path)}") from error
    if stat.S_ISDIR(mode):
        files = _data_files(path)
        mend = f"such as {path / files[0]}" if files else f"and it holds none of {', '.join(READERS)}"
        raise UserError(f"it is a folder: name the files in it, {mend}.")
    if not stat.S_ISREG(mode):
        special = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise UserError(f"it is a {special}: rows are read more than once, write them to a file.")
    if kind not in READERS:
        mend = CONVERSIONS.get(kind, "convert it, or rename it if its content is one of these")
        raise UserError(f"unknown kind of file: expected {', '.join(READERS)}; {mend}.")
    if not os.access(path, os.R_OK):
        raise UserError("cannot read the file: Permission denied. Run chmod +r on it, or copy it.")


def _other_name(path: Path) -> str:
    """What the user may have meant by the name of a missing file."""
    name = str(path)
    if name.startswith("~"):
        return f"A ~ is not expanded here: write {path.expanduser()}."
    if "$" in name:
        return "Variables are not expanded inside single quotes."
    if glob.has_magic(name):
        found = sorted(glob.glob(name))[:3]
        files = f", such as [{','.join(found)}]" if found else "; nothing matches this one"
        return f"Patterns are not expanded: name the files{files}."
    try:
        return f"Its folder has {', '.join(_data_files(path.parent)[:5]) or 'no data files'}."
    except OSError:
        return "Its folder does not exist or cannot be read."


def _data_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in READERS)


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row, duplicates = _parse(line.rstrip(), path, number)
                mend = " A list of rows is .json: rename the file." if isinstance(row, list) else ""
                yield _located(row, f"{path}:{number}", duplicates, mend)


def _read_json(path: Path) -> Iterator[LocatedRow]:
    text = path.read_bytes()
    rows, duplicates = _parse(text, path, 1) if text.strip() else ([], [])
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        mend = f"Write the list in {lists[0]!r} alone." if lists else "One row a line is .jsonl: rename the file."
        raise UserError(f"{path}: expected a JSON list of rows, got {kind_of(rows)}. {mend}")
    for number, row in enumerate(rows, start=1):
        yield _located(row, f"{path}, row {number}", duplicates)


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow.parquet

    numbers = itertools.count(1)
    try:
        table = pyarrow.parquet.read_table(path)
        # As Python's objects, rows take many times as much memory: a thousand at a time.
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                yield LocatedRow(row, f"{path}, row {next(numbers)}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # ValueError: text that is not UTF-8, or a date that Python has no object for.
        reason = str(error).strip().splitlines()[0].rstrip(".")
        mend = "Write or download it again: it may be cut off." if path.stat().st_size else "The file is empty."
        raise UserError(f"{path}: not a readable parquet file: {reason}. {mend}") from error


def _read_text(path: Path) -> Iterator[LocatedRow]:
    try:
        yield LocatedRow({"text": path.read_text("utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        mend = _mend_of_content(path) or "Convert it with iconv -t UTF-8."
        raise UserError(f"{path}:{line}: not UTF-8: {error.reason} at byte {error.start}. {mend}") from error


READERS: dict[str, Callable[[Path], Iterable[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,  # one row of one column, `text`
}

Duplicate = tuple[str, dict[str, Any]]
"""A key that stands twice in an object, and the object."""


def _parse(text: bytes, path: Path, first_line: int) -> tuple[Any, list[Duplicate]]:
    """The value of a JSON text, and its keys that stand twice in one object: json would keep the last in silence."""
    duplicates: list[Duplicate] = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
            duplicates.append((name, made))
        return made

    line, mend = 0, "Mend this line."
    try:
        return json.loads(text, object_pairs_hook=as_object), duplicates
    except UnicodeDecodeError as error:
        line, reason = text.count(b"\n", 0, error.start), f"not UTF-8: {error.reason}"
        mend = "Write it as UTF-8, such as with iconv -t UTF-8."
    except json.JSONDecodeError as error:
        line, reason = error.lineno - 1, f"broken JSON: {error.msg} (column {error.colno})"
        if path.suffix.lower() == ".json" and error.msg == "Extra data":
            mend = "One row a line is .jsonl: rename the file."
        if path.suffix.lower() == ".jsonl" and text.strip() in (b"{", b"[", b"[{"):
            mend = "A row must stand on one line; a list of rows is .json."
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        reason = f"unusable JSON: {error}"
    raise UserError(f"{path}:{first_line + line}: {reason}. {_mend_of_content(path) or mend}")


def _mend_of_content(path: Path) -> str | None:
    """The mend for a file whose first bytes show that it is of another kind."""
    with path.open("rb") as file:
        start = file.read(32)
    return next((mend for signature, mend in OTHER_CONTENT.items() if start.startswith(signature)), None)


def _located(value: Any, place: str, duplicates: list[Duplicate], mend: str = "") -> LocatedRow:
    for name, holder in duplicates:
        if _holds(value, holder):
            raise UserError(f"{place}: key {name!r} stands twice in one object: remove or rename one.")
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object with a row's columns, got {kind_of(value)}.{mend}")
    return LocatedRow(value, place)


def _holds(value: Any, wanted: dict[str, Any]) -> bool:
    """Whether `wanted` itself is `value` or lies in it. A loop: values may be nested deeper than calls may be."""
    left = [value]
    while left:
        value = left.pop()
        if value is wanted:
            return True
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return False
