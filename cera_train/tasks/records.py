"""A problem, an answer to it and its grade: the lines of an evaluation's files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One problem, a line of problems.jsonl."""

    id: str
    """A digest of the question, so that a problem has the same id in every evaluation, whatever its prompt."""
    question: str
    prompt: str
    gold: str
    details: dict[str, Any] = field(default_factory=dict)
    """What the task's own grading or a report needs besides."""


@dataclass(frozen=True)
class Generation:
    """One answer, a line of generations.jsonl."""

    problem: str
    sample: int
    text: str
    tokens: int
    """Generated, the end token included."""
    truncated: bool
    """Whether it was cut at max_new_tokens."""


@dataclass(frozen=True)
class Grade:
    """Of one answer, a line of grades.jsonl."""

    problem: str
    sample: int
    answer: str | None
    """What was found in the text; None where nothing was."""
    exact: bool
    verified: bool | None = None
    """None: not verified, as for logistic_map."""
    failure: str | None = None
    """What the grader ran into: a time-out, a crash."""
    details: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        row = asdict(self)
        return row | row.pop("details")
