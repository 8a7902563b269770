"""A run's parameters, memory, updates, time and cost, before it runs: the values of a plan. Making
one imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cera_train.common.libraries import heavy_imports
from cera_train.settings.run import GpuKind, PlanRun
from cera_train.settings.training import ObjectiveKind, OptimizerConfig
from cera_train.training.rewards import import_reward

if TYPE_CHECKING:
    from cera_train.planning.data_size import DataSize

GB = 1e9

# usable share of a GPU's memory: CUDA itself and the gaps of torch's allocator take the rest
USABLE = 0.95


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    peak_speed: float  # FLOP/s
    mfu: float = 0.4
    """Share of the peak speed that training reaches: on a GPU an assumption."""


GPUS = {
    GpuKind.h100: Device("H100", 80 * GB, 989e12),
    GpuKind.a100: Device("A100", 80 * GB, 312e12),
    GpuKind.l40s: Device("L40S", 48 * GB, 362e12),
    GpuKind.rtx4090: Device("RTX 4090", 24 * GB, 165e12),
}
"""Memory and dense bf16 speed by the vendor's data sheets (SXM cards, the A100 of 80 GB)."""


@dataclass(frozen=True)
class RunTotals:
    """How much of the data a run goes through, without an early stop by `train.patience`."""

    updates: int
    tokens: float  # of the sequences of all updates
    evaluations: int
    # of what needs no gradient: evaluations, probes of spectra, and passes of the objective
    forward_tokens: float


@dataclass(frozen=True)
class RunPlan:
    """A planned run."""

    config: PlanRun
    device: Device
    data: DataSize
    totals: RunTotals
    parameters: int
    trainable: int
    memory: dict[str, float]  # bytes of one process by part, at the peak of an update
    flops: dict[str, float]  # floating-point operations of the run by part

    @property
    def peak(self) -> float:
        """Bytes of one process, in training: an evaluation keeps no activations."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.device.memory

    @property
    def speed(self) -> float:
        """FLOP/s of all processes together."""
        return self.device.peak_speed * self.device.mfu * self.config.plan.gpus

    @property
    def seconds(self) -> float:
        """Seconds of the run, without those of generating answers."""
        return sum(self.flops.values()) / self.speed

    @property
    def update_seconds(self) -> float:
        """Seconds of an update, without those of evaluations and of sampling answers."""
        return self.flops["training"] / self.totals.updates / self.speed

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.config.plan.gpus

    @property
    def cost(self) -> float | None:
        price = self.config.plan.price_per_hour
        return None if price is None else price * self.gpu_hours


PLANS: dict[str, RunPlan] = {}
"""Plans of this process by what they depend on: runs that differ in seed or learning rate have one
plan."""


def make_plan(config: PlanRun) -> RunPlan:
    """Plans a run. Raises UserError where it cannot be planned, or the run would refuse it."""
    if config.train.objective == ObjectiveKind.grpo:
        for path in config.grpo.rewards:  # which nothing else of a plan reads
            import_reward(path)
    train = replace(config.train, seed=0)
    optimizer = OptimizerConfig(config.optimizer.kind)
    key = repr(replace(config, train=train, optimizer=optimizer, study=None))
    if key not in PLANS:
        with heavy_imports():
            from cera_train.planning.estimate import estimate

        PLANS[key] = estimate(config)
    return replace(PLANS[key], config=replace(config, model=PLANS[key].config.model))
