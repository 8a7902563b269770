"""Supervised fine-tuning: the mean next-token loss over the supervised tokens of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cera_train.training.objectives import Drawn, Objective

if TYPE_CHECKING:
    from cera_train.training.session import Session


class Sft(Objective):
    def __init__(self, session: Session) -> None:
        self.batches, self.accelerator = session.batches, session.accelerator

    def begin(self, rows: list[int]) -> Drawn:
        supervised = sum(self.batches.supervised[row] for row in rows)
        # A mean over the tokens of all processes, whose gradients are averaged.
        self.scale = self.accelerator.num_processes / torch.tensor(supervised, device=self.accelerator.device)
        return Drawn(self.batches, rows)

    def loss(self, losses: Tensor, group: Sequence[int]) -> Tensor:
        return self.scale * losses.sum()
