"""A finished run's plan beside what the run measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.planning.data_size import data_size, is_known
from cera_train.planning.devices import GPUS, Device
from cera_train.planning.plan import RunPlan, make_plan, run_totals
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import Environment, RunResult
from cera_train.settings.planning import GpuKind, PlanConfig
from cera_train.settings.run import Config, PlanRun


@dataclass(frozen=True)
class Figure:
    """A quantity as it was predicted and as it was measured."""

    predicted: float | None
    """None where nothing can be predicted."""
    measured: float

    @property
    def deviation(self) -> float | None:
        """As a share of what was measured."""
        return None if self.predicted is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class Measured:
    """A finished run's figures."""

    plan: RunPlan
    """The run's, on the device it ran on, with the tokens it had."""
    trainable_parameters: Figure
    peak_memory: Figure
    """Bytes of a process."""
    update_seconds: Figure


def compare_with_measured(folder: Path, plan: PlanConfig) -> Measured:
    """Plans a finished run again. Of `plan` only `mfu` counts: device and tokens are the run's.

    Raises:
        UserError: the folder holds no finished run, or a file of it is broken.
    """
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
    is_unknown = bool(gpus) and kind is None

    config = replace(config, train=replace(config.train, max_updates=result.updates))  # it may have lost patience
    if unknown := [part for _, part in config.data.parts() if not is_known(part)]:
        rows = result.updates * config.train.batch_size
        config = replace(config, data=replace(unknown[0], train_rows=rows, eval_rows=unknown[0].eval_rows or rows))
    rows = run_totals(config, data_size(config.data, tokens_per_row=1)).rows
    plan = replace(
        plan,
        gpu=kind or (GpuKind.h100 if gpus else GpuKind.cpu),  # memory is alike on every GPU
        gpus=machine.processes or max(1, len(gpus)),  # which the first versions did not write down
        tokens_per_row=result.tokens / rows,
    )
    predicted = make_plan(PlanRun(**vars(config) | {"plan": plan}), machine.cpu_threads)
    if is_unknown:
        predicted = replace(predicted, device=Device(gpus[0], math.nan, math.nan))
    return Measured(
        predicted,
        Figure(predicted.parameters.trainable, result.trainable_parameters),
        Figure(predicted.peak, result.peak_memory_bytes),
        Figure(None if is_unknown else predicted.update_seconds, result.seconds / result.updates),
    )
