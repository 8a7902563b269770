"""The problems, answers and grades that a finished evaluation leaves, with a type. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from cera_train.common.errors import UserError
from cera_train.common.records import Record, key, read_lines

EVALUATE = "Evaluate the run again."


@dataclass
class ProblemLine(Record):
    """A line of problems.jsonl."""

    mend: ClassVar[str] = EVALUATE

    id: str
    question: str
    gold: str
    prompt: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """What the task adds."""


@dataclass
class GenerationLine(Record):
    """A line of generations.jsonl: one answer."""

    mend: ClassVar[str] = EVALUATE

    problem: str
    sample: int
    text: str
    tokens: int | None = None
    truncated: bool | None = None


@dataclass
class GradeLine(Record):
    """A line of grades.jsonl: the grade of one answer."""

    mend: ClassVar[str] = EVALUATE

    problem: str
    sample: int
    answer: str | None
    """What was found in the text; None where nothing was."""
    exact: bool
    verified: bool | None = key("verified", write_null=True)
    """None: not verified."""
    failure: str | None = key("failure", write_null=True)
    details: dict[str, Any] = field(default_factory=dict)
    """What the task adds."""


@dataclass(frozen=True)
class GradedAnswers:
    """The answers of an evaluation, read when they are needed; reading raises a UserError that names a broken file."""

    folder: Path
    counts: Callable[[ProblemLine], bool] = lambda problem: True
    """Whether a problem counts in the accuracies."""

    @cached_property
    def problems(self) -> dict[str, ProblemLine]:
        """By id, in the task's order."""
        return {problem.id: problem for problem in read_lines(self.folder / "problems.jsonl", ProblemLine)}

    @cached_property
    def grades(self) -> dict[str, list[GradeLine]]:
        """By problem, one for each sample, for the problems that count in the accuracies."""
        grades: dict[str, list[GradeLine]] = {name: [] for name, own in self.problems.items() if self.counts(own)}
        if not grades:
            raise UserError(f"{self.folder} has no problems. {EVALUATE}")
        for grade in read_lines(self.folder / "grades.jsonl", GradeLine):
            if grade.problem in grades:
                grades[grade.problem].append(grade)
        if ungraded := sum(not own for own in grades.values()):
            raise UserError(
                f"{self.folder} has no grades for {ungraded} of its {len(grades)} problems: "
                f"grade the answers again with cera-eval grade={self.folder}."
            )
        return grades

    @cached_property
    def texts(self) -> dict[tuple[str, int], str]:
        """The generated texts, by problem and sample."""
        lines = read_lines(self.folder / "generations.jsonl", GenerationLine)
        return {(line.problem, line.sample): line.text for line in lines}

    @property
    def samples(self) -> int:
        """Answers to a problem."""
        return max(len(own) for own in self.grades.values())

    @property
    def is_verified(self) -> bool:
        """Whether the second grader looked at every answer."""
        return all(grade.verified is not None for own in self.grades.values() for grade in own)

    def scores(self, score: Callable[[GradeLine], float]) -> dict[str, float]:
        """The mean score of the answers to each problem."""
        try:
            return {name: sum(map(score, own)) / len(own) for name, own in self.grades.items()}
        except (LookupError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{self.folder / 'grades.jsonl'} is broken: {error!r}. {EVALUATE}") from error
