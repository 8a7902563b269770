"""Supervised fine-tuning: the mean next-token loss over the supervised tokens of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cera_train.model.batches import MicroBatches
from cera_train.runs.results import TokenLosses
from cera_train.training.objectives.objective import Drawn


@dataclass
class Weighted(Drawn):
    """Sequences, and how much each of their supervised tokens weighs: their number over all
    processes divides, and the processes average their gradients."""

    token_weight: Tensor | None = None


def token_weight(batches: MicroBatches, sequences: Sequence[int], processes: int) -> Tensor:
    """processes / supervised tokens of the update: with it, sums over micro-batches on processes
    that average make a mean over tokens."""
    supervised = sum(batches.supervised[sequence] for sequence in sequences)
    return processes / torch.tensor(supervised, device=batches.device)


class Sft:
    """
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

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, Any]]:
        return losses, {}
