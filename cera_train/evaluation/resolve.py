"""What an evaluation needs, checked before torch is imported: the subject, the task, its problems.

Built once by the command, and passed to every process that it starts."""

from dataclasses import dataclass

from cera_train.common.terminal import announce
from cera_train.distributed.processes import is_main_process
from cera_train.evaluation.tasks.task import AnswerTask, Task, build_task, load_problems
from cera_train.runs.evaluation_folder import Problem
from cera_train.runs.subject import Subject, find_subject
from cera_train.settings.distributed import ProcessesConfig
from cera_train.settings.evaluation import EvalConfig


@dataclass(frozen=True)
class ResolvedEvaluation:
    """A subject, and a task to measure it on."""

    config: EvalConfig
    subject: Subject
    task: Task
    problems: list[Problem]  # empty for a task that measures perplexity

    @property
    def launch(self) -> ProcessesConfig:
        return self.config.launch


def resolve_evaluation(config: EvalConfig) -> ResolvedEvaluation:
    """Builds the task, finds the subject and reads the problems. Raises UserError where one of them
    cannot be used."""
    task = build_task(config.task)
    subject = find_subject(config)
    problems = []
    if isinstance(task, AnswerTask):
        is_on_hub = config.task.path is not None and not config.task.files
        if is_on_hub and is_main_process():
            announce("reading", f"the problems of {config.task.path}")
        tokenizer = None
        if task.needs_tokenizer(subject.trained):
            from cera_train.model.folder import load_tokenizer  # torch, which other tasks spare

            tokenizer = load_tokenizer(subject.model)
        problems = load_problems(task, subject.trained, tokenizer)
    return ResolvedEvaluation(config, subject, task, problems)
