"""What an objective is: it draws the sequences of an update with their loss, and judges held-out
rows. Also the simplest objective, supervised fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cera_train.model.batches import MicroBatches
from cera_train.runs.results import TokenLosses, UpdateMetrics, figure


@dataclass
class Update:
    """The sequences that an update runs through the model, and their loss."""

    batches: MicroBatches
    sequences: list[int]
    """Indices of the sequences in `batches`."""
    loss: Callable[[Tensor, Sequence[int]], Tensor]
    """A micro-batch's part of the loss, a scalar whose gradients the processes average, from [N]
    log p of the supervised tokens of its sequences, one after the other, and their indices."""
    figures: dict[str, float] = field(default_factory=dict)
    """For metrics.jsonl; the same on every process."""

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, padding not counted."""
        return sum(self.batches.lengths[sequence] for sequence in self.sequences)


class Objective(ABC):
    @abstractmethod
    def draw(self, sequences: list[int]) -> Update:
        """Prepares an update on these training sequences, the same on every process."""

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        """The held-out metric, and extra figures.

        Args:
            losses: of the tokens of the held-out rows.

        Returns:
            Losses whose mean is the held-out loss, and further figures by their names in the log.
        """
        return losses, {}

    def headline(self, metrics: UpdateMetrics) -> str:
        """What the progress line shows of an update."""
        return f"loss {figure(metrics.loss)}  perplexity {figure(metrics.perplexity, 2)}"


# --- supervised fine-tuning -----------------------------------------------------------------------


class Sft(Objective):
    """The mean next-token loss over the supervised tokens of an update.

    Args:
        batches: of the training rows.
    """

    def __init__(self, batches: MicroBatches, processes: int) -> None:
        self.batches = batches
        self.processes = processes

    def draw(self, sequences: list[int]) -> Update:
        supervised = sum(self.batches.supervised[sequence] for sequence in sequences)
        # Turns sums over micro-batches, averaged over processes, into a mean over tokens.
        weight = self.processes / torch.tensor(supervised, device=self.batches.device)
        return Update(self.batches, sequences, lambda log_p, _: -weight * log_p.sum())
