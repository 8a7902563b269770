"""The memory, the updates and the time of a run, from a dry run of its largest micro-batch."""

import functools
import os
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

from cera_train.adapters.build import check, check_quantised
from cera_train.adapters.families import title
from cera_train.common.terminal import announce
from cera_train.evaluation.held_out import PROBE_TOKENS
from cera_train.model.batches import RowOrder
from cera_train.model.folder import check_length, positions_of
from cera_train.model.precision import choose_precision
from cera_train.planning.data_size import (
    DataSize,
    check_tasks,
    data_size,
    read_rows,
    trained_size,
)
from cera_train.planning.dry_run import (
    CPU,
    DryRun,
    largest_micro_batch,
    memory_by_part,
    rows_of_process,
)
from cera_train.planning.plan import GPUS, Device, RunPlan, RunTotals
from cera_train.settings.model import Dtype, Quantization
from cera_train.settings.run import Config, PlanRun

CPU_MFU = 0.45
"""Share of a CPU's peak speed that SmolLM2-135M reached with CeRA (with LoRA 0.38: its dropout runs
over the whole input of a projection)."""


def estimate(config: PlanRun) -> RunPlan:
    """The plan of a run. Raises UserError where it cannot be planned."""
    on_gpu = config.plan.on_gpu
    check(config.adapter)
    read = read_rows(config)
    data = data_size(config, read)
    if config.model.dtype == Dtype.auto:  # every GPU here multiplies bf16
        dtype = Dtype.bfloat16 if on_gpu else choose_precision(Dtype.auto, CPU).value
        config = replace(config, model=replace(config.model, dtype=dtype))

    if config.model.quantization != Quantization.none:
        check_quantised(config.adapter)
    run = DryRun(config)
    check_length(config.model, config.data.max_length, "data.max_length", run.base.config)
    check_tasks(config, read, positions_of(run.base.config))
    announce("planning", f"{title(config.adapter)} on {config.model.path}")

    trained = trained_size(config, data)
    largest = largest_micro_batch(run, trained)
    update = run.update(largest)
    peak = update.peak
    if rows_of_process(config, trained) * trained.tokens_per_row > config.train.micro_batch_tokens:
        peak += run.memory["adapter"]  # gradients of earlier micro-batches
    evaluation = run.evaluation(largest)
    totals = run_totals(config, data)
    return RunPlan(
        config=config,
        device=GPUS[config.plan.gpu] if on_gpu else this_cpu(config.model.dtype),
        data=data,
        totals=totals,
        parameters=run.total,
        trainable=run.trainable,
        memory=memory_by_part(run, peak),
        flops={
            "training": update.flops / largest.tokens * totals.tokens,
            "evaluations": evaluation.flops / largest.tokens * totals.forward_tokens,
        },
    )


def run_totals(config: Config, data: DataSize) -> RunTotals:
    train = config.train
    work = config.work
    updates_per_epoch = RowOrder(data.train_rows, train.batch_size, train.seed).updates_per_epoch
    updates = train.max_updates or train.epochs * updates_per_epoch
    epochs, rest = divmod(updates, updates_per_epoch)
    rows = epochs * data.train_rows + min(rest * train.batch_size, data.train_rows)
    tokens = rows * config.sequences * trained_size(config, data).tokens_per_row

    # before the first update, after the last, and every so many between
    evaluations = 2 + ((updates - 1) // train.eval_every if train.eval_every else 0)
    row_tokens = config.data.sequences * data.tokens_per_row
    eval_tokens = data.eval_rows * row_tokens
    probe_tokens = min(PROBE_TOKENS, eval_tokens)
    reference_tokens = data.train_rows * row_tokens + eval_tokens
    return RunTotals(
        updates=updates,
        tokens=tokens,
        evaluations=evaluations,
        forward_tokens=evaluations * eval_tokens
        + (evaluations + 1) * probe_tokens
        + work.forward_passes * tokens
        + work.reference_passes * reference_tokens,
    )


@functools.cache
def this_cpu(dtype: Dtype) -> Device:
    """This machine: its memory, and its peak speed at matrix products: one thread's best, times the
    threads. Timing all at once would include waiting for other programs."""
    matrix = torch.randn(512, 512, dtype=getattr(torch, dtype))
    timer = Timer("matrix @ matrix", globals={"matrix": matrix})
    fastest = min(timer.blocked_autorange(min_run_time=0.5).times)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    speed = torch.get_num_threads() * 2 * 512**3 / fastest
    return Device("this CPU", memory, speed, CPU_MFU)
