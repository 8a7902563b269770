"""Whether a server samples by the policy that trains. Two statistics of an update's answers decide:

    distance    the mean of |log p here - log p there| over the sampled tokens, in nats. Two engines
                round differently: what the base without an adapter shows is what rounding explains
    surprise    by Freedman's inequality, how unlikely it is that the likeliest token was sampled as
                often as it was, if the server drew by the log p that it sent. A temperature or a
                top-p that this log p leaves out shows here alone

A refusal ends the run, and does not guess at the mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.evaluation.held_out import token_losses
from cera_train.evaluation.requests import SampledTokens
from cera_train.model.batches import MicroBatches
from cera_train.training.build import Model

MOST_A_TOKEN = 1.0
"""Nats that a token differs by, at most: where rounding sends it to another expert, its log p may
be anything."""

TIMES_ROUNDING = 4.0
"""A distance up to this many times the base's counts as rounding: the adapter adds products of its
own, and answers may become less certain than the base's."""

HARMLESS = 1e-3
"""Nats a token; a smaller distance is never refused: it changes a probability by a thousandth."""

MOST_ROUNDING = 0.1
"""Nats a token; a larger distance between two copies of the base is no rounding. SmolLM2-135M in
bfloat16 is 0.03 from itself in float32, in NF4 0.5."""

MOST_SURPRISE = 20.0
"""Nats: sound answers surprise more in at most one of e^20 / 2, or 240 million, updates."""

DISTANCE = "train/sampling/log_p_difference"
LIMIT = "train/sampling/log_p_limit"


# --- the statistics -------------------------------------------------------------------------------


def log_p_distance(here: Tensor, there: Tensor) -> float:
    """Mean distance of the log p of tokens, [N] each, in nats a token."""
    distances = (here - there).abs().nan_to_num(MOST_A_TOKEN)
    return distances.clamp(max=MOST_A_TOKEN).mean().item()


def surprise(highest: Tensor, is_highest: Tensor) -> float:
    """Minus the log of Freedman's bound (Ann. Probab. 3, 1975) on the probability that the
    likeliest token is sampled so much more or less often than its probabilities say.

    Args:
        highest: [N] log p of the likeliest token in each place.
        is_highest: [N] whether it was sampled.
    """
    p = highest.double().exp()
    excess = (is_highest.double() - p).sum().abs()
    variance = (p * (1 - p)).sum().clamp(min=0)
    return (excess.square() / (2 * (variance + excess / 3) + 1e-12)).item()


class Tokens(NamedTuple):
    """The sampled tokens of all answers, one after the other, as the server saw them; [N] each."""

    log_p: Tensor
    highest: Tensor
    is_highest: Tensor

    @staticmethod
    def of(answers: list[SampledTokens]) -> Tokens:
        fields = zip(*answers, strict=True)
        return Tokens(*(torch.tensor([x for part in field for x in part]) for field in fields))


# --- the check ------------------------------------------------------------------------------------


@dataclass
class PolicyCheck:
    """Refuses answers of another policy than the model's.

    Args:
        place: the setting that names the server, for errors.
        limit: the largest accepted distance; None until `measure` finds it.
    """

    place: str
    model: Model
    limit: float | None

    def measure(self, batches: MicroBatches, answers: list[SampledTokens]) -> None:
        """Sets the limit by answers of the server's base, which no adapter changes. Raises
        UserError where they are too far away for rounding."""
        with self.model.adapted.disable_adapter():
            rounding = log_p_distance(self._log_p(batches), Tokens.of(answers).log_p)
        self._refuse_beyond(MOST_ROUNDING, rounding, "the base without an adapter")
        self.limit = max(HARMLESS, TIMES_ROUNDING * rounding)

    def check(self, batches: MicroBatches, answers: list[SampledTokens]) -> dict[str, float]:
        """Returns figures for metrics.jsonl. Raises UserError where the answers are not the
        model's."""
        tokens = Tokens.of(answers)
        distance = log_p_distance(self._log_p(batches), tokens.log_p)
        self._refuse_beyond(self.limit, distance, "the adapter in training")
        if surprise(tokens.highest, tokens.is_highest) > MOST_SURPRISE:
            sampled = int(tokens.is_highest.sum())
            expected = float(tokens.highest.exp().sum())
            direction = "below" if sampled > expected else "above"
            raise UserError(
                f"{self.place} sampled the likeliest token {sampled:,} times of "
                f"{len(tokens.log_p):,}, and {expected:,.0f} were to be expected by its own log p: "
                f"it samples at a temperature {direction} 1, or from a part of the vocabulary. "
                "Remove what changes the settings of requests, such as a proxy or a plugin."
            )
        return {DISTANCE: distance, LIMIT: self.limit}

    def _log_p(self, batches: MicroBatches) -> Tensor:
        """[N] log p of the answers' tokens under the model as it is."""
        rows = range(len(batches.lengths))
        model = self.model
        losses = token_losses(model.language_model, batches, rows, model.accelerator)
        return -torch.from_numpy(losses.losses)

    def _refuse_beyond(self, limit: float, distance: float, policy: str) -> None:
        require(
            distance <= limit,
            f"{self.place} answers by another policy than {policy}: its log p are {distance:.2g} "
            f"nats a token away (rounding: at most {limit:.2g}). Start vLLM again, on the base of "
            "this run and at a temperature of 1, and the same command resumes; or allow more by "
            "grpo.max_sampler_distance.",
        )
