"""Settings of cera-plan: the machine to plan a run on, and the adapters to compare it with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cera_train.adapters.config import AdapterKind
from cera_train.common.settings import require, require_positive, setting


class GpuKind(StrEnum):
    h100 = "h100"
    a100 = "a100"
    l40s = "l40s"
    rtx4090 = "rtx4090"
    cpu = "cpu"


class CompareAt(StrEnum):
    rank = "rank"
    budget = "budget"


@dataclass
class PlanConfig:
    gpu: GpuKind = setting(GpuKind.h100, "nothing")
    """cpu: this machine's, whose speed is measured for half a second."""
    gpus: int = setting(1, "nothing")
    mfu: float | None = setting(None, "nothing")
    """Share of the peak speed that training reaches. null: 0.4 on a GPU; on a CPU the share measured with SmolLM2."""
    price_per_hour: float | None = setting(None, "nothing")
    """Price of one GPU, in any currency."""
    compare: list[AdapterKind] = setting(list, "nothing")
    """Other adapters, side by side with this one."""
    compare_at: CompareAt = setting(CompareAt.rank, "nothing")
    """rank: at the same rank; budget: at the rank that comes closest to the same number of parameters."""
    tokens_per_row: float | None = setting(None, "nothing")
    """null: from data.facts or the data files."""

    def __post_init__(self) -> None:
        require_positive("plan", self, "gpus", "mfu", "price_per_hour", "tokens_per_row")
        require(self.mfu is None or self.mfu <= 1, f"plan.mfu={self.mfu} is a share of the peak: it must be at most 1.")

    @property
    def on_gpu(self) -> bool:
        return self.gpu != GpuKind.cpu
