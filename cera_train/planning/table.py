"""Plans as tables in the terminal: one run and those compared with it, the jobs of a sweep, or a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cera_train.adapters.config import AdapterConfig
from cera_train.common.settings import Changes, changes_of, flatten, to_plain
from cera_train.common.terminal import duration, gigabytes, print_line, print_table, targets
from cera_train.common.trust import clean
from cera_train.config import PlanRun
from cera_train.model.config import Quantization
from cera_train.planning.config import GpuKind, PlanConfig
from cera_train.planning.devices import GB, USABLE
from cera_train.planning.finished import Figure, compare_with_measured
from cera_train.planning.plan import RunPlan

Row = tuple[str, Callable[[RunPlan], str] | None]
"""A label and a cell of each plan. A heading has no cell."""


# --- one plan --------------------------------------------------------------------------------------------------------


def print_plan(plan: RunPlan) -> None:
    """The plan, and the compared ones beside it."""
    config, data, device = plan.config, plan.data, plan.device
    quantization = "" if config.model.quantization == Quantization.none else f", {config.model.quantization}"
    precision = f"{config.model.dtype}{quantization}"
    print_line("plan", f"{config.name}: {describe(config.adapter)} on {config.model.path}, {precision}")
    where = config.data.path or ", ".join(config.data.train_files) or config.data.layout
    print_line(
        "data",
        f"{where}: {data.train_rows:,} rows of {data.tokens_per_row:,.0f} tokens ({data.source}), "
        f"{data.supervised:.0%} supervised; {data.eval_rows:,} to evaluate",
    )
    seen = "seen with SmolLM2-135M" if config.plan.gpu == GpuKind.cpu else "an assumption"
    assumed = "plan.mfu" if config.plan.mfu else f"{seen}; set plan.mfu"
    print_line(
        "device",
        f"{config.plan.gpus} x {device.name}, {device.memory / GB:.0f} GB, "
        f"{_scaled(device.flops, 'FLOP/s')} at best, {plan.mfu:.0%} of it in training ({assumed})",
    )
    print()
    plans = [plan, *plan.compared]
    heads = [f"{other.config.adapter.kind} r={other.config.adapter.r}" if plan.compared else "" for other in plans]
    rows = [[label, *(cell(other) if cell else "" for other in plans)] for label, cell in _rows(plan)]
    print_table(["", *heads], rows, right=range(1, len(plans) + 1))
    print()
    _print_fit(plans)
    if plan.cost is None and config.plan.gpu != GpuKind.cpu:
        print_line("cost", "set plan.price_per_hour to the price of one GPU")


def describe(adapter: AdapterConfig) -> str:
    """An adapter in a few words."""
    return f"{adapter.kind} r={adapter.r} on {targets(adapter.target_modules)}"


def _rows(first: RunPlan) -> list[Row]:
    def counts(prefix: str, part: str) -> list[Row]:
        return [
            (f"  {prefix}{name}", lambda plan, name=name: f"{getattr(plan.parameters, part).get(name, 0):,}")
            for name in getattr(first.parameters, part)
        ]

    is_gpu = first.config.plan.gpu != GpuKind.cpu
    hours: Row = ("  GPU-hours", lambda plan: f"{plan.gpu_hours:,.2f}")
    cost: Row = ("  cost", lambda plan: f"{plan.cost:,.2f}")
    return [
        ("parameters", None),
        *counts("", "frozen"),
        ("  frozen", lambda plan: f"{sum(plan.parameters.frozen.values()):,}"),
        *counts("adapter ", "adapter"),
        ("  trainable", lambda plan: f"{plan.parameters.trainable:,}"),
        ("  share", lambda plan: f"{plan.parameters.share:.2%}"),
        ("memory of one process", None),
        *(
            (f"  {name}", lambda plan, name=name: _gigabytes(plan.memory.training[name]))
            for name in first.memory.training
        ),
        ("  peak in training", lambda plan: _gigabytes(sum(plan.memory.training.values()))),
        ("  peak in evaluation", lambda plan: _gigabytes(sum(plan.memory.evaluation.values()))),
        (
            f"  activations with{'out' * first.config.model.gradient_checkpointing} checkpointing",
            lambda plan: _gigabytes(plan.other_activations),
        ),
        ("work", None),
        ("  updates", lambda plan: f"{plan.totals.updates:,}"),
        ("  tokens", lambda plan: f"{plan.totals.tokens:,.0f}"),
        ("  evaluations", lambda plan: f"{plan.totals.evaluations:,}"),
        ("PFLOP", None),
        *((f"  {name}", lambda plan, name=name: _petaflops(plan.flops[name])) for name in first.flops),
        ("  in all", lambda plan: _petaflops(sum(plan.flops.values()))),
        ("time and cost", None),
        ("  an update", lambda plan: f"{plan.update_seconds:.3g} s"),
        ("  the run, h:mm:ss", lambda plan: duration(plan.seconds)),
        *([hours] if is_gpu else []),
        *([cost] if first.cost is not None else []),
    ]


def _print_fit(plans: list[RunPlan]) -> None:
    for plan in plans:
        needs = f"{describe(plan.config.adapter)} needs {_gigabytes(plan.memory.peak)}"
        there = f"{plan.device.memory / GB:.0f} GB of {plan.device.name}"
        if plan.fits:
            print_line("fits", f"{needs} of the {there}")
        else:
            print_line("too large", f"{needs}, more than {USABLE:.0%} of the {there}")
    for override, other in plans[0].remedies.items():
        verdict = "fits" if other.fits else "still too large"
        print_line("", f"{_gigabytes(other.memory.peak)} with {override}: {verdict}")


# --- a sweep ---------------------------------------------------------------------------------------------------------


def print_sweep_plans(plans: list[RunPlan]) -> None:
    """The jobs of a sweep, one a line by what differs, and their sum."""
    settings = [_settings(plan) for plan in plans]
    keys = [key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings)]
    for path in ("model.path", "data.path"):  # tells its whole section apart
        section = path.split(".")[0] + "."
        keys = [key for key in keys if path not in keys or key == path or not key.startswith(section)]
    rows = [
        [
            " ".join(f"{key}={values.get(key)}" for key in keys) or plan.config.name,
            f"{plan.parameters.trainable:,}",
            *_job_cells([plan]),
            "" if plan.fits else f"does not fit {plan.device.name}",
        ]
        for values, plan in zip(settings, plans, strict=True)
    ]
    jobs = "1 job" if len(plans) == 1 else f"{len(plans)} jobs"
    heads = ["job", "trainable", "peak", "updates", "time", "GPU-hours", "cost", ""]
    print_table(heads, [*rows, [jobs, "", *_job_cells(plans), ""]], right=range(1, 7))


def _job_cells(plans: list[RunPlan]) -> list[str]:
    """Peak, updates, time, GPU-hours and cost of all these together."""
    costs = [plan.cost for plan in plans]
    return [
        _gigabytes(max(plan.memory.peak for plan in plans)),
        f"{sum(plan.totals.updates for plan in plans):,}",
        duration(sum(plan.seconds for plan in plans)),
        f"{sum(plan.gpu_hours for plan in plans):,.2f}",
        "" if None in costs else f"{sum(costs):,.2f}",
    ]


def _settings(plan: RunPlan) -> dict[str, Any]:
    """The settings that can tell jobs apart."""
    settings = flatten(to_plain(plan.config))
    return {key: value for key, value in settings.items() if changes_of(PlanRun, key) != Changes.nothing}


# --- after a run -----------------------------------------------------------------------------------------------------


def print_measured(folder: Path, plan: PlanConfig) -> None:
    """Predicted beside measured, for a finished run."""
    predicted, figures = compare_with_measured(folder, plan)
    device = predicted.device
    heads = ["", "predicted", "measured", "deviation"]
    print_table(heads, [_figure_cells(figure) for figure in figures], right=(1, 2, 3))
    print(f"{predicted.data.tokens_per_row:,.0f} tokens a row, as the run had")
    if math.isnan(device.flops):
        print(f"no prediction of seconds: cera-plan does not know the speed of {clean(device.name)}")
    else:
        whose = "this machine's CPU now" if predicted.config.plan.gpu == GpuKind.cpu else f"the {device.name}"
        print(f"seconds by {_scaled(device.flops, 'FLOP/s')}, the speed of {whose}, at {predicted.mfu:.0%} (plan.mfu)")


def _figure_cells(figure: Figure) -> list[str]:
    show = {"bytes": _gigabytes, "seconds": "{:.3g}".format}.get(figure.unit, "{:,.0f}".format)
    if math.isnan(figure.predicted):
        return [figure.name, "-", show(figure.measured), "-"]
    deviation = "equal" if figure.predicted == figure.measured else f"{figure.deviation:+.1%}"
    return [figure.name, show(figure.predicted), show(figure.measured), deviation]


def _gigabytes(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)


def _petaflops(flops: float) -> str:
    return f"{flops / 1e15:,.3f}" if flops < 1e17 else f"{flops / 1e15:,.0f}"


def _scaled(value: float, unit: str) -> str:
    return f"{value / 1e12:,.0f} T{unit}" if value >= 1e12 else f"{value / 1e9:,.0f} G{unit}"
