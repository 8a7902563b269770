"""Finds the benchmarks: the modules of this folder that set `TASK`. The module's name is the `task.kind`.

Settings import this module, so it imports a benchmark only when one is looked up.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

import cera_train.tasks
from cera_train.common.errors import UserError

if TYPE_CHECKING:
    from cera_train.tasks.task import Task


def all_tasks() -> dict[str, Task]:
    """The `Task` of every benchmark by its kind, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(cera_train.tasks.__path__))
    modules = {name: importlib.import_module(f"{cera_train.tasks.__name__}.{name}") for name in names}
    return {name: module.TASK for name, module in modules.items() if hasattr(module, "TASK")}


def find_task(kind: str) -> Task:
    """The `Task` of a `task.kind`."""
    tasks = all_tasks()  # a kind may stand in a stranger's config.yaml: nothing is imported that is not in this folder
    if kind not in tasks:
        raise UserError(f"task.kind={kind} is unknown: choose one of {', '.join(tasks)}.")
    return tasks[kind]


def display_name(task: str) -> str:
    """How people write the name of a task of conf/task/, such as MATH-500; other names stay as they are."""
    names: dict[str, str] = {}
    for kind, benchmark in all_tasks().items():
        names |= {kind: benchmark.name, **benchmark.variants}
    return names.get(task, task)
