"""Where rows come from: the Hub, local files, or a generator. A row is a dict of columns, as its author wrote it."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.data import logistic_map
from cera_train.data.config import DataConfig, Layout

Row = dict[str, Any]


@dataclass
class Source:
    """Rows that are read only when needed."""

    fingerprint: str
    """Changes when the rows do."""
    read: Callable[[], Iterable[Row]]


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the evaluation rows of a config, cut to `train_rows` and `eval_rows`.

    Raises:
        ValueError: a file or data set is missing, unreadable or of an unknown kind.
    """
    if config.layout == Layout.logistic_map:
        train, evaluation = logistic_map.problems(config.logistic_map, config.eval_rows)
        sources = Source(json.dumps(train), lambda: train), Source(json.dumps(evaluation), lambda: evaluation)
    elif config.train_files and not config.eval_files:
        sources = _held_out(from_files(config.train_files), config.eval_rows)
    elif config.train_files:
        sources = from_files(config.train_files), from_files(config.eval_files)
    else:
        hub = (config.path, config.subset, config.revision)
        sources = from_hub(*hub, config.train_split), from_hub(*hub, config.eval_split)
    return head(sources[0], config.train_rows), head(sources[1], config.eval_rows)


def head(source: Source, count: int | None) -> Source:
    """The first rows; None: all."""
    if count is None:
        return source
    return Source(f"{source.fingerprint} [:{count}]", lambda: itertools.islice(source.read(), count))


def _held_out(source: Source, eval_rows: int) -> tuple[Source, Source]:
    """The last `eval_rows` rows evaluate, the others train. They are read once for both, and only the last are kept."""
    held_out: list[Row] = []

    def training() -> Iterator[Row]:
        last, count = collections.deque(), 0
        for count, row in enumerate(source.read(), start=1):
            last.append(row)
            if count > eval_rows:
                yield last.popleft()
        if count <= eval_rows:
            raise UserError(
                f"data.eval_rows={eval_rows} leaves nothing to train on: data.train_files has {count} rows."
            )
        held_out[:] = last

    def evaluation() -> list[Row]:
        if not held_out:  # nobody read the training rows to their end
            collections.deque(training(), maxlen=0)
        return held_out

    return (
        Source(f"{source.fingerprint} [:-{eval_rows}]", training),
        Source(f"{source.fingerprint} [-{eval_rows}:]", evaluation),
    )


# --- local files -----------------------------------------------------------------------------------------------------


def from_files(names: list[str]) -> Source:
    """The rows of local files, one after the other.

    Raises:
        ValueError: a file is missing, unreadable or of an unknown kind.
    """
    paths = [Path(name) for name in names]
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix not in READERS:
            raise UserError(f"data file {path} is of an unknown kind: expected {', '.join(READERS)}.")
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read data file {path} (from {Path.cwd()}): {error.strerror}.") from error
    return Source(digest.hexdigest(), lambda: (row for path in paths for row in READERS[path.suffix](path)))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _as_row(_parse(line.rstrip(), path, number), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_bytes()
    rows = _parse(text, path, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}. One row a line is .jsonl.")
    for number, row in enumerate(rows):
        yield _as_row(row, f"{path}, row {number}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    for batch in table.to_batches(max_chunksize=1000):  # as Python's objects, rows take many times as much memory
        yield from batch.to_pylist()


def _read_text(path: Path) -> Iterator[Row]:
    try:
        yield {"text": path.read_text("utf-8")}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,  # one row of one column, `text`
}


def _parse(text: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        line, reason = text.count(b"\n", 0, error.start), f"not UTF-8: {error.reason}"
    except json.JSONDecodeError as error:
        line, reason = error.lineno - 1, f"broken JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        line, reason = 0, f"unusable JSON: {error}"
    raise UserError(f"{path}:{first_line + line}: {reason}.")


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with a row's columns, got {type(value).__name__}.")
    return value


# --- the Hub ---------------------------------------------------------------------------------------------------------


def from_hub(path: str, subset: str | None, revision: str | None, split: str) -> Source:
    """One split of a data set on the Hub.

    Raises:
        ValueError: it cannot be found, reached or read.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(path, subset, split=split, revision=revision)
    # HfHubHTTPError and ConnectionError are OSErrors; a data set that is a Python script is a RuntimeError.
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError) as error:
        raise UserError(
            f"cannot load data set {path!r} from the Hub ({str(error).splitlines()[0]}). Log in with "
            "`hf auth login` if it is gated, or set data.train_files and data.eval_files (cera-eval: task.files) to "
            "local files."
        ) from error
    return Source(f"{path} {split} {dataset._fingerprint}", lambda: dataset)
