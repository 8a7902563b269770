"""Accuracy and samples while a run trains: the tasks of cera-eval on their first problems, and
answers to read.

Problems, answers, grades and scores are those of an evaluation, greedy. Answering draws no random
number and restores the model, so the losses of a run are equal to the bit with and without it.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.utils import gather_object

from cera_train.common.errors import errors_at
from cera_train.common.settings import require
from cera_train.common.terminal import counted
from cera_train.data.prepare import encode
from cera_train.data.sources import answered_rows
from cera_train.evaluation.engine import Sampler
from cera_train.evaluation.grading import grade_all, score
from cera_train.evaluation.requests import Request, requests_for
from cera_train.evaluation.tasks.task import (
    AnswerTask,
    load_problems,
    question_id,
    training_task,
)
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.runs.results import GradedProblem, Sample, describe_tasks
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config

# tokens that a sampled answer to an evaluation row may have; more where a reference has more
SAMPLE_ROOM = 64


@dataclass(frozen=True)
class Exam:
    """Problems that the model answers."""

    name: str | None  # the task's. The prompts of evaluation rows have no task.
    task: AnswerTask | None
    problems: list[Problem]
    requests: list[Request]
    max_new_tokens: int
    stop: list[str]

    def __str__(self) -> str:
        return f"{len(self.problems):,} problems of {self.name}"


def rows_exam(config: DataConfig, count: int, tokenizer: Any, positions: int | None) -> Exam:
    """The prompts of the first evaluation rows that have one, each up to its first answer, which is
    the reference; none that leaves a sample no room."""
    problems = []
    requests = []
    room = SAMPLE_ROOM
    longest = sys.maxsize if positions is None else positions - SAMPLE_ROOM
    for part, prompt, answer in answered_rows(config, tokenizer):
        text = "".join(segment.text for segment in prompt)
        whole = replace(part, max_length=sys.maxsize)
        [encoded_prompt, encoded_answer] = encode([prompt, [answer]], whole, tokenizer)
        if len(encoded_prompt.input_ids) > longest:
            continue
        problems.append(
            Problem(f"{question_id(text)}-{len(problems)}", text, text, answer.text.strip())
        )
        requests.append(Request(problems[-1].id, 0, tuple(encoded_prompt.input_ids)))
        room = max(room, len(encoded_answer.input_ids))
        if len(problems) == count:
            break
    if positions is not None:
        room = min(
            room, positions - max((len(request.prompt_ids) for request in requests), default=0)
        )
    return Exam(None, None, problems, requests, room, [])


@dataclass
class ExamResults:
    """The results of one evaluation's exams. Only the main process has more than the figures."""

    figures: dict[str, float] = field(
        default_factory=dict
    )  # by their keys in metrics.jsonl, such as gsm8k/exact
    graded: dict[str, list[GradedProblem]] = field(default_factory=dict)  # by the task
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # A line to print about each


class Exams:
    """The exams of a run. Processes divide the answers, and the main process grades them."""

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.every = config.train.tasks_every
        self.sampler = sampler
        self.accelerator = sampler.accelerator
        tokenizer = sampler.tokenizer
        positions = sampler.engine.positions
        self.tasks: list[Exam] = []
        for name in config.train.tasks:
            with errors_at(f"train.tasks=[{name}]"):
                task = training_task(name, config.train.changes_of_task(name))
                problems = load_problems(task, config.data)
                room = task.config.max_new_tokens
                requests = requests_for(problems, 1, tokenizer, room, positions)
                self.tasks.append(Exam(name, task, problems, requests, room, task.config.stop))
        self.sampled: list[Exam] = []
        if count := config.train.samples:
            exams = self.tasks or [rows_exam(config.data, count, tokenizer, positions)]
            fix = "no evaluation row has a prompt with room for an answer: set train.samples=0"
            require(bool(exams[0].problems), f"train.samples={count}: {fix}.")
            self.sampled = [
                replace(exam, problems=exam.problems[:count], requests=exam.requests[:count])
                for exam in exams
            ]

    @property
    def plan(self) -> str:
        """What is answered and when, in one line; empty without tasks and samples."""
        when = (
            f"at the start, every {self.every:,} updates and at the end"
            if self.every
            else "at the end"
        )
        parts = [
            f"{exam}, up to {exam.max_new_tokens:,} tokens each, {when}" for exam in self.tasks
        ]
        if self.sampled:
            count = sum(len(exam.problems) for exam in self.sampled)
            parts.append(f"{counted(count, 'sample')} at each evaluation")
        return "; ".join(parts)

    def take(self, update: int, is_last: bool) -> ExamResults:
        """Answers the tasks that are due at this update, and the samples."""
        results = ExamResults()
        is_due = is_last or (self.every is not None and update % self.every == 0)
        for exam in self.tasks if is_due else []:
            started = time.perf_counter()
            answers = self.answer(exam)
            if self.accelerator.is_main_process:
                grades = grade_all(exam.task, exam.problems, answers)
                scores = score(exam.task, exam.problems, answers, grades).to_json()
                figures = {
                    f"{exam.name}/{key}": scores.get(key, scores.get(f"{key}/pass@1"))
                    for key in exam.task.figures
                }
                results.figures |= figures
                results.graded[exam.name] = [
                    GradedProblem(
                        grade.problem, exam.task.paired_value(grade, grade.grader), grade.ending
                    )
                    for grade in grades
                ]
                seconds = time.perf_counter() - started
                results.notes.append(f"{describe_tasks(figures)} ({exam} in {seconds:.1f} s)")
        started = time.perf_counter()
        for exam in self.sampled:
            for problem, answer in zip(exam.problems, self.answer(exam), strict=True):
                exact = exam.task.grade(problem, answer).exact if exam.task else None
                results.samples.append(
                    Sample(update, exam.name, problem.prompt, answer.text, problem.gold, exact)
                )
        if results.samples:
            seconds = time.perf_counter() - started
            results.notes.append(f"{counted(len(results.samples), 'sample')} in {seconds:.1f} s")
        [results.figures, *_] = gather_object([results.figures])  # the main process's
        return results

    def answer(self, exam: Exam) -> list[Generation]:
        """An answer to each problem, in their order."""
        answers = self.sampler.answer(
            exam.requests, exam.max_new_tokens, exam.stop, GenerationConfig()
        )
        return [answer.generation for answer in answers]
