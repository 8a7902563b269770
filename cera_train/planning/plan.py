"""A run's parameters, memory, updates, time and cost, before it runs.

No torch at module level: the size of the data is known, or refused, before torch is imported.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cera_train.adapters.families import title
from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import require
from cera_train.common.terminal import announce
from cera_train.model.precision import choose_precision
from cera_train.planning.data_size import DataSize, count_problems, data_size, trained_size
from cera_train.settings.model import Dtype
from cera_train.settings.run import Config, GpuKind, PlanRun

if TYPE_CHECKING:
    from cera_train.planning.dry_run import MicroBatch

# --- devices --------------------------------------------------------------------------------------

GB = 1e9

GPU_MFU = 0.4
CPU_MFU = 0.45
"""Share of the peak speed that training reaches. On a GPU an assumption; on a CPU what SmolLM2-135M
reached with CeRA (with LoRA 0.38: its dropout runs over the whole input of a projection)."""

# usable share of a GPU's memory: CUDA itself and the gaps of torch's allocator take the rest
USABLE = 0.95


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    peak_speed: float  # FLOP/s


GPUS = {
    GpuKind.h100: Device("H100", 80 * GB, 989e12),
    GpuKind.a100: Device("A100", 80 * GB, 312e12),
    GpuKind.l40s: Device("L40S", 48 * GB, 362e12),
    GpuKind.rtx4090: Device("RTX 4090", 24 * GB, 165e12),
}
"""Memory and dense bf16 speed by the vendor's data sheets (SXM cards, the A100 of 80 GB)."""


def device_of(config: PlanRun) -> Device:
    """The planned device.

    Args:
        config: with a decided `model.dtype`.
    """
    if config.plan.on_gpu:
        return GPUS[config.plan.gpu]
    multiplied = config.model.autocast_dtype(config.train.autocast, on_gpu=False)
    return this_cpu(is_16bit=(multiplied or config.model.dtype) != Dtype.float32)


@functools.cache
def this_cpu(is_16bit: bool) -> Device:
    """This machine: its memory, and its peak speed at matrix products: one thread's best, times the
    threads. Timing all at once would include waiting for other programs."""
    import torch
    from torch.utils.benchmark import Timer

    matrix = torch.randn(512, 512, dtype=torch.bfloat16 if is_16bit else torch.float32)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix})
    fastest = min(timer.blocked_autorange(min_run_time=0.5).times)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, torch.get_num_threads() * 2 * 512**3 / fastest)


# --- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunTotals:
    """How much of the data a run goes through, without an early stop by `train.patience`."""

    updates: int
    tokens: float  # of the sequences of all updates
    evaluations: int
    # of what needs no gradient: evaluations, probes of spectra, and passes of the objective
    forward_tokens: float
    task_evaluations: int  # at which `train.tasks` are answered


@dataclass(frozen=True)
class RunPlan:
    """A planned run."""

    config: PlanRun
    device: Device
    mfu: float
    data: DataSize
    problems: dict[str, int]  # of each of `train.tasks`
    totals: RunTotals
    frozen: int  # parameters of the base
    trainable: int
    micro_batch: MicroBatch  # the largest one, which needs the most memory
    memory: dict[str, float]  # bytes of one process by part, at the peak of an update
    evaluation_memory: float  # bytes of one process at the peak of an evaluation
    flops: dict[str, float]  # floating-point operations of the run by part

    @property
    def peak(self) -> float:
        return max(sum(self.memory.values()), self.evaluation_memory)

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.device.memory

    @property
    def speed(self) -> float:
        """FLOP/s of all processes together."""
        return self.device.peak_speed * self.mfu * self.config.plan.gpus

    @property
    def seconds(self) -> float:
        """Seconds of the run, without those of generating answers."""
        return sum(self.flops.values()) / self.speed

    @property
    def update_seconds(self) -> float:
        """Seconds of an update, without those of evaluations and of sampling answers."""
        trained = self.flops["forward"] + self.flops["backward"]
        return trained / self.totals.updates / self.speed

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
    """Plans a run. Raises UserError where it cannot be planned."""
    train = replace(config.train, seed=0)
    sections = [config.model, config.adapter, config.data, train, config.work]
    key = repr([*sections, config.optimizer.kind, config.distributed, config.plan])
    if key not in PLANS:
        PLANS[key] = _plan(config)
    return replace(PLANS[key], config=replace(config, model=PLANS[key].config.model))


