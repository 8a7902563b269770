"""Perplexity = exp(summed loss / supervised tokens): every token weighs the same, whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from cera_train.data.batches import Batch
from cera_train.model.loss import SupervisedLoss


@torch.no_grad()
def mean_loss(
    loss: SupervisedLoss,
    batches: Iterable[tuple[Batch, bool]],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda totals: totals,
) -> float:
    """Mean loss of a supervised token in nats, over the batches of all processes, in eval mode.

    Args:
        batches: this process's, and whether each counts.
        reduce: sums a tensor over the processes.
    """
    was_training = loss.training
    loss.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for batch, counts in batches:
        totals = totals.to(batch.input_ids.device)
        totals += counts * torch.stack([loss(batch).double(), batch.loss_mask[:, 1:].sum().double()])
    loss.train(was_training)
    summed, tokens = reduce(totals).tolist()
    return summed / tokens


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats; infinite where a float has no room for it."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
