"""The memory, the updates and the time of a run, from a dry run of its largest micro-batch."""

import functools
import os
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

from cera_train.adapters.families import title
from cera_train.common.terminal import announce
from cera_train.model.batches import RowOrder
from cera_train.model.folder import check_length
from cera_train.model.precision import choose_precision
from cera_train.planning.data_size import DataSize, trained_size
from cera_train.planning.dry_run import (
    Cost,
    DryRun,
    filled,
    memory_by_part,
    micro_batches,
    rows_of_process,
)
from cera_train.planning.meter import Reading
from cera_train.planning.plan import GPUS, Device, RunPlan, RunTotals
from cera_train.settings.model import Dtype
from cera_train.settings.run import Config, PlanRun

GPU_MFU = 0.4
CPU_MFU = 0.45
"""Share of the peak speed that training reaches. On a GPU an assumption; on a CPU what SmolLM2-135M
reached with CeRA (with LoRA 0.38: its dropout runs over the whole input of a projection)."""


def estimate(config: PlanRun, data: DataSize, problems: dict[str, int], is_alone: bool) -> RunPlan:
    """The plan of a run on data of this size. Raises UserError where it cannot be planned.

    Args:
        problems: those of each of `train.tasks`.
        is_alone: as of `make.make_plan`.
    """
    on_gpu = config.plan.on_gpu
    if config.model.dtype == Dtype.auto:  # every GPU here multiplies bf16
        dtype = Dtype.bfloat16 if on_gpu else choose_precision(Dtype.auto, cuda=False).value
        config = replace(config, model=replace(config.model, dtype=dtype))

    run = DryRun(config)
    check_length(config.model, config.data.max_length, "data.max_length", run.base.config)
    rank = f", r = {config.adapter.r}," if config.adapter.r else ""
    announce("planning", f"{title(config.adapter)}{rank} on {config.model.path}")

    trained = trained_size(config, data)
    largest, usual = micro_batches(run, trained)
    rows = rows_of_process(config, trained)
    accumulates = rows * trained.tokens_per_row > config.train.micro_batch_tokens
    cost = run.cost(largest, accumulates)
    memory = memory_by_part(run, cost.peak)
    costs = {largest: cost}
    # Rows of this run may be too few or too short to fill a micro-batch.
    full = filled(largest, config.train.micro_batch_tokens)
    full_peak = None
    if is_alone and full != largest:
        costs[full] = full_cost = run.cost(full, accumulates=True)
        full_memory = memory_by_part(run, full_cost.peak)
        in_evaluation = evaluation_peak(full_memory, full_cost, full_cost.evaluation)
        full_peak = max(sum(full_memory.values()), in_evaluation)

    # train.batch_size does not bound the micro-batches of held-out rows.
    eval_tokens = data.eval_rows * config.data.sequences * data.tokens_per_row / config.plan.gpus
    held_out = filled(largest, min(config.train.micro_batch_tokens, round(eval_tokens)))
    evaluation = costs[held_out].evaluation if held_out in costs else run.evaluation(held_out)
    evaluation_memory = evaluation_peak(memory, cost, evaluation)

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
        full_peak=full_peak,
        flops={
            "forward": cost.forward.flops / timed.tokens * trained_tokens,
            "backward": cost.backward.flops / timed.tokens * trained_tokens,
            "evaluations": cost.evaluation.flops / timed.tokens * totals.forward_tokens,
        },
    )


def evaluation_peak(memory: dict[str, float], cost: Cost, evaluation: Reading) -> float:
    """Bytes of one process at the peak of an evaluation.

    Args:
        memory: by part, at the peak of an update, which takes `cost`.
    """
    return sum(memory.values()) + evaluation.peak - cost.peak


def run_totals(config: Config, data: DataSize) -> RunTotals:
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
    matrix = torch.randn(512, 512, dtype=torch.bfloat16 if is_16bit else torch.float32)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix})
    fastest = min(timer.blocked_autorange(min_run_time=0.5).times)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, torch.get_num_threads() * 2 * 512**3 / fastest)
