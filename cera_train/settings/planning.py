"""Settings of cera-plan: the machine to plan a run on, and the variances of a study's outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, require_positive, setting


class GpuKind(StrEnum):
    h100 = "h100"
    a100 = "a100"
    l40s = "l40s"
    rtx4090 = "rtx4090"
    cpu = "cpu"


def are_deviations(value: Any) -> bool:
    is_triple = isinstance(value, list) and len(value) == 3
    return is_triple and all(isinstance(number, int | float) and number >= 0 for number in value)


@dataclass
class PlanConfig:
    gpu: GpuKind = setting(GpuKind.h100, "nothing")
    """cpu: this machine's, whose speed is measured for half a second."""
    gpus: int = setting(1, "nothing")
    mfu: float | None = setting(None, "nothing")
    """Share of the peak speed that training reaches. null: 0.4 on a GPU; on a CPU the share measured with SmolLM2."""
    price_per_hour: float | None = setting(None, "nothing")
    """Price of one GPU, in any currency."""
    tokens_per_row: float | None = setting(None, "nothing")
    """null: from data.facts or the data files."""
    spread: Any = setting(None, "nothing")
    """How the difference between two arms of a study varies, by outcome, such as {loss: [0.002, 0.02, 0.02]}: standard
    deviations between seeds, between problems or rows, and beyond both; in nats a token, or in shares of a score."""

    def __post_init__(self) -> None:
        require_positive("plan", self, "gpus", "mfu", "price_per_hour", "tokens_per_row")
        spread = self.spread or {}
        require(
            isinstance(spread, dict) and all(map(are_deviations, spread.values())),
            f"plan.spread={spread}: expected three standard deviations an outcome, as {{loss: [0.002, 0.02, 0.02]}}.",
        )
        require(self.mfu is None or self.mfu <= 1, f"plan.mfu={self.mfu} is a share of the peak: it must be at most 1.")

    @property
    def on_gpu(self) -> bool:
        return self.gpu != GpuKind.cpu
