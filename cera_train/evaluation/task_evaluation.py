"""A model in training answers problems, for the accuracy on tasks of cera-eval and for samples to
read.

Problems, answers, grades and figures are those of cera-eval, greedy. Answering draws no random
number and restores the model, so the losses of a run are equal to the bit with and without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.utils import gather_object

from cera_train.common.errors import errors_at
from cera_train.common.settings import require
from cera_train.common.terminal import counted
from cera_train.evaluation.engine import Sampler
from cera_train.evaluation.grading import grade_all
from cera_train.evaluation.requests import Request, requests_for
from cera_train.evaluation.tasks.task import (
    AnswerTask,
    load_problems,
    mean,
    training_task,
)
from cera_train.runs.evaluation_folder import Generation, Grade, Problem
from cera_train.runs.results import GradedProblem, Sample, describe_tasks
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config

GREEDY = GenerationConfig()


@dataclass(frozen=True)
class TaskEvaluation:
    """Problems that the model answers."""

    name: str  # the task's
    task: AnswerTask
    problems: list[Problem]
    requests: list[Request]
    max_new_tokens: int
    stop: list[str]

    def __str__(self) -> str:
        return f"{len(self.problems):,} problems of {self.name}"

    def first(self, count: int) -> TaskEvaluation:
        """The evaluation of the first problems."""
        return replace(self, problems=self.problems[:count], requests=self.requests[:count])

    def figures(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Figures by their keys in metrics.jsonl, from one answer to each problem."""
        figures = {
            grader: mean([getattr(grade, grader) for grade in grades])
            for grader in self.task.graders
        }
        figures |= self.task.scores(self.problems, grades)
        return {
            f"{self.name}/{key}": value
            for key, value in figures.items()
            if isinstance(value, float)
        }

    def samples(
        self, update: int, answers: Sequence[Generation], grades: Sequence[Grade]
    ) -> list[Sample]:
        """Samples of these answers, to read."""
        return [
            Sample(update, self.name, problem.prompt, answer.text, problem.gold, grade.exact)
            for problem, answer, grade in zip(self.problems, answers, grades, strict=True)
        ]


def evaluations_of(config: Config, tokenizer: Any, positions: int | None) -> list[TaskEvaluation]:
    """The evaluations of `train.tasks`. Raises UserError for a task without a problem, and for
    samples without a task.

    Args:
        positions: of the model; None: without a limit.
    """
    tasks = []
    for name in config.train.tasks:
        with errors_at(f"train.tasks=[{name}]"):
            task = training_task(name, config.train.changes_of_task(name))
            problems = load_problems(task, config.data, tokenizer)
            room = task.config.max_new_tokens
            requests = requests_for(problems, 1, tokenizer, room, positions)
            tasks.append(TaskEvaluation(name, task, problems, requests, room, task.config.stop))
    count = config.train.samples
    require(
        not count or bool(tasks) or not config.learns_answers,  # GRPO samples answers of its own
        f"train.samples={count} are answers to train.tasks: set train.tasks=[held_out].",
    )
    return tasks


@dataclass
class TaskResults:
    """What the evaluations at one update found. Only the main process has more than the figures."""

    figures: dict[str, float] = field(default_factory=dict)
    """Figures by their keys in metrics.jsonl, such as gsm8k/exact."""
    graded: dict[str, list[GradedProblem]] = field(default_factory=dict)
    """Grades by the task."""
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines to print."""


class TaskEvaluations:
    """The evaluations of a run. Processes divide the answers, and the main process grades them."""

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.every = config.train.tasks_every
        self.sample_count = config.train.samples
        self.sampler = sampler
        self.accelerator = sampler.accelerator
        self.evaluations = evaluations_of(config, sampler.tokenizer, sampler.engine.positions)
        self.sampled = [
            each.first(self.sample_count) for each in self.evaluations if self.sample_count
        ]

    @property
    def plan(self) -> str:
        """What is answered and when, in one line; empty without tasks."""
        when = "at the end"
        if self.every:
            when = f"at the start, every {self.every:,} updates and {when}"
        parts = [
            f"{evaluation}, up to {evaluation.max_new_tokens:,} tokens each, {when}"
            for evaluation in self.evaluations
        ]
        if self.sampled:
            count = sum(len(evaluation.problems) for evaluation in self.sampled)
            parts.append(f"{counted(count, 'sample')} at each evaluation")
        return "; ".join(parts)

    def run(self, update: int, is_last: bool, show_work: Callable[[str], None]) -> TaskResults:
        """Answers the tasks where they are due at this update, else the problems of the samples
        alone.

        Args:
            show_work: shows what is answered next.
        """
        results = TaskResults()
        started = time.perf_counter()
        is_due = is_last or (self.every is not None and update % self.every == 0)
        if self.evaluations and is_due:
            for evaluation in self.evaluations:
                show_work(f"answers {evaluation}")
                self._run_task(evaluation, update, results)
        elif self.sampled:
            show_work(f"answers {counted(self.sample_count, 'sample')}")
            for evaluation in self.sampled:
                self._run_samples(evaluation, update, results)
            seconds = time.perf_counter() - started
            results.notes.append(f"{counted(len(results.samples), 'sample')} in {seconds:.1f} s")
        [results.figures, *_] = gather_object([results.figures])  # the main process's
        return results

    def _run_task(self, evaluation: TaskEvaluation, update: int, results: TaskResults) -> None:
        """Answers and grades all problems of a task. Its samples are the first of these answers."""
        started = time.perf_counter()
        answers = self.answer(evaluation)
        if not self.accelerator.is_main_process:
            return
        task = evaluation.task
        grades = grade_all(task, evaluation.problems, answers)
        figures = evaluation.figures(grades)
        results.figures |= figures
        results.graded[evaluation.name] = [
            GradedProblem(grade.problem, grade.value, grade.ending) for grade in grades
        ]
        results.samples += evaluation.samples(update, answers, grades)[: self.sample_count]
        seconds = time.perf_counter() - started
        results.notes.append(f"{describe_tasks(figures)} ({evaluation} in {seconds:.1f} s)")

    def _run_samples(self, evaluation: TaskEvaluation, update: int, results: TaskResults) -> None:
        answers = self.answer(evaluation)
        grades = list(map(evaluation.task.grade, evaluation.problems, answers))
        results.samples += evaluation.samples(update, answers, grades)

    def answer(self, evaluation: TaskEvaluation) -> list[Generation]:
        """An answer to each problem, in their order."""
        answers = self.sampler.answer(
            evaluation.requests, evaluation.max_new_tokens, evaluation.stop, GREEDY
        )
        return [answer.generation for answer in answers]
