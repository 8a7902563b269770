"""What an export loses: the exported model beside the adapter, on rows that neither was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch.nn.functional import kl_div, log_softmax

from cera_train.runs.records import Record

RESAMPLES = 10_000


@dataclass
class Certificate(Record):
    """The content of certificate.json."""

    format: str
    fit: str
    """layer by layer, or at once: whichever lost less on the calibration rows."""
    bias: bool
    calibration_tokens: int
    rows: int
    """Held-out sequences."""
    tokens: int
    """Their supervised tokens."""
    loss_adapter: float
    """Mean loss of a supervised token in nats."""
    loss_export: float
    loss_change: float
    loss_change_lower: float
    """95 % interval of the change, by a paired bootstrap over sequences."""
    loss_change_upper: float
    kl: float
    """Mean of KL(adapter || export) over the supervised tokens, in nats."""
    same_tokens: float
    """Share of supervised positions where both find the same token likeliest."""
    tolerance: float
    explained: dict[str, Any] = field(default_factory=dict)
    """Module -> the share of its branch's variance that the affine map explains."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    """Task -> its scores before and after."""

    @property
    def holds(self) -> bool:
        return self.loss_change_upper <= self.tolerance


@torch.no_grad()
def compare(
    before: Callable[[torch.Tensor], torch.Tensor],
    after: Callable[[torch.Tensor], torch.Tensor],
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, Any]:
    """Compares two models, sequence by sequence: no padding, and one sequence's logits in memory.

    Args:
        before, after: ids [1, T] -> logits [1, T, V].
        rows: ids and loss mask of each sequence, [T] both.

    Returns:
        The fields of a `Certificate` that come of it.
    """
    sums = []
    for ids, mask in rows:
        counts, wanted = mask[1:], ids[1:][mask[1:]]
        log_p, log_q = (log_softmax(model(ids[None])[0, :-1][counts].float(), -1) for model in (before, after))
        losses = [-each.gather(1, wanted[:, None]).sum() for each in (log_p, log_q)]
        kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        sums.append(torch.stack([*losses, kl, same.to(kl), counts.sum().to(kl)]).double().cpu())
    table = torch.stack(sums).numpy()
    loss_before, loss_after, kl, same, tokens = table.sum(0)
    lower, upper = interval_of_ratio(table[:, 1] - table[:, 0], table[:, 4])
    return {
        "rows": len(table),
        "tokens": int(tokens),
        "loss_adapter": loss_before / tokens,
        "loss_export": loss_after / tokens,
        "loss_change": (loss_after - loss_before) / tokens,
        "loss_change_lower": lower,
        "loss_change_upper": upper,
        "kl": kl / tokens,
        "same_tokens": same / tokens,
    }


def interval_of_ratio(values: numpy.ndarray, weights: numpy.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(values) / sum(weights), resampled over the rows."""
    generator = numpy.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(values), size=len(values))
        ratios.append(values[drawn].sum() / weights[drawn].sum())
    lower, upper = numpy.quantile(ratios, [0.025, 0.975])
    return float(lower), float(upper)
