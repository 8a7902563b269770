"""A problem, an answer to it and its grade: the lines of an evaluation's files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cera_train.common.records import Record, key

EVALUATE_AGAIN = "Evaluate the run again."


@dataclass(frozen=True)
class Problem(Record):
    """One problem, a line of problems.jsonl."""

    mend: ClassVar[str] = EVALUATE_AGAIN

    id: str
    """A digest of the question: the same in every evaluation, whatever the prompt."""
    question: str
    prompt: str
    gold: str
    details: dict[str, Any] = field(default_factory=dict)
    """What the task's grading or a report needs beside the gold answer."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Grade(Record):
    """The grade of one answer, a line of grades.jsonl."""

    mend: ClassVar[str] = EVALUATE_AGAIN

    problem: str
    sample: int
    answer: str | None
    """What was extracted from the text; None where nothing was."""
    exact: bool
    verified: bool | None = key("verified", write_null=True)
    """None where math-verify does not apply."""
    failure: str | None = key("failure", write_null=True)
    """Why the grader failed: a time-out, a crash."""
    ending: str | None = None
    """How the answer ended, see tasks/endings.py; None in files of earlier versions."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def grader(self) -> str:
        """The grader that decides: verified where math-verify looked, else exact."""
        return "exact" if self.verified is None else "verified"

    @property
    def is_right(self) -> bool:
        return getattr(self, self.grader)
