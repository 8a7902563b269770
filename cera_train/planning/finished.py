"""A finished run's plan beside what the run measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.terminal import print_table
from cera_train.common.trust import clean
from cera_train.config import Config, PlanRun
from cera_train.planning.config import GpuKind, PlanConfig
from cera_train.planning.data_size import data_size, is_known
from cera_train.planning.devices import GPUS, Device
from cera_train.planning.plan import RunPlan, plan_alone, run_totals
from cera_train.planning.table import size_of, speed
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import Environment, RunResult


class Figure(NamedTuple):
    """One figure of a finished run beside its prediction."""

    name: str
    predicted: float
    """NaN where nothing can be predicted."""
    measured: float
    show: Callable[[float], str] = "{:,.0f}".format

    @property
    def deviation(self) -> float:
        """As a share of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def cells(self) -> list[str]:
        if math.isnan(self.predicted):
            return [self.name, "-", self.show(self.measured), "-"]
        deviation = "equal" if self.predicted == self.measured else f"{self.deviation:+.1%}"
        return [self.name, self.show(self.predicted), self.show(self.measured), deviation]


def compare_with_measured(folder: Path, plan: PlanConfig) -> tuple[RunPlan, list[Figure]]:
    """Plans a finished run on the device it ran on, and puts the predictions beside what it measured. Of `plan` only
    `mfu` counts: device and tokens are the run's."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run={folder}: there is no config.yaml of a run. Name the folder of one, as outputs/NAME.")
    if not (folder / "result.json").is_file():
        raise UserError(f"run={folder} is unfinished: it has no result.json yet.")
    config = load_config(folder / "config.yaml", Config)
    needs = ("updates", "tokens", "seconds", "trainable_parameters", "peak_memory_bytes")
    result = RunResult.read(folder / "result.json", needs)
    if not all(getattr(result, name) for name in needs):
        raise UserError(f"{folder / 'result.json'} has a figure of zero that no run measures. Restore it.")
    machine = Environment.read(folder / "environment.json", ("gpus",))
    gpus = machine.gpus
    kind = next((kind for kind, gpu in GPUS.items() if gpus and gpu.cuda_name == gpus[0]), None)

    config = replace(config, train=replace(config.train, max_updates=result.updates))  # it may have lost patience
    if not is_known(config.data):
        rows = result.updates * config.train.batch_size
        config = replace(config, data=replace(config.data, train_rows=rows, eval_rows=config.data.eval_rows or rows))
    rows = run_totals(config, data_size(config.data, tokens_per_row=1)).rows
    plan = replace(
        plan,
        gpu=kind or (GpuKind.h100 if gpus else GpuKind.cpu),  # memory is alike on every GPU
        gpus=machine.processes or max(1, len(gpus)),  # which the first versions did not write down
        tokens_per_row=result.tokens / rows,
    )
    predicted = plan_alone(PlanRun(**vars(config) | {"plan": plan}), machine.cpu_threads)
    if gpus and kind is None:
        predicted = replace(predicted, device=Device(gpus[0], math.nan, math.nan))
    return predicted, [
        Figure("trainable parameters", predicted.parameters.trainable, result.trainable_parameters),
        Figure("peak memory", predicted.memory.peak, result.peak_memory_bytes, size_of),
        Figure("seconds an update", predicted.update_seconds, result.seconds / result.updates, "{:.3g}".format),
    ]


def print_measured(folder: Path, plan: PlanConfig) -> None:
    """Predicted beside measured, for a finished run."""
    predicted, figures = compare_with_measured(folder, plan)
    device = predicted.device
    print_table(["", "predicted", "measured", "deviation"], [figure.cells for figure in figures], right=(1, 2, 3))
    print(f"{predicted.data.tokens_per_row:,.0f} tokens a row, as the run had")
    if math.isnan(device.flops):
        print(f"no prediction of seconds: cera-plan does not know the speed of {clean(device.name)}")
    else:
        whose = f"the {device.name}" if predicted.config.plan.on_gpu else "this machine's CPU now"
        print(f"seconds by {speed(device.flops)}, the speed of {whose}, at {predicted.mfu:.0%} (plan.mfu)")
