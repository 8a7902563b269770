"""A task by the name of its file in conf/task, as training takes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.files import config_dir, read_yaml
from cera_train.data.rows import at
from cera_train.settings.data import DataConfig
from cera_train.settings.tasks import TaskConfig
from cera_train.tasks.registry import find_task
from cera_train.tasks.task import AnswerTask, load_problems, task_of


def named_task(name: str, changes: Mapping[str, Any]) -> TaskConfig:
    """The settings in conf/task/NAME.yaml with some changed.

    Raises:
        UserError: a change is no setting of the task, or the task has no answers to grade.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _file(name)
    if not isinstance(find_task(file["kind"]), AnswerTask):
        raise UserError(f"train.tasks=[{name}] has no answers to grade: leave it to cera-eval, after training.")
    with at(f"train.task_settings.{name}"):
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), file, dict(changes)))
        except OmegaConfBaseException as error:
            raise UserError(f"{str(error).splitlines()[0]}. See conf/task/{name}.yaml.") from error


def check_tasks(names: Iterable[str], changes_of: Callable[[str], dict[str, Any]], data: DataConfig) -> None:
    """Reads the problems that lie in local files. Raises UserError for a setting, or a row without question or answer,
    before anything heavy is imported."""
    for name in names:
        settings = named_task(name, changes_of(name))
        if settings.files:
            with at(f"train.tasks=[{name}]"):
                load_problems(settings, data)


def task_figures(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """The figures of a task by their keys in a run's result.json, and whether a higher one is better. Without changes,
    all that the task can have."""
    task = find_task(_file(name)["kind"]) if changes is None else task_of(named_task(name, changes))
    figures = task.figures if isinstance(task, AnswerTask) else {}
    return {f"{name}/{key}": is_higher_better for key, is_higher_better in figures.items()}


def _file(name: str) -> dict[str, Any]:
    return read_yaml(config_dir("conf") / "task" / f"{name}.yaml")
