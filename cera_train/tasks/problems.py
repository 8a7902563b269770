"""The problems of a benchmark: rows -> question, prompt and gold answer."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import replace
from types import ModuleType

from cera_train.common.errors import UserError
from cera_train.data import logistic_map as logistic_map_rows
from cera_train.data.config import DataConfig, Layout, LogisticMapConfig
from cera_train.data.format import Row, column, columns_of, text_of
from cera_train.data.sources import Source, from_files, from_hub
from cera_train.tasks import gsm8k, logistic_map, math
from cera_train.tasks.config import TaskConfig, TaskKind
from cera_train.tasks.records import Problem

GRADED: dict[TaskKind, ModuleType] = {TaskKind.math: math, TaskKind.gsm8k: gsm8k}
"""Benchmarks whose answers are extracted from a text and compared with a gold answer."""


def open_task(config: TaskConfig) -> Source:
    """The rows of a task, from its files or the Hub."""
    if config.files:
        return from_files(config.files)
    return from_hub(config.path, config.subset, config.revision, config.split)


def load_problems(config: TaskConfig, data: DataConfig | None) -> list[Problem]:
    """The problems of a task, in its order.

    Args:
        data: what the run was trained on, whose evaluation rows give logistic_map its starting points.

    Raises:
        ValueError: rows are missing, or lack the columns that the task needs.
    """
    if config.kind == TaskKind.logistic_map:
        return _logistic_map_problems(config, data)
    rows = enumerate(open_task(config).read())
    if config.level is not None:
        rows = ((number, row) for number, row in rows if _level(row) == config.level)
    problems = []
    for number, row in itertools.islice(rows, config.limit):
        try:
            problems.append(_problem(row, config))
        except ValueError as error:
            raise UserError(f"{config.name} row {number}: {error}") from error
    if not problems:
        raise UserError(f"task {config.name} has no problems{f' of level {config.level}' if config.level else ''}.")
    return _with_ids_of_their_own(problems)


def _with_ids_of_their_own(problems: list[Problem]) -> list[Problem]:
    """A question that comes again gets -2, -3, ... behind its id."""
    seen, told_apart = Counter(), []
    for problem in problems:
        seen[problem.id] += 1
        count = seen[problem.id]
        told_apart.append(problem if count == 1 else replace(problem, id=f"{problem.id}-{count}"))
    return told_apart


def _problem(row: Row, config: TaskConfig) -> Problem:
    task = GRADED[config.kind]
    question = text_of(row, task.QUESTION)
    prompt = config.prompt.format_map({name: text_of(row, name) for name in columns_of(config.prompt)})
    details = {name: row[name] for name in ("level", "type", "subject") if row.get(name) is not None}
    return Problem(_id(question), question, prompt, task.gold(row), details)


def _id(question: str) -> str:
    return hashlib.blake2b(question.encode(), digest_size=6).hexdigest()


def _level(row: Row) -> int | None:
    """MATH writes "Level 5", MATH-500 5."""
    digits = re.search(r"\d+", str(column(row, "level")))
    return int(digits[0]) if digits else None


def _logistic_map_problems(config: TaskConfig, data: DataConfig | None) -> list[Problem]:
    trained_on_it = data is not None and data.layout == Layout.logistic_map
    settings = data.logistic_map if trained_on_it else LogisticMapConfig()
    starts = logistic_map_rows.starting_points(settings, data.eval_rows if trained_on_it else logistic_map.EVAL_ROWS)[1]
    cases = [(x0, replace(settings, growth=growth), {}) for x0 in starts for growth in config.growths]
    cases = cases[: config.limit]
    cases.append((logistic_map.PAPER_X0, logistic_map.PAPER_CASE, {"paper_case": True}))
    problems = []
    for x0, case, mark in cases:
        row = logistic_map_rows.problem(x0, case)
        gold = row["completion"].strip()
        details = {"growth": case.growth, "x0": x0, "decimals": case.decimals, **mark}
        problems.append(Problem(_id(row["prompt"]), row["prompt"], row["prompt"], gold, details))
    return _with_ids_of_their_own(problems)
