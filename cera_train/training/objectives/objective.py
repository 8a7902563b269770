"""What an objective is: which sequences an update draws, what their loss is, and the held-out
metric. Also the simplest objective, supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cera_train.model.batches import MicroBatches
from cera_train.runs.results import TokenLosses


@dataclass
class Drawn:
    """The sequences that an update runs through the model. Objectives add what their loss needs."""

    batches: MicroBatches
    sequences: list[int]
    """Indices of the sequences in `batches`."""
    passes: int = 1
    """Steps of the optimizer on these sequences."""
    figures: dict[str, float] = field(default_factory=dict)
    """For metrics.jsonl."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Further figures, scalars that start at 0: each micro-batch adds its part, and the processes
    average them."""
    headline: str | None = None
    """Shown in the progress line instead of the loss."""

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds the parts of a micro-batch."""
        for name, value in sums.items():
            self.sums[name] += value

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, padding not counted."""
        return sum(self.batches.lengths[sequence] for sequence in self.sequences)


class Objective(Protocol):
    def draw(self, sequences: list[int]) -> Drawn:
        """Prepares an update on these training sequences, the same on every process."""

    def loss(
        self, log_p: Tensor, drawn: Drawn, group: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's part of the loss, a scalar whose gradients the processes average, and its
        parts of `drawn.sums`.

        Args:
            log_p: [N] log p of the supervised tokens of the sequences of `group`, one after the
                other.
        """

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        """The held-out metric, and extra figures.

        Args:
            losses: of the tokens of the held-out rows.

        Returns:
            Losses whose mean is the held-out loss, and further figures by their names in the log.
        """


# --- supervised fine-tuning -----------------------------------------------------------------------


@dataclass
class Weighted(Drawn):
    """Sequences, and the weight of each supervised token: the loss is divided by their number over
    all processes, and the processes average their gradients."""

    token_weight: Tensor | None = None


def token_weight(batches: MicroBatches, sequences: Sequence[int], processes: int) -> Tensor:
    """processes / supervised tokens of the update: it turns sums over micro-batches, averaged over
    processes, into a mean over tokens."""
    supervised = sum(batches.supervised[sequence] for sequence in sequences)
    return processes / torch.tensor(supervised, device=batches.device)


class Sft:
    """The mean next-token loss over the supervised tokens of an update.

    Args:
        batches: of the training rows.
    """

    def __init__(self, batches: MicroBatches, processes: int) -> None:
        self.batches = batches
        self.processes = processes

    def draw(self, sequences: list[int]) -> Weighted:
        weight = token_weight(self.batches, sequences, self.processes)
        return Weighted(self.batches, sequences, token_weight=weight)

    def loss(
        self, log_p: Tensor, drawn: Weighted, group: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -drawn.token_weight * log_p.sum(), {}

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        return losses, {}
