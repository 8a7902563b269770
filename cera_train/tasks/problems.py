"""The problems of a benchmark, checked and with an id each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from cera_train.common.errors import UserError
from cera_train.tasks.config import TaskConfig
from cera_train.tasks.reading import rows_place
from cera_train.tasks.records import Problem
from cera_train.tasks.registry import find_task

if TYPE_CHECKING:
    from cera_train.data.config import DataConfig


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
