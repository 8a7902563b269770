"""A run's parameters, memory, updates, time and cost, before it runs.

No torch at module level: the size of the data is known, or refused, before torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cera_train.adapters.family import check_settings, with_kind
from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.model.precision import choose_precision
from cera_train.planning.answers import AnswerSize, sizes_of_samples, sizes_of_tasks, step_seconds
from cera_train.planning.data_size import DataSize, data_size
from cera_train.planning.devices import CPU_MFU, GPU_MFU, GPUS, USABLE, Device, this_cpu
from cera_train.settings.adapters import AdapterKind
from cera_train.settings.distributed import Strategy
from cera_train.settings.model import Dtype
from cera_train.settings.planning import CompareAt
from cera_train.settings.run import Config, PlanRun

if TYPE_CHECKING:
    from cera_train.planning.count import Parameters
    from cera_train.planning.dry_run import Cost, DryRun, MicroBatch

ROW_SPREAD = 0.4
"""Standard deviation of the tokens in a row over their mean: 0.36 on GSM8K, 0.43 on OpenOrca. The largest of many
updates is taken to be three standard deviations above the mean."""

PROCESS_BYTES = 610_000_000
"""Resident memory of Python, torch, transformers, peft and pandas, a tokenizer loaded and no model (on Linux)."""

CUDA_BUILD_BYTES = 320_000_000
"""What a torch built for CUDA, as PyPI's is on x86-64, holds besides where there is no GPU."""

HEAP_SHARE = 0.4
"""On a CPU, freed blocks below 32 MB stay with the C library's heap, and its gaps add about this share."""


@dataclass(frozen=True)
class RunTotals:
    """How much of the data a run goes through, without an early stop by `train.patience`."""

    updates: int
    rows: int
    """Training rows, as often as they are seen."""
    tokens: float
    evaluations: int
    eval_tokens: float
    """Tokens of all evaluations, and of the probes on which spectra are taken."""
    task_evaluations: int
    """Evaluations at which `train.tasks` are answered."""
    sample_evaluations: int
    """Evaluations with `train.samples`."""


@dataclass(frozen=True)
class RunPlan:
    """A planned run."""

    config: PlanRun
    device: Device
    data: DataSize
    tasks: list[AnswerSize]
    """Answers of an evaluation to `train.tasks`."""
    samples: list[AnswerSize]
    parameters: Parameters
    totals: RunTotals
    micro_batch: MicroBatch
    """The largest one, which needs the most memory."""
    memory: dict[str, float]
    """Bytes of one process by part, at the peak of an update."""
    evaluation_memory: float
    """Bytes of one process at the peak of an evaluation."""
    flops: dict[str, float]
    """Floating-point operations of the run by part."""
    token_flops: float
    """Operations of a token in an evaluation."""
    mfu: float
    compared: list[RunPlan] = field(default_factory=list)

    @property
    def peak(self) -> float:
        return max(sum(self.memory.values()), self.evaluation_memory)

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.device.memory

    @property
    def speed(self) -> float:
        """Operations a second in training."""
        return self.device.flops * self.mfu * self.config.plan.gpus

    @property
    def seconds(self) -> float:
        return sum(self.flops.values()) / self.speed + self.answer_seconds

    @property
    def update_seconds(self) -> float:
        """Seconds of an update, evaluations not counted."""
        return (self.flops["forward"] + self.flops["backward"]) / self.speed / self.totals.updates

    @property
    def answer_seconds(self) -> float:
        """Seconds of all answers and samples, if each is as long as it may be."""
        step = step_seconds(self.device, self.parameters.layers, self.parameters.weight_bytes)
        token = self.token_flops / (self.device.flops * self.mfu)

        def seconds(answers: Sequence[AnswerSize]) -> float:
            return sum(size.seconds(self.config.plan.gpus, step, token) for size in answers)

        totals = self.totals
        return totals.task_evaluations * seconds(self.tasks) + totals.sample_evaluations * seconds(self.samples)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.config.plan.gpus

    @property
    def cost(self) -> float | None:
        price = self.config.plan.price_per_hour
        return None if price is None else price * self.gpu_hours


