"""A problem, an answer to it and its grade: the lines of an evaluation's files."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One problem, a line of problems.jsonl."""

    id: str
    """A digest of the question: the same in every evaluation, whatever the prompt."""
    question: str
    prompt: str
    gold: str
    details: dict[str, Any] = field(default_factory=dict)
    """What the task's grading or a report needs beside the gold answer."""


@dataclass(frozen=True)
class Generation:
    """One answer, a line of generations.jsonl."""

    problem: str
    sample: int
    text: str
    tokens: int
    """Tokens generated, with the end token."""
    truncated: bool
    """Whether max_new_tokens cut it."""


@dataclass(frozen=True)
class Grade:
    """The grade of one answer, a line of grades.jsonl."""

    problem: str
    sample: int
    answer: str | None
    """What was extracted from the text; None where nothing was."""
    exact: bool
    verified: bool | None = None
    """None where math-verify does not apply."""
    failure: str | None = None
    """Why the grader failed: a time-out, a crash."""
    details: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        row = asdict(self)
        return row | row.pop("details")
