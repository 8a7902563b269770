"""Problems that a model was trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from cera_train.common.errors import errors_at
from cera_train.data.rows import normalized
from cera_train.data.sources import open_sources
from cera_train.evaluation.tasks.task import load_problems, named_task
from cera_train.settings.data import DataConfig

ROWS_AT_ONCE = 1000
"""Rows that are searched as one text."""


def trained_on(task: str, changes: Mapping[str, Any], data: DataConfig) -> list[str]:
    """The questions of a task that stand in the training rows, in any text of a row, whatever their case and spaces.

    Args:
        task: its name in `train.tasks`.
        changes: settings of the task that differ from its file.
        data: the rows that a run trains on.
    """
    settings = named_task(task, changes)
    questions = [problem.question for problem in load_problems(settings, data)]
    sought = {question: f" {normalized(question)} " for question in questions if question.strip()}
    shared = set()
    texts = (f" {normalized(text)} " for row in _training_rows(data) for text in _texts(row))
    while chunk := "\n".join(itertools.islice(texts, ROWS_AT_ONCE)):
        shared |= {question for question, text in sought.items() if question not in shared and text in chunk}
    return [question for question in sought if question in shared]


def _training_rows(data: DataConfig) -> Iterator[Any]:
    for place, part in data.parts():
        if part.streaming:  # too many to read before a run
            continue
        with errors_at(place):
            yield from open_sources(part)[0].read()


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, also those in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
