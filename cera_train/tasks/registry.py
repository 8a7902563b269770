"""Finds the benchmarks: the modules of this folder that set `TASK`. The module's name is the `task.kind`.

Settings import this module, so it names no class of theirs and imports a benchmark only when one is looked up.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import cera_train.tasks
from cera_train.common.errors import UserError


def all_tasks() -> dict[str, Any]:
    """The `Task` of every benchmark by its kind, in alphabetical order."""
    modules = {name: _module(name) for name in _module_names()}
    return {name: module.TASK for name, module in sorted(modules.items()) if hasattr(module, "TASK")}


def find_task(kind: str) -> Any:
    """The `Task` of a `task.kind`.

    Raises:
        UserError: no module of this folder has that name, or it is no benchmark.
    """
    # A kind may stand in a stranger's config.yaml: nothing is imported that is not in this folder.
    task = getattr(_module(kind), "TASK", None) if kind in _module_names() else None
    if task is None:
        raise UserError(f"task.kind={kind} is unknown: choose one of {', '.join(all_tasks())}.")
    return task


def display_name(task: str) -> str:
    """How people write the name of a task of conf/task/, such as MATH-500; other names stay as they are."""
    names: dict[str, str] = {}
    for kind, benchmark in all_tasks().items():
        names |= {kind: benchmark.name, **benchmark.variants}
    return names.get(task, task)


def _module_names() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(cera_train.tasks.__path__))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{cera_train.tasks.__name__}.{name}")
