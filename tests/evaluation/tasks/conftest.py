"""A task on rows of a test's own."""

import pytest

from cera_train.evaluation.tasks.task import build_task
from cera_train.settings.evaluation import TaskConfig


@pytest.fixture
def task_of(write_jsonl):
    """task_of(rows, "gsm8k", ...) -> the task of this kind on a file of these rows."""

    def task_of(rows, kind, **settings):
        fixed = {"kind": kind, "name": kind, "prompt": "Question: {question}"}
        files = [str(write_jsonl("rows.jsonl", rows))]
        return build_task(TaskConfig(files=files, **fixed | settings))

    return task_of
