"""Perplexity = exp(summed loss / supervised tokens): every token weighs the same, whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from cera_train.data.batches import Batch
from cera_train.model.loss import SupervisedLoss


@torch.no_grad()
def mean_loss(loss: SupervisedLoss, batches: Iterable[tuple[Batch, bool]], accelerator: Accelerator) -> float:
    """The loss a supervised token has on average, in nats, over the batches of all processes, in eval mode.

    Args:
        batches: this process's, and whether each counts.
    """
    was_training = loss.training
    loss.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch, counts in batches:
        totals += counts * torch.stack([loss(batch).double(), batch.loss_mask[:, 1:].sum().double()])
    loss.train(was_training)
    summed, tokens = accelerator.reduce(totals, reduction="sum").tolist()
    return summed / tokens


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss; infinite where a float has no room for it."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
