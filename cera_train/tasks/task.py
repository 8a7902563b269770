"""What a benchmark defines. Everything else that evaluates, prints or reports one reads it here.

A `QuestionTask` compares an answer with a gold answer; most benchmarks are one, made of three functions.
An `AnswerTask` brings its problems and its grading; a `RowTask` measures perplexity. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import duration
from cera_train.data.config import DataConfig
from cera_train.data.format import columns_of
from cera_train.data.rows import Row, text_of
from cera_train.tasks.config import TaskConfig
from cera_train.tasks.problems import at, read_rows
from cera_train.tasks.records import Generation, Grade, Problem

if TYPE_CHECKING:
    from cera_train.data.prepare import TokenizedRows
    from cera_train.model.config import ModelConfig


@dataclass(frozen=True)
class Metric:
    """A number of result.json that a report shows."""

    key: str
    label: str
    """Follows the task's name in the column's header."""
    is_share: bool = True
    """Shown in per cent; False: a number with three decimals."""
    in_picture: bool = False
    """Whether the accuracy picture shows it in place of pass@1."""


@dataclass(frozen=True)
class Table:
    """A table that follows an evaluation's printed result."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark."""

    name: str
    """Its name for people, such as GSM8K."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Names for people of further files in conf/task/ with this kind, by the name of the file."""
    settings: tuple[str, ...] = ()
    """Settings of `TaskConfig` that only some tasks have, and this one has."""
    score_name: str = ""
    """What `paired_value` counts, in the plural, such as steps. Empty: whole answers, right or wrong."""
    shown: tuple[Metric, ...] = ()
    """What a report shows beside accuracy or perplexity."""
    takes_data: bool = False
    """Whether `data=` chooses its rows."""

    def counts(self, problem: Any) -> bool:
        """Whether a problem counts in the scores. A problem has `details`."""
        return True

    def paired_value(self, grade: Any, grader: str) -> float:
        """How much of an answer is right, from 0 to 1, for the paired test of two runs.

        Args:
            grade: a `Grade`, or a line of grades.jsonl with the same attributes.
            grader: exact or verified; of no effect where `score_name` is set.
        """
        return float(getattr(grade, grader))

    def check(self, config: TaskConfig) -> None:
        """Raises UserError for settings that this task cannot use. Runs before torch is imported."""

    def lines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Labels and texts to print of a result, beside its accuracies."""
        return {}

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Tables to print after the lines."""
        return []


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AnswerTask(Task, ABC):
    """A benchmark of problems whose answers are generated and graded."""

    is_verified: bool = True
    """Whether math-verify grades the answers too."""

    @abstractmethod
    def problems(self, config: TaskConfig, data: DataConfig | None) -> Iterable[Problem]:
        """The problems, in order, at most `config.limit`.

        Args:
            data: the rows that the run was trained on; None for a model without a run.
        """

    @abstractmethod
    def grade(self, problem: Problem, generation: Generation) -> Grade:
        """Grades one answer by the task's published rule."""

    def scores(self, problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
        """What result.json holds beside pass@k, by key.

        Args:
            problems: all of them, also those that do not count.
            grades: the grades of their answers; some may be missing.
        """
        return {}


DETAILS = ("level", "type", "subject")
"""Columns of a row that problems.jsonl keeps."""


@dataclass(frozen=True, kw_only=True)
class QuestionTask(AnswerTask):
    """A benchmark whose rows hold a question and a gold answer."""

    question: str
    """The column with the question."""
    gold: Callable[[Row], str]
    """Finds the gold answer of a row, or raises UserError."""
    extract: Callable[[str], str | None]
    """Finds the answer in a generated text; None where there is none."""
    is_exact: Callable[[str, str], bool]
    """Whether an answer equals the gold answer by the published rule."""
    takes: Callable[[Row, TaskConfig], bool] = lambda row, config: True
    """Whether a row is one of the problems."""

    def check(self, config: TaskConfig) -> None:
        example = f"$'task.prompt=\"Question: {{{self.question}}}\\nAnswer:\"'"
        require(bool(config.prompt), f"task.prompt is empty: set a template, such as {example}.")
        with at("task.prompt"):
            columns = columns_of(config.prompt)
        require(
            bool(columns), f"task.prompt={config.prompt!r} names no column: write one in braces, such as {example}."
        )
        require_rows(config)

    def problems(self, config: TaskConfig, data: DataConfig | None) -> Iterable[Problem]:
        count = 0
        for place, row in read_rows(config):
            if count == config.limit:
                return
            with at(place):
                is_taken = self.takes(row, config)
            if is_taken:
                count += 1
                yield self._problem(place, row, config)

    def _problem(self, place: str, row: Row, config: TaskConfig) -> Problem:
        columns = columns_of(config.prompt)
        if absent := next((name for name in columns if name not in row), None):
            mend = "Name one of these"
            if absent == self.question:
                mend = f"Rename the one with the question to {self.question}, or choose another task"
            raise UserError(
                f"task.prompt: column {absent!r} is missing in {place}; its columns are {', '.join(row)}. {mend}."
            )
        with at(place):
            question = text_of(row, self.question)
            prompt = config.prompt.format_map({name: text_of(row, name) for name in columns})
            gold = self.gold(row)
        details = {name: row[name] for name in DETAILS if row.get(name) is not None}
        return Problem(question_id(question), question, prompt, gold, details)

    def grade(self, problem: Problem, generation: Generation) -> Grade:
        answer, exact, failure = None, False, None
        try:
            answer = self.extract(generation.text)
            exact = answer is not None and self.is_exact(answer, problem.gold)
        except Exception as error:  # whatever a model may write must not end an evaluation of hours
            failure = f"crash: {type(error).__name__}: {error}"
        return Grade(generation.problem, generation.sample, answer, exact, failure=failure)


def question_id(question: str) -> str:
    """A digest of a question: its id in every evaluation."""
    return hashlib.blake2b(question.encode(), digest_size=6).hexdigest()


def require_rows(config: TaskConfig) -> None:
    """Raises UserError where neither files nor a data set are named."""
    require(bool(config.path or config.files), "task.files is empty: name local files, or a Hub data set in task.path.")


# --- perplexity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowTask(Task, ABC):
    """A benchmark of rows whose tokens are predicted: it measures perplexity."""

    has_spectra: bool = False
    """Whether the adapter's spectra are measured too."""

    @abstractmethod
    def rows(self, config: TaskConfig, data: DataConfig | None, model: ModelConfig, tokenizer: Any) -> TokenizedRows:
        """The rows to predict.

        Args:
            data: chosen by `data=`, else the rows that the run was trained on; None where neither is known.

        Raises:
            UserError: there are none, or they lack the columns that the layout needs.
        """

    def lines(self, result: Mapping[str, Any]) -> dict[str, str]:
        lines = {"perplexity": f"{result['perplexity']:.3f}"}
        if "perplexity_base" in result:
            lines["without adapter"] = f"{result['perplexity_base']:.3f}"
        if "spectrum/effective_rank/mean" in result:
            mean, largest = (result[f"spectrum/effective_rank/{name}"] for name in ("mean", "max"))
            lines["effective rank"] = f"{mean:.1f} mean, {largest:.1f} max"
        lines["tokens"] = f"{result['tokens']:,} predicted, in {result['rows']:,} rows"
        return lines | {"time": duration(result["seconds"])}
