"""The folder of one evaluation, RUN/eval/NAME: its config, problems, answers, grades and result. Each process appends
its answers to a file; at the end these become one. Every other file appears whole or not at all. Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TextIO

import yaml

from cera_train.common.errors import UserError
from cera_train.common.files import lock_folder, write_text
from cera_train.common.settings import to_plain
from cera_train.common.trust import redact_tree
from cera_train.runs.recorded_config import differences
from cera_train.runs.records import Record, read_lines, to_lines
from cera_train.runs.results import AccuracyResult, PerplexityResult, read_evaluation_result
from cera_train.settings.evaluation import EvalConfig

Key = tuple[str, int]
"""Problem and sample."""

EVALUATE_AGAIN = "Evaluate the run again."


class Problem(Record, extra="allow"):
    """One problem, a line of problems.jsonl. `details` are what the task's grading or a report needs beside the gold
    answer."""

    mend: ClassVar[str] = EVALUATE_AGAIN

    id: str
    """A digest of the question: the same in every evaluation, whatever the prompt."""
    question: str
    prompt: str
    gold: str


class Generation(Record):
    """One answer, a line of generations.jsonl."""

    mend: ClassVar[str] = EVALUATE_AGAIN

    problem: str
    sample: int
    text: str
    tokens: int
    """Tokens generated, with the end token."""
    truncated: bool
    """Whether max_new_tokens cut it."""


class Grade(Record, extra="allow"):
    """The grade of one answer, a line of grades.jsonl."""

    mend: ClassVar[str] = EVALUATE_AGAIN

    problem: str
    sample: int
    answer: str | None = None
    """What was extracted from the text; None where nothing was."""
    exact: bool
    verified: bool | None = None
    """None where math-verify does not apply."""
    failure: str | None = None
    """Why the grader failed: a time-out, a crash."""
    ending: str | None = None
    """How the answer ended: one of ENDINGS."""

    @property
    def grader(self) -> str:
        """The grader that decides: verified where math-verify looked, else exact."""
        return "exact" if self.verified is None else "verified"

    @property
    def is_right(self) -> bool:
        return getattr(self, self.grader)


class EvaluationFolder:
    """RUN/eval/NAME, locked while it is open."""

    def __init__(self, path: Path, is_main: bool = True, process: int = 0) -> None:
        self.path, self.is_main = path, is_main
        self.process_answers = path / ("generations.jsonl" if is_main else f"generations.{process}.jsonl")

    def __enter__(self) -> EvaluationFolder:
        if self.is_main:
            self._is_new = not self.path.exists()
            self._lock = lock_folder(self.path, "evaluation")
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            if self._is_new and not self.has_begun:  # a mistake before the first answer leaves no trace
                shutil.rmtree(self.path)
                if not any(self.path.parent.iterdir()):
                    self.path.parent.rmdir()
            else:
                (self.path / ".lock").unlink()
            self._lock.release()

    @property
    def has_begun(self) -> bool:
        """Whether there are answers or a result, which bind the folder to its settings."""
        answers = self.path.glob("generations*.jsonl")
        return (self.path / "result.json").exists() or any(path.stat().st_size for path in answers)

    # --- settings and result -----------------------------------------------------------------------------------------

    def write_config(self, config: EvalConfig) -> None:
        """Records the settings; a UserError where answers belong to others."""
        path, plain = self.path / "config.yaml", redact_tree(to_plain(config))
        if path.exists() and self.has_begun and (different := differences(path, plain, EvalConfig)):
            raise UserError(
                f"{self.path} holds an evaluation with other settings: {'; '.join(different.values())}. Set name=... "
                "for another folder, or set these back to resume it."
            )
        write_text(path, yaml.safe_dump(plain, sort_keys=False))

    def result(self) -> AccuracyResult | PerplexityResult | None:
        """result.json; None before the evaluation is finished."""
        path = self.path / "result.json"
        return read_evaluation_result(path) if path.exists() else None

    def write_result(self, result: AccuracyResult | PerplexityResult) -> None:
        result.write(self.path / "result.json")

    # --- problems, answers, grades -----------------------------------------------------------------------------------

    def write_problems(self, problems: Sequence[Problem]) -> None:
        """Records the problems; a UserError where the folder has answers to others."""
        path, text = self.path / "problems.jsonl", to_lines(problems)
        if path.exists() and self.has_begun and path.read_text() != text:
            raise UserError(
                f"{self.path} has answers to other problems: a data file changed. Restore it, or set "
                "name=... for another folder."
            )
        write_text(path, text)

    def answers(self) -> tuple[dict[Key, Generation], list[str]]:
        """The answers so far, and a message for each broken line: a process may die while it writes one."""
        answers, broken = [], []
        for path in sorted(self.path.glob("generations*.jsonl")):
            readable, messages = _read_answers(path)
            answers += readable
            broken += messages
        return {(answer.problem, answer.sample): answer for answer in answers}, broken

    def append_to_answers(self) -> TextIO:
        """Opens this process's file of answers for more, without its broken lines."""
        if self.process_answers.exists():
            write_text(self.process_answers, to_lines(_read_answers(self.process_answers)[0]))
        return self.process_answers.open("a")

    def finish_answers(self, answers: Iterable[Generation]) -> None:
        """Writes all answers, in order, into one file."""
        write_text(self.path / "generations.jsonl", to_lines(answers))
        for path in self.path.glob("generations.*.jsonl"):
            path.unlink()

    def write_grades(self, grades: Iterable[Grade]) -> None:
        write_text(self.path / "grades.jsonl", to_lines(grades))


def append_answers(file: TextIO, answers: Iterable[Generation]) -> None:
    """Appends answers, which a resumed evaluation finds."""
    file.write(to_lines(answers))
    file.flush()


def _read_answers(path: Path) -> tuple[list[Generation], list[str]]:
    """The answers of a file, and a message for each broken line."""
    answers, broken = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            answers.append(Generation.from_json(json.loads(line), path))
        except (ValueError, RecursionError):
            broken.append(f"{path}:{number} is broken")
    return answers, broken


# --- a finished evaluation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradedAnswers:
    """The answers of an evaluation, read when they are needed; reading raises a UserError that names a broken file."""

    folder: Path

    @cached_property
    def problems(self) -> dict[str, Problem]:
        """By id, in the task's order."""
        return {problem.id: problem for problem in read_lines(self.folder / "problems.jsonl", Problem)}

    @cached_property
    def grades(self) -> dict[str, list[Grade]]:
        """By problem, one for each sample."""
        grades: dict[str, list[Grade]] = {name: [] for name in self.problems}
        for grade in read_lines(self.folder / "grades.jsonl", Grade):
            if grade.problem in grades:
                grades[grade.problem].append(grade)
        ungraded = sum(not answers for answers in grades.values())
        if ungraded or not grades:
            raise UserError(
                f"{self.folder} has no grades for {ungraded} of its {len(grades)} problems: "
                "evaluate the run again, which grades the answers that are there."
            )
        return grades

    @property
    def samples(self) -> int:
        """Answers to a problem."""
        return max(map(len, self.grades.values()))

    @property
    def is_verified(self) -> bool:
        """Whether the second grader looked at every answer."""
        return all(grade.verified is not None for grades in self.grades.values() for grade in grades)

    def scores(self, score: Callable[[Grade], float]) -> dict[str, float]:
        """The mean score of the answers to each problem."""
        try:
            return {name: sum(map(score, grades)) / len(grades) for name, grades in self.grades.items()}
        except (LookupError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{self.folder / 'grades.jsonl'} is broken: {error!r}. {EVALUATE_AGAIN}") from error
