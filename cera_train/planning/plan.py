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
from cera_train.common.errors import UserError
from cera_train.common.libraries import heavy_imports
from cera_train.common.terminal import announce
from cera_train.model.precision import choose_precision
from cera_train.planning.data_size import (
    DataSize,
    count_problems,
    data_size,
    trained_size,
)
from cera_train.settings.distributed import Strategy
from cera_train.settings.model import Dtype
from cera_train.settings.run import Config, GpuKind, PlanRun

if TYPE_CHECKING:
    from cera_train.planning.dry_run import DryRun, MicroBatch

ROW_SPREAD = 0.4
"""Standard deviation of the tokens in a row over their mean: 0.36 on GSM8K, 0.43 on OpenOrca. The
largest of many updates is taken to be three standard deviations above the mean."""

PROCESS_BYTES = 610_000_000
"""Resident memory of Python, torch, transformers, peft and pandas, a tokenizer loaded and no model
(on Linux)."""

CUDA_BUILD_BYTES = 320_000_000
"""Resident memory that a torch built for CUDA, as PyPI's is on x86-64, adds on a machine without a
GPU."""

# on a CPU, freed blocks below 32 MB stay with the C library's heap, and its gaps add about this
# share
HEAP_SHARE = 0.4


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
    flops: float  # peak operations a second


GPUS = {
    GpuKind.h100: Device("H100", 80 * GB, 989e12),
    GpuKind.a100: Device("A100", 80 * GB, 312e12),
    GpuKind.l40s: Device("L40S", 48 * GB, 362e12),
    GpuKind.rtx4090: Device("RTX 4090", 24 * GB, 165e12),
}
"""Memory and dense bf16 speed by the vendor's data sheets (SXM cards, the A100 of 80 GB)."""


