"""What an export loses: the exported model beside the adapter, on rows that neither was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import Field
from torch.nn.functional import kl_div, log_softmax

from cera_train.common.terminal import print_fields, print_table
from cera_train.runs.card import card_data
from cera_train.runs.records import Record
from cera_train.settings.model import ModelConfig
from cera_train.settings.serving import ExportFormat

RESAMPLES = 10_000
BATCH = 100
"""Resamples in memory at once."""

SCORES = {"exact/pass@1": ".1%", "verified/pass@1": ".1%", "perplexity": ".3f"}
"""Figures of a task that are shown, and how."""
SHOWN = 5
"""Modules in the printed table: those that the affine map explains least."""


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
    explained: dict[str, Any] = Field(default_factory=dict)
    """Module -> the share of its branch's variance that the affine map explains."""
    accuracy: dict[str, Any] = Field(default_factory=dict)
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


def interval_of_ratio(values: numpy.ndarray, weights: numpy.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(values) / sum(weights), resampled over the rows."""
    from scipy.stats import bootstrap

    if len(values) == 1:  # scipy takes two rows or more
        return (float(values[0] / weights[0]),) * 2
    interval = bootstrap(
        (values, weights),
        lambda values, weights, axis: values.sum(axis) / weights.sum(axis),
        **{"paired": True, "method": "percentile", "n_resamples": RESAMPLES, "batch": BATCH, "rng": 0},
    ).confidence_interval
    return float(interval.low), float(interval.high)


# --- what it shows ---------------------------------------------------------------------------------------------------


def fields(certificate: Certificate) -> dict[str, str]:
    """The certificate as labels and values."""
    change, bias = certificate, "with" if certificate.bias else "no"
    return {
        "fitted": f"{change.fit}, to {change.calibration_tokens:,} training tokens, {bias} bias",
        "judged on": f"{change.rows:,} held-out rows, {change.tokens:,} supervised tokens",
        "loss": f"{change.loss_adapter:.4f} to {change.loss_export:.4f} nats a token",
        "change": f"{change.loss_change:+.5f}, 95 % interval {change.loss_change_lower:+.5f} to "
        f"{change.loss_change_upper:+.5f} (tolerance {change.tolerance:g})",
        "KL": f"{change.kl:.5f} nats a token",
        "same token": f"{change.same_tokens:.2%} of the likeliest",
    }


def scores(certificate: Certificate) -> dict[str, str]:
    """The figures of each task before and after, as labels and values."""
    shown = {}
    for task, results in certificate.accuracy.items():
        for name, form in SCORES.items():
            before, after = (results[model].get(name) for model in ("adapter", "export"))
            if before is not None and after is not None:
                shown[f"{task} {name}"] = f"{before:{form}} to {after:{form}}"
    return shown


def print_certificate(certificate: Certificate) -> None:
    """Prints the certificate, and the modules whose branches are the least linear."""
    print_fields(fields(certificate))
    least = sorted(certificate.explained.items(), key=lambda item: item[1])[:SHOWN]
    print()
    print_table(["least linear", "explained"], [[name, f"{share:.1%}"] for name, share in least], right={1})
    print()


def card(certificate: Certificate, adapter: Path, model: ModelConfig) -> str:
    """The README of an export."""
    what, library, tag = "A plain model", "transformers", "cera"
    if certificate.format == ExportFormat.lora:
        what, library, tag = "A LoRA in PEFT's format", "peft", "lora"
    shown = fields(certificate) | scores(certificate)
    rows = "\n".join(f"| {label} | {value} |" for label, value in shown.items())
    return (
        f"---\n{card_data(model, library, tag).to_yaml()}\n---\n\n{what}: the linear part of a CeRA adapter "
        f"({adapter}), whose gate was replaced by its best affine map.\n\n| | |\n|---|---|\n{rows}\n"
    )
