"""What a run learns, one file each: the loss of an update's rows, and what the held-out rows tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cera_train.runs.outcomes import TokenLosses


class Objective(Protocol):
    def begin(self, rows: Sequence[int]) -> dict[str, float]:
        """Prepares an update on these rows, the same on every process; returns its figures for metrics.jsonl."""

    def loss(self, losses: Tensor, group: Sequence[int]) -> Tensor:
        """A micro-batch's part of the loss that is minimised, a scalar, whose gradients the processes average.

        Args:
            losses: [N] next-token losses of the supervised tokens of the rows of `group`, one after the other.
        """

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        """What counts on the held-out rows: losses whose mean is the held-out loss, and further figures."""