@functools.cache
def this_cpu(is_16bit: bool) -> Device:
    """This machine: its memory, and its peak speed at matrix products: one thread's best, times the
    threads. Timing all at once would include waiting for other programs."""
    import torch
    from torch.utils.benchmark import Timer

    matrix = torch.randn(512, 512, dtype=torch.bfloat16 if is_16bit else torch.float32)
    measured = Timer("matrix @ matrix", globals={"matrix": matrix}).blocked_autorange(
        min_run_time=0.5
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = torch.get_num_threads() * 2 * 512**3 / min(measured.times)
    return Device("this CPU", memory, flops)


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
        """Operations a second of all processes, at the share of the peak that training reaches."""
        return self.device.flops * self.mfu * self.config.plan.gpus

    @property
    def seconds(self) -> float:
        """Seconds of the run, without those of generating answers."""
        return sum(self.flops.values()) / self.speed

    @property
    def update_seconds(self) -> float:
        """Seconds of an update, evaluations not counted."""
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
    parts = [config.model, config.adapter, config.data, train, config.work, config.optimizer.kind]
    shape = repr([*parts, config.distributed, config.plan])
    if shape not in PLANS:
        PLANS[shape] = _plan(config)
    return replace(PLANS[shape], config=replace(config, model=PLANS[shape].config.model))


def _plan(config: PlanRun) -> RunPlan:
    on_gpu = config.plan.on_gpu
    if not on_gpu and config.plan.gpus > 1:
        raise UserError(
            f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes "
            f"all its threads. "
            "Leave plan.gpus at 1."
        )
    data = data_size(config.data, config.plan.tokens_per_row)
    trained = trained_size(config, data)
    problems = {name: count_problems(name, config, data) for name in config.train.tasks}
    totals = run_totals(config, data)
    if config.model.dtype == Dtype.auto:  # every GPU here multiplies bf16
        dtype = Dtype.bfloat16 if on_gpu else choose_precision(Dtype.auto, cuda=False).value
        config = replace(config, model=replace(config.model, dtype=dtype))
    with heavy_imports():
        from cera_train.model.folder import check_length
        from cera_train.planning.dry_run import DryRun
    run = DryRun(config)
    check_length(config.model, config.data.max_length, "data.max_length", run.base.config)
    rank = f", r = {config.adapter.r}," if config.adapter.r else ""
    announce("planning", f"{title(config.adapter)}{rank} on {config.model.path}")
    largest, usual = micro_batches(config, trained, run)
    rows = math.ceil(config.sequences * config.train.batch_size / config.plan.gpus)
    highest = run.cost(
        largest, accumulates=rows * trained.tokens_per_row > config.train.micro_batch_tokens
    )
    # Without a mask a token costs the same in every micro-batch.
    batch, cost = (
        (usual, run.cost(usual, accumulates=False)) if usual.has_mask else (largest, highest)
    )
    operations = {name: part.operations / batch.tokens for name, part in cost._asdict().items()}
    autocast = config.model.autocast_dtype(config.train.autocast, on_gpu)
    device = (
        GPUS[config.plan.gpu]
        if on_gpu
        else this_cpu((autocast or config.model.dtype) != Dtype.float32)
    )
    mfu = config.plan.mfu or (GPU_MFU if on_gpu else CPU_MFU)
    memory = memory_of(config, run, highest.peak)
    trained_tokens = config.work.passes * totals.tokens
    return RunPlan(
        config=config,
        device=device,
        mfu=mfu,
        data=data,
        problems=problems,
        totals=totals,
        frozen=run.total - run.trainable,
        trainable=run.trainable,
        micro_batch=largest,
        memory=memory,
        evaluation_memory=sum(memory.values()) + highest.evaluation.peak - highest.peak,
        flops={
            "forward": operations["forward"] * trained_tokens,
            "backward": operations["backward"] * trained_tokens,
            "evaluations": operations["evaluation"] * totals.forward_tokens,
        },
    )


def run_totals(config: Config, size: DataSize) -> RunTotals:
    train = config.train
    work = config.work
    updates_per_epoch = math.ceil(size.train_rows / train.batch_size)
    updates = train.max_updates or train.epochs * updates_per_epoch

    def times(every: int | None) -> int:
        """Before the first update, after the last, and every so many between."""
        return 2 + ((updates - 1) // every if every else 0)

    epochs, rest = divmod(updates, updates_per_epoch)
    rows = epochs * size.train_rows + min(rest * train.batch_size, size.train_rows)
    tokens = rows * config.sequences * trained_size(config, size).tokens_per_row
    row_tokens = config.data.sequences * size.tokens_per_row
    eval_tokens = size.eval_rows * row_tokens
    evaluations = times(train.eval_every)
    forward_tokens = evaluations * eval_tokens + (evaluations + 1) * min(
        train.probe_tokens, eval_tokens
    )
    reference_tokens = size.train_rows * row_tokens + eval_tokens
    forward_tokens += work.forward_passes * tokens + work.reference_passes * reference_tokens
    return RunTotals(
        updates=updates,
        tokens=tokens,
        evaluations=evaluations,
        forward_tokens=forward_tokens,
        task_evaluations=(times(train.tasks_every) if train.tasks_every else 1)
        if train.tasks
        else 0,
    )


def micro_batches(config: PlanRun, size: DataSize, run: DryRun) -> tuple[MicroBatch, MicroBatch]:
    """The largest micro-batch of one process, which needs the most memory, and a usual one, which
    takes the time."""
    from cera_train.planning.dry_run import MicroBatch

    train = config.train
    is_flat = run.language_model.is_flat
    has_mask = run.language_model.allowed.attention is None if is_flat else not size.is_even
    has_mask = has_mask or run.base.config._attn_implementation == "eager"
    rows = math.ceil(config.sequences * train.batch_size / config.plan.gpus)
    max_length = config.data.max_length + config.work.answer_tokens
    spread = 0 if size.is_even else 3 * ROW_SPREAD / math.sqrt(rows)
    most_tokens = rows * min(size.tokens_per_row * (1 + spread), max_length)
    longest = size.tokens_per_row if is_flat or size.is_even else max_length

    def batch(tokens: float, length: float) -> MicroBatch:
        tokens = min(tokens, train.micro_batch_tokens)
        rows = max(1, round(tokens / length))
        return MicroBatch(rows, max(2, round(tokens / rows)), size.supervised, has_mask)

    return batch(most_tokens, longest), batch(rows * size.tokens_per_row, size.tokens_per_row)


def memory_of(config: PlanRun, run: DryRun, peak: float) -> dict[str, float]:
    """Bytes of one process by part at the peak of an update: on a GPU what torch allocates, on a
    CPU what is resident."""
    processes = config.plan.gpus
    held = sum(run.memory.values())
    parts = dict(run.memory)
    if processes > 1 and config.distributed.strategy == Strategy.fsdp:
        parts = {name: size / processes for name, size in parts.items()}
        # FSDP2 gathers into a buffer and copies from there: as the first layer begins, what is
        # outside the layers is in memory twice. Later the buffer holds the next layer.
        activations = peak - held
        parts["gathered"] = run.outside + 2 * run.layer + max(0, run.outside - activations)
    elif processes > 1:
        parts["buckets"] = parts["adapter"]  # gradients a second time, as DDP sends them
    if not config.plan.on_gpu:
        import torch

        parts["libraries"] = PROCESS_BYTES + (CUDA_BUILD_BYTES if torch.version.cuda else 0)
        parts["heap's gaps"] = HEAP_SHARE * (peak - held)
    return parts | {"gradients, activations": peak - held}
