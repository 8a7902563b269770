"""The rows of a benchmark, each with its place, and its problems, each with an id."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cera_train.common.errors import UserError
from cera_train.data.config import DataConfig
from cera_train.data.files import from_files
from cera_train.data.rows import Row, place_of
from cera_train.data.sources import from_hub
from cera_train.tasks.config import TaskConfig
from cera_train.tasks.records import Problem
from cera_train.tasks.registry import find_task


def load_problems(config: TaskConfig, data: DataConfig | None) -> list[Problem]:
    """The problems of a task, in its order.

    Args:
        data: the rows that the run was trained on.

    Raises:
        UserError: there are no rows, or they lack the columns that the task needs.
    """
    problems = _with_unique_ids(find_task(config.kind).problems(config, data))
    if not problems:
        place = rows_place(config)
        if config.level is not None:
            raise UserError(f"task.level={config.level}: {place} has no problems of that level. Choose another.")
        raise UserError(f"{place} has no rows: name a file with a problem on each row.")
    return problems


def _with_unique_ids(problems: Iterable[Problem]) -> list[Problem]:
    """A question that comes again gets -2, -3, ... after its id."""
    seen, unique = Counter(), []
    for problem in problems:
        seen[problem.id] += 1
        count = seen[problem.id]
        unique.append(problem if count == 1 else replace(problem, id=f"{problem.id}-{count}"))
    return unique


def read_rows(config: TaskConfig) -> Iterator[tuple[str, Row]]:
    """Rows of `task.files`, or of the data set on the Hub, each after its place.

    Raises:
        UserError: a file or data set is missing, unreadable or of an unknown kind.
    """
    if config.files:
        sources = [(name, from_files([name], "task.files")) for name in config.files]
    else:
        hub = from_hub(config.path, config.subset, config.revision, config.split)
        sources = [(f"{config.path}, split {config.split}", hub)]
    for name, source in sources:
        for number, row in enumerate(source.read(), start=1):
            yield place_of(row, f"{name}, row {number}"), row


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
