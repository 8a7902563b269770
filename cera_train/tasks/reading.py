"""The rows of a benchmark, each with its place, which an error names first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cera_train.common.errors import UserError
from cera_train.data.sources import Row, from_files, from_hub
from cera_train.tasks.config import TaskConfig


def read_rows(config: TaskConfig) -> Iterator[tuple[str, Row]]:
    """Rows of `task.files`, or of the data set on the Hub, each after its place.

    Raises:
        UserError: a file or data set is missing, unreadable or of an unknown kind.
    """
    if config.files:
        sources = [(name, from_files([name])) for name in config.files]
    else:
        hub = from_hub(config.path, config.subset, config.revision, config.split)
        sources = [(f"{config.path}, split {config.split}", hub)]
    for name, source in sources:
        for number, row in enumerate(source.read(), start=1):
            yield f"{name}, row {number}", row


def rows_place(config: TaskConfig) -> str:
    """The setting that names a task's rows, for messages about all of them."""
    return f"task.files=[{','.join(config.files)}]" if config.files else f"task.path={config.path}"


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Puts a place before the error of what is done there."""
    try:
        yield
    except ValueError as error:  # also a UnicodeEncodeError of half a surrogate pair, which no tokenizer takes
        raise UserError(f"{place}: {error}") from error
