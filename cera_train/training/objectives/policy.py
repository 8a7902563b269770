"""Whether a server samples by the policy that trains: the distance, the mean of |log p here - log p
there| over the sampled tokens, in nats. Two engines round differently: what the base without an
adapter shows is what rounding explains. A refusal ends the run, and does not guess at the mistake.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from cera_train.common.settings import require
from cera_train.evaluation.held_out import token_losses
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

DISTANCE = "train/sampling/log_p_difference"
LIMIT = "train/sampling/log_p_limit"


# --- the distance ---------------------------------------------------------------------------------


def log_p_distance(here: Tensor, there: list[list[float]]) -> float:
    """Mean distance of the log p of tokens, [N] here and of each answer there, in nats a token."""
    distances = (
        (here - torch.tensor(list(itertools.chain.from_iterable(there))))
        .abs()
        .nan_to_num(MOST_A_TOKEN)
    )
    return distances.clamp(max=MOST_A_TOKEN).mean().item()


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

    def measure(self, batches: MicroBatches, log_p: list[list[float]]) -> None:
        """Sets the limit by log p of answers of the server's base, which no adapter changes. Raises
        UserError where they are too far away for rounding."""
        with self.model.adapted.disable_adapter():
            rounding = log_p_distance(self._log_p(batches), log_p)
        self._refuse_beyond(MOST_ROUNDING, rounding, "the base without an adapter")
        self.limit = max(HARMLESS, TIMES_ROUNDING * rounding)

    def check(self, batches: MicroBatches, log_p: list[list[float]]) -> dict[str, float]:
        """Returns figures for metrics.jsonl. Raises UserError where the answers are not the
        model's."""
        distance = log_p_distance(self._log_p(batches), log_p)
        self._refuse_beyond(self.limit, distance, "the adapter in training")
        return {DISTANCE: distance, LIMIT: self.limit}

    def _log_p(self, batches: MicroBatches) -> Tensor:
        """[N] log p of the answers' tokens under the model as it is."""
        model = self.model
        losses = token_losses(model.language_model, batches, model.accelerator)
        return -torch.from_numpy(losses.losses)

    def _refuse_beyond(self, limit: float, distance: float, policy: str) -> None:
        require(
            distance <= limit,
            f"{self.place} answers by another policy than {policy}: its log p are {distance:.2g} "
            f"nats a token away (rounding: at most {limit:.2g}). Start vLLM again, on the base of "
            "this run and at a temperature of 1, and the same command resumes.",
        )
