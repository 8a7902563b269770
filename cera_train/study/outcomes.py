"""What a run of a study measured: each outcome, on every problem. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cera_train.common.settings import require
from cera_train.runs.results import (
    LOSSES_AFTER,
    Environment,
    RunResult,
    TokenLosses,
    environment_of,
    read_grades,
)
from cera_train.settings.sweep import LOSS, StudyConfig


@dataclass(frozen=True)
class Outcome:
    """An outcome of one run on every problem."""

    problems: list[Any]
    """Equal for runs on the same problems: their names, or the supervised tokens of held-out
    rows."""
    values: np.ndarray  # [problems] nats a token, or scores
    weights: np.ndarray | None = None  # [problems]: supervised tokens

    @classmethod
    def read(cls, name: str, run: Path) -> Outcome:
        if name == LOSS:
            losses = TokenLosses.read(run / LOSSES_AFTER)
            require(
                bool(np.isfinite(losses.losses).all()),
                f"{run}: a loss is not a number: remove the folder, and the study's command trains "
                "the run again.",
            )
            has_loss = losses.tokens > 0
            tokens = losses.tokens[has_loss]
            return cls(losses.tokens.tolist(), losses.sums()[has_loss] / tokens, tokens)
        grades = sorted(read_grades(run, name), key=lambda grade: grade.problem)
        return cls(
            problems=[grade.problem for grade in grades],
            values=np.array([grade.score for grade in grades]),
        )

    @property
    def mean(self) -> float:
        return float(np.average(self.values, weights=self.weights))


@dataclass(frozen=True)
class ComparedRun:
    """A run that stands for its cell."""

    folder: Path
    base: str | None
    study: StudyConfig

    @cached_property
    def result(self) -> RunResult:
        return RunResult.read(self.folder / "result.json")

    @cached_property
    def environment(self) -> Environment:
        return environment_of(self.folder)

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        return {name: Outcome.read(name, self.folder) for name in self.study.outcomes}

    @property
    def rows(self) -> dict[str, Any]:
        """What is equal for runs that can be compared."""
        rows: dict[str, Any] = {}
        for split, digest in (self.environment.rows or {}).items():
            rows[f"{split.replace('_', '-')} rows"] = digest
        for name, outcome in self.outcomes.items():
            rows[f"problems of {name}"] = outcome.problems
        return rows
