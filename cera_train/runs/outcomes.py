"""What a run leaves for a study, so that nothing has to run again: the loss of every held-out token before the first
update and after the last, and how each answer to its tasks ended. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cera_train.common.errors import UserError, error_text
from cera_train.common.files import write_bytes, write_text
from cera_train.runs.evaluation_folder import ENDINGS
from cera_train.runs.records import RESTORE, Record, read_lines, to_lines

if TYPE_CHECKING:
    import numpy as np

LOSSES_BEFORE, LOSSES_AFTER = "losses_before.safetensors", "losses_after.safetensors"
GRADES = "grades"
"""Folder with a file TASK.jsonl for each task."""


# --- losses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """The loss of every supervised held-out token."""

    tokens: np.ndarray
    """[rows] supervised tokens of each held-out row, int64."""
    losses: np.ndarray
    """[sum(tokens)] nats, float32, row by row."""

    @property
    def mean(self) -> float:
        """Nats per supervised token."""
        return float(self.losses.mean(dtype="float64"))

    def sums(self) -> np.ndarray:
        """[rows] nats of each row, float64."""
        import numpy as np

        rows = np.repeat(np.arange(len(self.tokens)), self.tokens)
        return np.bincount(rows, weights=self.losses, minlength=len(self.tokens))

    def write(self, path: Path) -> None:
        from safetensors.numpy import save

        write_bytes(path, save({"tokens": self.tokens, "losses": self.losses}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The losses in a file; raises UserError where it is missing or broken."""
        from safetensors.numpy import load

        try:
            tensors = load(path.read_bytes())
            read = cls(tensors["tokens"], tensors["losses"])
            if read.losses.dtype != "float32" or read.tokens.sum() != len(read.losses):
                raise ValueError(f"its losses are not those of its {len(read.tokens)} rows")
            read.sums()  # raises where a number of tokens is negative or no integer
        except Exception as error:  # safetensors and numpy raise many types on a file that is not theirs
            raise UserError(f"{path} is broken: {error_text(error)}. {RESTORE}") from error
        return read


def read_losses(run: Path) -> TokenLosses:
    """The losses after the last update."""
    _require(run / LOSSES_AFTER, "let the command that began the run finish it")
    return TokenLosses.read(run / LOSSES_AFTER)


# --- answers ---------------------------------------------------------------------------------------------------------


class GradedProblem(Record):
    """The answers to one problem."""

    problem: str
    """Its id."""
    scores: list[float]
    """One an answer, 0 to 1."""
    endings: list[str]
    """One an answer: its ending."""


def write_grades(run: Path, task: str, problems: Sequence[GradedProblem]) -> None:
    path = run / GRADES / f"{task}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_text(path, to_lines(problems))


def read_grades(run: Path, task: str) -> list[GradedProblem]:
    """How the answers to one of `train.tasks` came out after the last update, in the task's order."""
    path = run / GRADES / f"{task}.jsonl"
    _require(path, f"train with train.tasks=[{task}], and let the run finish")
    problems = read_lines(path, GradedProblem)
    for number, one in enumerate(problems, start=1):
        if len(one.scores) != len(one.endings) or not {*one.endings} <= {*ENDINGS}:
            raise UserError(f"{path}:{number} is broken: {one.scores} ended {one.endings}. {RESTORE}")
    return problems


def _require(path: Path, mend: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: {mend}.")
