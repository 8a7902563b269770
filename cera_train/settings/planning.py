"""Settings of cera-plan: the machine to plan a run on, and the variances of a study's outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, require_positive, section, setting


class GpuKind(StrEnum):
    h100 = "h100"
    a100 = "a100"
    l40s = "l40s"
    rtx4090 = "rtx4090"
    cpu = "cpu"


@dataclass
class SpreadConfig:
    """Standard deviations of the difference between two arms of a study, by outcome: {loss: 0.004, gsm8k: 0.01}. Those
    of losses are in nats a token, those of scores in shares."""

    seed: Any = setting(None, "nothing")
    """Between seeds, of the mean over all problems: 1.4 times that of a single arm."""
    problem: Any = setting(None, "nothing")
    """Between problems, or rows of a loss, of the mean over all seeds."""
    residual: Any = setting(None, "nothing")
    """The rest: one problem on one seed."""

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            numbers = values.values() if isinstance(values, dict) else [-1]
            require(
                values is None or all(isinstance(number, int | float) and number >= 0 for number in numbers),
                f"plan.spread.{name}={values}: expected outcomes and standard deviations, such as {{loss: 0.004}}.",
            )

    @property
    def by_outcome(self) -> dict[str, tuple[float, float, float]]:
        """Standard deviations between seeds, between problems, and beyond both; 0 where one is not given."""
        parts = [part or {} for part in (self.seed, self.problem, self.residual)]
        return {name: tuple(part.get(name, 0.0) for part in parts) for name in {**parts[0], **parts[1], **parts[2]}}


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
    spread: SpreadConfig = section(SpreadConfig)
    """For the smallest difference that a study detects."""

    def __post_init__(self) -> None:
        require_positive("plan", self, "gpus", "mfu", "price_per_hour", "tokens_per_row")
        require(self.mfu is None or self.mfu <= 1, f"plan.mfu={self.mfu} is a share of the peak: it must be at most 1.")

    @property
    def on_gpu(self) -> bool:
        return self.gpu != GpuKind.cpu