PLANS: dict[str, RunPlan] = {}
"""Plans of this process by their shape."""


def make_plan(config: PlanRun, cpu_threads: int | None = None) -> RunPlan:
    """Plans a run and the same run with each adapter of `plan.compare`.

    Args:
        cpu_threads: of a run on a CPU; None: as many as torch takes.

    Raises:
        UserError: the run cannot be planned.
    """
    shape = f"{shape_of(config)} {cpu_threads}"
    if shape not in PLANS:
        PLANS[shape] = _plan_alone(config, cpu_threads)
    compared = [make_plan(_with_adapter(config, kind)) for kind in config.plan.compare]
    return replace(PLANS[shape], config=replace(config, model=PLANS[shape].config.model), compared=compared)


def shape_of(config: PlanRun) -> str:
    """What a plan depends on: runs that differ in their seed or learning rate have one plan."""
    train, plan = replace(config.train, seed=0), replace(config.plan, compare=[])
    return repr((config.model, config.adapter, config.data, train, config.optimizer.kind, config.distributed, plan))


def _plan_alone(config: PlanRun, cpu_threads: int | None) -> RunPlan:
    on_gpu = config.plan.on_gpu
    if not on_gpu and config.plan.gpus > 1:
        raise UserError(
            f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes all its threads. "
            "Leave plan.gpus at 1."
        )
    if config.model.dtype == Dtype.auto:  # every GPU in devices.py multiplies bf16
        dtype = Dtype.bfloat16 if on_gpu else choose_precision(Dtype.auto, cuda=False).dtype
        config = replace(config, model=replace(config.model, dtype=dtype))
    data = data_size(config.data, config.plan.tokens_per_row)
    tasks = sizes_of_tasks(config, data)
    with heavy_imports():
        from cera_train.planning.dry_run import DryRun
    run, totals = DryRun(config), run_totals(config, data)
    parameters = run.parameters
    if parameters.positions is not None and config.data.max_length > parameters.positions:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the {parameters.positions} positions of "
            f"{config.model.path}: lower it."
        )
    largest, usual = micro_batches(config, data, run)
    rows = math.ceil(config.train.batch_size / config.plan.gpus)
    highest = run.cost(largest, accumulates=rows * data.tokens_per_row > config.train.micro_batch_tokens)
    # Without a mask a token costs the same in every micro-batch.
    cost = run.cost(usual, accumulates=False) if usual.has_mask else highest
    tokens = usual.tokens if usual.has_mask else largest.tokens
    memory, evaluation = memory_of(config, run, highest)
    return RunPlan(
        config=config,
        device=GPUS[config.plan.gpu] if on_gpu else this_cpu(is_16bit(config), cpu_threads),
        data=data,
        tasks=tasks,
        samples=sizes_of_samples(config, data, tasks),
        parameters=parameters,
        totals=totals,
        micro_batch=largest,
        memory=memory,
        evaluation_memory=evaluation,
        flops={
            "forward": cost.forward / tokens * totals.tokens,
            "backward": cost.backward / tokens * totals.tokens,
            "evaluations": cost.evaluation / tokens * totals.eval_tokens,
        },
        token_flops=cost.evaluation / tokens,
        mfu=config.plan.mfu or (GPU_MFU if on_gpu else CPU_MFU),
    )


