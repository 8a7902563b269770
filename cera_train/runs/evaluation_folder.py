"""The folder of one evaluation, RUN/eval/NAME: its config, problems, answers, grades and result.

Each process appends its answers to a file; at the end these become one. Every other file appears
whole or not at all. Imports no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import Field

from cera_train.common.errors import UserError
from cera_train.common.files import locked, read_json, write_text
from cera_train.common.settings import require, to_plain
from cera_train.common.trust import redact_tree
from cera_train.runs.records import Record, differences, load_config, read_lines, to_lines
from cera_train.runs.results import MeasuredAdapter, Perplexity
from cera_train.settings.evaluation import EvalConfig

# --- its records ----------------------------------------------------------------------------------

Key = tuple[str, int]  # problem and sample

CHAT = "is_chat"
"""Marks a problem whose prompt a chat template wrote."""


class Problem(Record, extra="allow"):
    """One problem, a line of problems.jsonl. `details` holds what the task's grader or a report
    needs besides the gold answer."""

    id: str  # a digest of the question: the same in every evaluation, whatever the prompt template
    question: str
    prompt: str
    gold: str
    prompt_ids: tuple[int, ...] | None = Field(default=None, exclude=True)
    """Those of a row that a reader read. None: the prompt is text, after a start token."""


class Generation(Record):
    """One answer, a line of generations.jsonl."""

    fix: ClassVar[str] = "Remove the file, and evaluate the run again."

    problem: str
    sample: int
    text: str
    tokens: int  # generated, with the end token
    truncated: bool  # whether max_new_tokens cut it

    @property
    def key(self) -> Key:
        return self.problem, self.sample


class Grade(Record, extra="allow"):
    """The grade of one answer, a line of grades.jsonl."""

    fix: ClassVar[str] = "Evaluate the run again."

    problem: str
    sample: int
    answer: str | None = None  # what was extracted from the text
    exact: bool
    verified: bool | None = None  # None if math-verify does not apply
    score: float | None = Field(default=None, ge=0, le=1)
    """How much of the answer is right; None where it is right or wrong as a whole."""
    failure: str | None = None  # an error of the grader: a time-out, a crash
    ending: str | None = None  # how the answer ended: one of ENDINGS

    @property
    def is_right(self) -> bool:
        """By math-verify if it graded the answer, else by the exact rule."""
        return self.exact if self.verified is None else self.verified

    @property
    def value(self) -> float:
        """How much of the answer is right, from 0 to 1."""
        return float(self.is_right) if self.score is None else self.score


ENDINGS = RIGHT, WRONG, TRUNCATED, COLLAPSED = (
    "right",
    "wrong",
    "truncated",
    "collapsed",
)
"""How an answer ended, so that failures are told apart; `ending_of` decides."""


PASS_AT_K = re.compile(r"\w+/pass@\d+")
"""The key of the share of problems that one of k answers solves, by a grader."""


class AccuracyResult(Record, extra="allow"):
    """result.json of an evaluation with answers and grades. `details` are the accuracies,
    GRADER/pass@K, the shares of endings, and what the task adds, under its names."""

    __pydantic_extra__: dict[str, int | float | list | dict | None]

    task: str | None = None  # the name of the evaluation's folder
    kind: str | None = None  # the kind of task, such as gsm8k
    problems: int | None = None
    samples: int | None = None  # answers to each problem
    truncated: int | None = None  # answers cut by max_new_tokens
    no_answer: int | None = None
    grader_failures: int | None = None
    tokens: int | None = None  # tokens generated

    @property
    def accuracies(self) -> dict[str, tuple[float, float] | None]:
        """The 95 % interval over problems of each accuracy; None if none is on record."""
        accuracies = {}
        for key in filter(PASS_AT_K.fullmatch, self.details):
            match self.details.get(f"{key}/interval"):
                case [lower, upper] if lower < upper:
                    accuracies[key] = (lower, upper)
                case _:
                    accuracies[key] = None
        return accuracies

    @property
    def endings(self) -> dict[str, float | None]:
        """The recorded share of the answers that ended in each way: 0.2.0 also had loops."""
        return {
            key.removeprefix("ending/"): self.figure(key)
            for key in self.details
            if key.startswith("ending/")
        }

    def figure(self, name: str) -> float | None:
        """A number by its key, such as one that the task adds."""
        value = self.to_json().get(name)
        return value if isinstance(value, int | float) else None


class PerplexityResult(MeasuredAdapter):
    """result.json of an evaluation of perplexity."""

    task: str | None = None  # the name of the evaluation's folder
    kind: str | None = None  # `perplexity`, whatever the rows are
    perplexity: Perplexity = None
    loss: float | None = None
    rows: int | None = None
    tokens: int | None = None  # tokens predicted
    rows_digest: str | None = None
    perplexity_base: Perplexity = None  # without the adapter; None if there is no adapter


def find_evaluation_result(folder: Path) -> AccuracyResult | PerplexityResult | None:
    """result.json of an evaluation; None before it is finished."""
    if not (path := folder / "result.json").exists():
        return None
    tree = read_json(path)
    kind = PerplexityResult if tree.get("kind") == "perplexity" else AccuracyResult
    return kind.from_json(tree, path)


# --- the folder -----------------------------------------------------------------------------------


class EvaluationFolder:
    """RUN/eval/NAME."""

    def __init__(self, path: Path, process: int = 0) -> None:
        self.path = path
        name = f"generations.{process}.jsonl" if process else "generations.jsonl"
        self.process_answers = path / name

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, process: int = 0) -> Iterator[EvaluationFolder]:
        """The folder, locked by process 0. An error before the first answer leaves no
        folder."""
        folder = cls(path, process)
        if process > 0:
            yield folder
            return
        try:
            with locked(path, "evaluation", folder.has_begun):
                # Left by an interrupted call, perhaps with more processes.
                if any(path.glob("generations*.jsonl")):
                    folder.write_answers(folder.answers().values())
                yield folder
        finally:
            with contextlib.suppress(OSError):  # there are other evaluations
                path.parent.rmdir()

    def has_begun(self) -> bool:
        """Whether there are answers or a result, which bind the folder to its settings."""
        answers = self.path.glob("generations*.jsonl")
        return (self.path / "result.json").exists() or any(path.stat().st_size for path in answers)

    # --- settings and result ----------------------------------------------------------------------

    def write_config(self, config: EvalConfig) -> None:
        """Records the settings. Raises UserError if the folder has answers under other settings."""
        path = self.path / "config.yaml"
        if path.exists() and self.has_begun():
            different = differences(load_config(path, EvalConfig), config)
            require(
                not different,
                f"{self.path} holds an evaluation with other settings: "
                f"{'; '.join(different.values())}. Set name=... for another folder, or set these "
                f"back to resume it.",
            )
        if config.run == "base":
            self._check_model(config)
        plain = redact_tree(to_plain(config))
        write_text(path, yaml.safe_dump(plain, sort_keys=False))

    def _check_model(self, config: EvalConfig) -> None:
        """Raises UserError if the folder's other evaluations measure another untouched model: only
        the last part of its path names the folder."""
        for other in self.path.parent.glob("*/config.yaml"):
            different = differences(load_config(other, EvalConfig), config)
            models = [
                different[key] for key in ("model.path", "model.quantization") if key in different
            ]
            require(
                not models,
                f"{other.parent} is of another model: {'; '.join(models)}. Set output_dir=OTHER.",
            )

    # --- problems, answers, grades ----------------------------------------------------------------

    def write_problems(self, problems: Sequence[Problem]) -> None:
        """Records the problems. Raises UserError if the folder has answers to other problems."""
        path = self.path / "problems.jsonl"
        text = to_lines(problems)
        if path.exists() and self.has_begun() and path.read_bytes() != text.encode():
            raise UserError(
                f"{self.path} has answers to other problems: a data file changed. Restore it, or "
                f"set name=... for another folder."
            )
        write_text(path, text)

    def answers(self) -> dict[Key, Generation]:
        """The answers so far, without a partial line that a process was writing when it died."""
        paths = sorted(self.path.glob("generations*.jsonl"))
        answers = [
            answer for path in paths for answer in read_lines(path, Generation, may_break_off=True)
        ]
        return {answer.key: answer for answer in answers}

    def append_answers(self, answers: Iterable[Generation]) -> None:
        """Adds answers to this process's file, which a resumed evaluation finds."""
        with self.process_answers.open("a") as file:
            file.write(to_lines(answers))

    def write_answers(self, answers: Iterable[Generation]) -> None:
        """Writes all answers into one file, which replaces those of the processes."""
        write_text(self.path / "generations.jsonl", to_lines(answers))
        for path in self.path.glob("generations.*.jsonl"):
            path.unlink()

    def write_grades(self, grades: Iterable[Grade]) -> None:
        write_text(self.path / "grades.jsonl", to_lines(grades))