def _plan(config: PlanRun) -> RunPlan:
    on_gpu = config.plan.on_gpu
    require(
        on_gpu or config.plan.gpus == 1,
        f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes "
        "all its threads. Leave plan.gpus at 1.",
    )
    data = data_size(config.data, config.plan.tokens_per_row)
    problems = {name: count_problems(name, config, data) for name in config.train.tasks}
    if config.model.dtype == Dtype.auto:  # every GPU here multiplies bf16
        dtype = Dtype.bfloat16 if on_gpu else choose_precision(Dtype.auto, cuda=False).value
        config = replace(config, model=replace(config.model, dtype=dtype))

    with heavy_imports():
        from cera_train.model.folder import check_length
        from cera_train.planning.dry_run import DryRun, memory_by_part, micro_batches

    run = DryRun(config)
    check_length(config.model, config.data.max_length, "data.max_length", run.base.config)
    rank = f", r = {config.adapter.r}," if config.adapter.r else ""
    announce("planning", f"{title(config.adapter)}{rank} on {config.model.path}")

    trained = trained_size(config, data)
    largest, usual = micro_batches(run, trained)
    rows = math.ceil(config.sequences * config.train.batch_size / config.plan.gpus)
    accumulates = rows * trained.tokens_per_row > config.train.micro_batch_tokens
    cost = run.cost(largest, accumulates)
    memory = memory_by_part(run, cost.peak)
    evaluation_memory = sum(memory.values()) + cost.evaluation.peak - cost.peak

    timed = largest
    if usual.has_mask:  # else a token costs the same in every micro-batch
        timed = usual
        cost = run.cost(usual, accumulates=False)
    totals = run_totals(config, data)
    trained_tokens = config.work.passes * totals.tokens
    return RunPlan(
        config=config,
        device=device_of(config),
        mfu=config.plan.mfu or (GPU_MFU if on_gpu else CPU_MFU),
        data=data,
        problems=problems,
        totals=totals,
        frozen=run.total - run.trainable,
        trainable=run.trainable,
        micro_batch=largest,
        memory=memory,
        evaluation_memory=evaluation_memory,
        flops={
            "forward": cost.forward.flops / timed.tokens * trained_tokens,
            "backward": cost.backward.flops / timed.tokens * trained_tokens,
            "evaluations": cost.evaluation.flops / timed.tokens * totals.forward_tokens,
        },
    )


def run_totals(config: Config, data: DataSize) -> RunTotals:
    from cera_train.model.batches import RowOrder

    train = config.train
    work = config.work
    updates_per_epoch = RowOrder(data.train_rows, train.batch_size, train.seed).updates_per_epoch
    updates = train.max_updates or train.epochs * updates_per_epoch
    epochs, rest = divmod(updates, updates_per_epoch)
    rows = epochs * data.train_rows + min(rest * train.batch_size, data.train_rows)
    tokens = rows * config.sequences * trained_size(config, data).tokens_per_row

    def times(every: int | None) -> int:
        """Before the first update, after the last, and every so many between."""
        return 2 + ((updates - 1) // every if every else 0)

    evaluations = times(train.eval_every)
    task_evaluations = 0
    if train.tasks:
        task_evaluations = times(train.tasks_every) if train.tasks_every else 1

    row_tokens = config.data.sequences * data.tokens_per_row
    eval_tokens = data.eval_rows * row_tokens
    probe_tokens = min(train.probe_tokens, eval_tokens)
    reference_tokens = data.train_rows * row_tokens + eval_tokens
    return RunTotals(
        updates=updates,
        tokens=tokens,
        evaluations=evaluations,
        forward_tokens=evaluations * eval_tokens
        + (evaluations + 1) * probe_tokens
        + work.forward_passes * tokens
        + work.reference_passes * reference_tokens,
        task_evaluations=task_evaluations,
    )
