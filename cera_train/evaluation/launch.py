"""An evaluation in one process a GPU."""

from __future__ import annotations

from typing import Any

from cera_train.distributed.launch import in_processes
from cera_train.evaluation.evaluate import evaluate, problems_of, resolve, rows_of
from cera_train.evaluation.tasks.task import AnswerTask, task_of
from cera_train.runs.evaluation_folder import EvaluationFolder
from cera_train.settings.evaluation import EvalConfig


def launch(config: EvalConfig) -> dict[str, Any]:
    """`evaluate`, in as many processes as `launch.processes` says."""
    return in_processes(evaluate, config, prepare)


def prepare(config: EvalConfig) -> dict[str, Any] | None:
    """Checks the folder and reads the problems or rows, once for all processes; evaluates here where no model is
    needed: answers are graded again, or the evaluation is finished."""
    if config.grade is None:
        resolved, subject, path = resolve(config)
        with EvaluationFolder(path) as folder:
            folder.write_config(resolved)
            if not folder.is_finished():
                read = problems_of if isinstance(task_of(config.task), AnswerTask) else rows_of
                read(resolved, subject)
                return None
    return evaluate(config)
