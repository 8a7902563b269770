"""`cera-eval`: one evaluation of a run, or several with -m."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cera_train.cli.composition import Composition, check_trust, to_config
from cera_train.cli.start import errors_in_one_line, start_hydra
from cera_train.common.imports import heavy_imports
from cera_train.evaluation.config import EvalConfig
from cera_train.model.folder import check_model
from cera_train.runs.subject import find_subject
from cera_train.tasks.registry import find_task
from cera_train.tasks.task import AnswerTask, load_problems

EVAL = Composition(EvalConfig, "cera-eval")


def main() -> None:
    start_hydra(EVAL, "eval", evaluate)


def evaluate(composed: DictConfig) -> None:
    """One evaluation."""
    with errors_in_one_line(EVAL):
        config = to_config(composed, EvalConfig)
        check_trust(composed, HydraConfig.get().overrides.task)
        if config.run is not None:  # torch takes seconds to import: a mistake is answered before
            subject = find_subject(config)
            check_model(subject.model.path)
            if config.task.files and isinstance(find_task(config.task.kind), AnswerTask):
                load_problems(config.task, subject.run.data if subject.run else None)
        with heavy_imports():
            from cera_train.evaluation.launch import launch

        launch(config)
