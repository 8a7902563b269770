"""What a benchmark defines, and how its settings become a task. A module of this folder that sets
`TASK` is a `task.kind`.

A `QuestionTask` compares an answer with a gold answer; an `AnswerTask` brings its problems and its
grading; any other `Task` measures perplexity. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import operator
import pkgutil
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cera_train.evaluation.tasks
from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import config_dir, options, read_yaml
from cera_train.common.settings import flatten, require
from cera_train.data.chats import columns_of
from cera_train.data.reader import Question
from cera_train.data.rows import Row, Source, from_files, normalized, text_of
from cera_train.data.sources import from_hub, open_sources
from cera_train.runs.evaluation_folder import CHAT, Generation, Grade, Problem
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import TaskConfig
from cera_train.settings.values import checked


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark. `build_task` configures the `TASK` of its file."""

    config: TaskConfig | None = None  # None before it is configured

    def configured(self, config: TaskConfig) -> Task:
        """This task with its settings. Raises UserError for settings that it cannot use. Imports no
        torch."""
        return replace(self, config=config)


@dataclass(frozen=True, kw_only=True)
class AnswerTask(Task, ABC):
    """A benchmark of problems whose answers are generated and graded."""

    is_verified: bool = True  # whether math-verify grades the answers too

    @property
    def graders(self) -> tuple[str, ...]:
        return ("exact", "verified") if self.is_verified else ("exact",)

    @abstractmethod
    def problems(self, data: DataConfig | None, tokenizer: Any) -> Iterable[Problem]:
        """The problems, in order, at most `config.limit`.

        Args:
            data: what the run was trained on; None: unknown.
            tokenizer: of the model that answers, whose chat template may write the prompts.
        """

    @abstractmethod
    def grade(self, problem: Problem, generation: Generation) -> Grade:
        """Grades one answer by the task's published rule. May score its parts, and name the ending
        of a wrong answer."""

    def scores(self, problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
        """What result.json holds beside pass@k. A float is a share: a run records it while it
        trains, and a report shows it."""
        return {}

    def lines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Labels and texts of what `scores` returned, to print."""
        return {}


@dataclass(frozen=True, kw_only=True)
class QuestionTask(AnswerTask):
    """A benchmark whose rows hold a question and a gold answer."""

    has_files: bool = True
    """Whether its rows are those of `task.files`, or of a data set on the Hub."""
    question: str
    """The column with the question."""
    gold: Callable[[Row], str]
    """Finds the gold answer of a row, or raises UserError."""
    extract: Callable[[str], str | None]
    """Finds the answer in a generated text; None where there is none."""
    is_exact: Callable[[str, str], bool] = operator.eq
    """Whether an answer equals the gold answer by the published rule."""

    def configured(self, config: TaskConfig) -> Task:
        if self.has_files:
            require_rows(config)
        example = f"$'task.prompt=\"Question: {{{self.question}}}\\nAnswer:\"'"
        require(
            bool(config.prompt and columns_of(config.prompt, "task.prompt")),
            f"task.prompt={config.prompt!r} names no column: write one in braces, such as "
            f"{example}.",
        )
        return super().configured(config)

    def problems(self, data: DataConfig | None, tokenizer: Any) -> list[Problem]:
        source = open_rows(self.config)
        problems = list(itertools.islice(self._read(source), self.config.limit))
        level = "" if self.config.level is None else f" of task.level={self.config.level}"
        require(
            bool(problems),
            f"{source.name} has no rows{level}: name a file with a problem on each row.",
        )
        return problems

    def _read(self, source: Source) -> Iterator[Problem]:
        config = self.config
        columns = columns_of(config.prompt)
        for place, row in source:
            with errors_at(place):
                if config.level is not None and level_of(row) != str(config.level):
                    continue
                question = text_of(row, self.question, "task.question of task=jsonl")
                prompt = config.prompt.format_map(
                    {name: text_of(row, name, "task.prompt") for name in columns}
                )
                gold = self.gold(row)
            yield Problem(question_id(question), question, prompt, gold)

    def grade(self, problem: Problem, generation: Generation) -> Grade:
        answer = None
        exact = False
        failure = None
        try:
            answer = self.extract(generation.text)
            exact = answer is not None and self.is_exact(answer, problem.gold)
        except Exception as error:  # whatever a model may write must not end an evaluation of hours
            failure = f"crash: {type(error).__name__}: {error}"
        return Grade(generation.problem, generation.sample, answer, exact, failure=failure)


# --- what benchmarks share ------------------------------------------------------------------------


def level_of(row: Row) -> str | None:
    """The number in column `level`: MATH writes "Level 5", MATH-500 writes 5."""
    number = re.search(r"\d+", text_of(row, "level"))
    return number and number[0]


def fields_of_prompt(question: Question) -> dict[str, Any]:
    """The fields by which a problem is asked as a row of the run."""
    fields: dict[str, Any] = {"prompt": question.prompt, "prompt_ids": question.prompt_ids}
    return fields | ({CHAT: True} if question.is_chat else {})


def question_id(question: str) -> str:
    """A digest of a question: its id in every evaluation."""
    return hashlib.blake2b(question.encode(), digest_size=6).hexdigest()


def require_rows(config: TaskConfig) -> None:
    """Raises UserError where neither files nor a data set are named."""
    require(
        bool(config.path or config.files),
        "task.files is empty: name local files, or a Hub data set in task.path.",
    )


def open_rows(config: TaskConfig) -> Source:
    """The rows of `task.files`, or of the data set on the Hub."""
    if config.files:
        return from_files(config.files, "task.files", whole_text=True)
    return from_hub(config, "task.split")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- from settings to a task ----------------------------------------------------------------------


def build_task(config: TaskConfig) -> Task:
    """The task of these settings. Raises UserError for a setting that it cannot use."""
    package = cera_train.evaluation.tasks
    kinds = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"task"}
    # config.yaml may come from a stranger: only modules of this folder are imported
    require(
        config.kind in kinds,
        f"task.kind={config.kind} is unknown: choose one of {', '.join(sorted(kinds))}.",
    )
    task = importlib.import_module(f"{package.__name__}.{config.kind}").TASK
    return task.configured(config)


def load_problems(
    task: AnswerTask, data: DataConfig | None = None, tokenizer: Any = None
) -> list[Problem]:
    """The problems of a task, in its order. A question that comes again gets -2, -3, ... after its
    id. The arguments are those of `AnswerTask.problems`."""
    seen = Counter()
    problems = []
    for problem in task.problems(data, tokenizer):
        seen[problem.id] += 1
        count = seen[problem.id]
        problems.append(problem if count == 1 else problem.replace(id=f"{problem.id}-{count}"))
    require(
        bool(problems),
        f"task={task.config.name} has no problems: the run holds out no row with a prompt and an "
        "answer. Write questions into a file, for task=jsonl.",
    )
    return problems


# --- tasks by name, as in train.tasks -------------------------------------------------------------


def training_task(name: str, changes: Mapping[str, Any]) -> AnswerTask:
    """The task of conf/task/NAME.yaml with some settings changed.

    Raises:
        UserError: there is no such task, a change is no setting of it, or it has no answers to
            grade.
    """
    require(
        name in options("task"),
        f"train.tasks=[{name}]: there is no such task: choose from {', '.join(options('task'))}.",
    )
    file = read_yaml(config_dir("conf") / "task" / f"{name}.yaml")
    with errors_at(f"train.task_settings.{name}"):
        task = build_task(checked(TaskConfig, file | dict(changes), "task"))
    if not isinstance(task, AnswerTask):
        raise UserError(
            f"train.tasks=[{name}] has no answers to grade: leave it to cera-eval, after training."
        )
    return task


# --- problems among the training rows -------------------------------------------------------------


def trained_on(problems: Iterable[Problem], data: DataConfig) -> list[str]:
    """The questions that are a whole cell of a training row, ignoring case and spaces."""
    questions = {
        normalized(problem.question): problem.question
        for problem in problems
        if problem.question.strip()
    }
    shared = questions.keys() & training_cells(data)
    return [question for words, question in questions.items() if words in shared]


def training_cells(data: DataConfig) -> Iterator[str]:
    """The texts in the cells of all training rows, normalised."""
    for _, part in data.trained_parts():
        source, *_ = open_sources(part)
        for _, row in source:
            yield from (normalized(cell) for cell in flatten(row).values() if isinstance(cell, str))


def describe_trained_on(problems: Iterable[Problem], data: DataConfig) -> str:
    """How many problems are among the training rows; empty where none is. The rows may have been
    removed since the training."""
    try:
        shared = trained_on(problems, data)
    except UserError as error:
        return f"unknown, since the training rows cannot be read: {error}"
    if not shared:
        return ""
    return (
        f"{len(shared):,} of its problems are among the training rows, such as {shared[0][:60]!r}"
    )
