"""Where rows come from: the Hub, local files, or a generator. A row is a dict of columns, as its author wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cera_train.config import DataConfig, Layout
from cera_train.tasks import logistic_map

Row = dict[str, Any]

DEFAULT_GENERATED_EVAL_ROWS = 20


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
        train, evaluation = logistic_map.problems(config.logistic_map, config.eval_rows or DEFAULT_GENERATED_EVAL_ROWS)
        settings = json.dumps(asdict(config.logistic_map))
        sources = Source(f"train {settings}", lambda: train), Source(f"eval {settings}", lambda: evaluation)
    elif config.train_files and not config.eval_files:
        return _held_out(_from_files(config.train_files), config.train_rows, config.eval_rows)
    elif config.train_files:
        sources = _from_files(config.train_files), _from_files(config.eval_files)
    else:
        sources = _from_hub(config, config.train_split), _from_hub(config, config.eval_split)
    return _head(sources[0], config.train_rows), _head(sources[1], config.eval_rows)


def _head(source: Source, count: int | None) -> Source:
    if count is None:
        return source
    return Source(f"{source.fingerprint} [:{count}]", lambda: [row for _, row in zip(range(count), source.read())])


def _held_out(source: Source, train_rows: int | None, eval_rows: int) -> tuple[Source, Source]:
    """The last `eval_rows` rows evaluate, the first `train_rows` of the others train."""
    rows = list(source.read())
    if eval_rows >= len(rows):
        raise ValueError(
            f"data.eval_rows={eval_rows} leaves nothing to train on: data.train_files has {len(rows)} rows."
        )
    train = Source(f"{source.fingerprint} [:-{eval_rows}]", lambda: rows[:-eval_rows])
    return _head(train, train_rows), Source(f"{source.fingerprint} [-{eval_rows}:]", lambda: rows[-eval_rows:])


# --- local files -----------------------------------------------------------------------------------------------------


def _from_files(names: list[str]) -> Source:
    paths = [Path(name) for name in names]
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise ValueError(f"data file {path} does not exist (looked in {Path.cwd()}).")
        if path.suffix not in READERS:
            raise ValueError(f"data file {path} is of an unknown kind: expected {', '.join(READERS)}.")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Source(digest.hexdigest(), lambda: (row for path in paths for row in READERS[path.suffix](path)))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _as_row(_parse(line, path, number), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    if not path.read_bytes().strip():
        return
    rows = _parse(path.read_bytes(), path, 1)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}. One row a line is .jsonl.")
    for number, row in enumerate(rows):
        yield _as_row(row, f"{path}, row {number}")


def _read_parquet(path: Path) -> Iterable[Row]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse(text: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{first_line + error.lineno - 1}: broken JSON: {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{first_line}: not UTF-8: {error.reason}.") from None
    except RecursionError:
        raise ValueError(f"{path}:{first_line}: broken JSON: nested too deep.") from None


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object with a row's columns, got {type(value).__name__}.")
    return value


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _from_hub(config: DataConfig, split: str) -> Source:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=split, revision=config.revision)
    except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, OSError, ConnectionError) as error:
        raise ValueError(
            f"cannot load data set {config.path!r} from the Hub ({str(error).splitlines()[0]}). Log in with "
            "`hf auth login` if it is gated, or set data.train_files and data.eval_files to local files."
        ) from error
    return Source(f"{config.path} {split} {dataset._fingerprint}", lambda: dataset)
