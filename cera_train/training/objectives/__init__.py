"""Training objectives: the loss of an update, and the figures of the held-out rows. Supervised
fine-tuning is here; preferences and rewards have a file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cera_train.model.batches import MicroBatches
from cera_train.runs.results import TokenLosses

if TYPE_CHECKING:
    from cera_train.training.session import Session


@dataclass
class Drawn:
    """What an update runs through the model."""

    batches: MicroBatches
    rows: list[int]  # sequences of `batches`
    figures: dict[str, float] = field(default_factory=dict)  # for metrics.jsonl
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Further figures, scalars, which `loss` adds up in each pass, and the processes average."""
    passes: int = 1  # steps of the optimizer on these batches
    headline: str | None = None  # for the progress line, in place of the loss


class Sft:
    """Supervised fine-tuning: the mean next-token loss over the supervised tokens of an update. The
    other objectives replace these methods."""

    def __init__(self, session: Session) -> None:
        self.batches = session.batches
        self.accelerator = session.accelerator

    def begin(self, rows: list[int]) -> Drawn:
        """Prepares an update on these training rows, the same on every process."""
        supervised = sum(self.batches.supervised[row] for row in rows)
        # A mean over the tokens of all processes, whose gradients are averaged.
        self.scale = self.accelerator.num_processes / torch.tensor(
            supervised, device=self.accelerator.device
        )
        return Drawn(self.batches, rows)

    def loss(self, losses: Tensor, group: Sequence[int]) -> Tensor:
        """A micro-batch's part of the loss that is minimised, a scalar, whose gradients the
        processes average.

        Args:
            losses: [N] next-token losses of the supervised tokens of the sequences of `group`, one
                after the other.
        """
        return self.scale * losses.sum()

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        """What counts on the held-out rows: losses whose mean is the held-out loss, and further
        figures."""
        return losses, {}