def run_totals(config: Config, size: DataSize) -> RunTotals:
    train = config.train
    updates_per_epoch = math.ceil(size.train_rows / train.batch_size)
    updates = train.max_updates or train.epochs * updates_per_epoch

    def times(every: int | None) -> int:
        """Before the first update, after the last, and every so many between."""
        return 2 + ((updates - 1) // every if every else 0)

    epochs, rest = divmod(updates, updates_per_epoch)
    rows = epochs * size.train_rows + min(rest * train.batch_size, size.train_rows)
    eval_tokens, evaluations = size.eval_rows * size.tokens_per_eval_row, times(train.eval_every)
    probes = (evaluations + 1) * min(train.probe_tokens, eval_tokens)
    return RunTotals(
        updates=updates,
        rows=rows,
        tokens=rows * size.tokens_per_row,
        evaluations=evaluations,
        eval_tokens=evaluations * eval_tokens + probes,
        task_evaluations=(times(train.tasks_every) if train.tasks_every else 1) if train.tasks else 0,
        sample_evaluations=evaluations if train.samples else 0,
    )


def micro_batches(config: PlanRun, size: DataSize, run: DryRun) -> tuple[MicroBatch, MicroBatch]:
    """The largest micro-batch of one process, which needs the most memory, and a usual one, which takes the time."""
    from cera_train.planning.dry_run import MicroBatch

    train, is_flat = config.train, run.loss.is_flat
    has_mask = run.loss.allowed.attention is None if is_flat else not size.is_even
    has_mask = has_mask or run.base.config._attn_implementation == "eager"
    rows = math.ceil(train.batch_size / config.plan.gpus)
    spread = 0 if size.is_even else 3 * ROW_SPREAD / math.sqrt(rows)
    most_tokens = rows * min(size.tokens_per_row * (1 + spread), config.data.max_length)
    longest = size.tokens_per_row if is_flat or size.is_even else config.data.max_length

    def batch(tokens: float, length: float) -> MicroBatch:
        tokens = min(tokens, train.micro_batch_tokens)
        rows = max(1, round(tokens / length))
        return MicroBatch(rows, max(2, round(tokens / rows)), size.supervised, has_mask)

    return batch(most_tokens, longest), batch(rows * size.tokens_per_row, size.tokens_per_row)


def is_16bit(config: PlanRun) -> bool:
    """Whether products are computed in 16 bits."""
    autocast = config.model.autocast_dtype(config.train.autocast, config.plan.on_gpu)
    return (autocast or config.model.dtype) != Dtype.float32


def memory_of(config: PlanRun, run: DryRun, cost: Cost) -> tuple[dict[str, float], float]:
    """Bytes of one process by part at the peak of an update, and the peak of an evaluation: on a GPU what torch
    allocates, on a CPU what is resident."""
    processes, is_sharded = config.plan.gpus, config.distributed.strategy == Strategy.fsdp
    parts, held = run.memory, sum(run.memory.values())
    if is_sharded and processes > 1:
        # What is outside the layers, and two layers, are whole while they compute.
        frozen, weights = run.parameters.frozen, run.memory["weights"]
        outside = weights * (frozen.get("embeddings", 0) + frozen["head"]) / sum(frozen.values())
        whole = outside + 2 * (weights - outside) / run.parameters.layers
        parts = {name: size / processes for name, size in parts.items()} | {"gathered": whole}
    elif processes > 1:
        parts = parts | {"buckets": run.memory["adapter"]}  # gradients a second time, as DDP sends them
    if not config.plan.on_gpu:
        import torch

        libraries = PROCESS_BYTES + (CUDA_BUILD_BYTES if torch.version.cuda else 0)
        parts = parts | {"libraries": libraries, "heap's gaps": HEAP_SHARE * (cost.peak - held)}
    always = sum(parts.values())
    return parts | {"gradients, activations": cost.peak - held}, always + cost.evaluation_peak - held


def _with_adapter(config: PlanRun, kind: AdapterKind) -> PlanRun:
    """The run with another adapter, at the same rank or the same number of parameters."""
    adapter = with_kind(config.adapter, kind)
    check_settings(adapter)
    if config.plan.compare_at == CompareAt.budget:
        from cera_train.planning.count import count_parameters

        ranks = (config.adapter, replace(adapter, r=1), replace(adapter, r=2))
        budget, one, two = (count_parameters(config.model, each).trainable for each in ranks)
        adapter = replace(adapter, r=max(1, 1 + round((budget - one) / (two - one))))
    return replace(config, adapter=adapter, plan=replace(config.plan, compare=[]))
