"""What a run will need, before it runs: parameters, memory, updates, time and cost, from its config alone. And after a
run, what was predicted beside what was measured."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cera_train.adapters.config import Activation, AdapterConfig, AdapterKind
from cera_train.common.errors import UserError
from cera_train.common.settings import Changes, changes_of, flatten, to_plain
from cera_train.common.terminal import print_line
from cera_train.common.text import duration, gigabytes, targets
from cera_train.config import Config, PlanRun
from cera_train.model.config import Dtype, Quantization
from cera_train.planning.architecture import (
    adapted_linears,
    adapter_parameters,
    frozen_parameters,
    model_facts,
    rank_for_budget,
)
from cera_train.planning.config import CompareAt, GpuKind, PlanConfig
from cera_train.planning.estimate import (
    DataSize,
    Memory,
    Work,
    data_size,
    flops_of,
    is_known,
    memory_of,
    setting_of,
    work_of,
)
from cera_train.runs.recorded_config import load_config

GB = 1e9

GPU_MFU, CPU_MFU = 0.4, 0.45
"""The share of the peak speed that training reaches. On a GPU an assumption; on a CPU what SmolLM2-135M reached with
CeRA. With LoRA it was 0.38: its dropout goes over the whole input of a projection."""

USABLE = 0.95
"""Of a GPU's memory: the rest is for CUDA itself and the gaps of torch's allocator."""


@dataclass(frozen=True)
class Device:
    name: str
    memory: float
    """Bytes. Not a number where it is not known."""
    flops: float
    """A second, at best. Not a number where it is not known."""
    cuda_name: str = ""
    """What CUDA calls it. Slower cards have names like it, such as the H100 PCIe."""


GPUS = {
    GpuKind.h100: Device("H100", 80 * GB, 989e12, "NVIDIA H100 80GB HBM3"),
    GpuKind.a100: Device("A100", 80 * GB, 312e12, "NVIDIA A100-SXM4-80GB"),
    GpuKind.l40s: Device("L40S", 48 * GB, 362e12, "NVIDIA L40S"),
    GpuKind.rtx4090: Device("RTX 4090", 24 * GB, 165e12, "NVIDIA GeForce RTX 4090"),
}
"""Memory and dense bf16 speed by the vendor's data sheets (SXM cards, the A100 of 80 GB)."""


@functools.cache
def this_cpu(is_16bit: bool, threads: int | None) -> Device:
    """This machine: its memory, and how fast torch multiplies matrices on it. That is the best that one thread does in
    half a second, times the threads: all at once would wait for whatever else the machine is doing."""
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512, dtype=torch.bfloat16 if is_16bit else torch.float32)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        began = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * 512**3 / (time.perf_counter() - began))
    torch.set_num_threads(usual)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, best * (threads or usual))


# --- a plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One run, planned."""

    config: PlanRun
    device: Device
    data: DataSize
    frozen: dict[str, int]
    """Parameters by kind of module."""
    adapter: dict[str, int]
    """Trainable parameters by target."""
    work: Work
    memory: Memory
    other_activations: float
    """Bytes of the activations with gradient checkpointing where the run has none, and without where it has it."""
    flops: dict[str, float]
    mfu: float
    remedies: dict[str, Plan] = field(default_factory=dict)
    """For a plan that does not fit: an override, and the plan with it."""
    compared: list[Plan] = field(default_factory=list)

    @property
    def trainable(self) -> int:
        return sum(self.adapter.values())

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.device.memory

    @property
    def update_seconds(self) -> float:
        """Of one update, evaluations not counted."""
        return self._seconds(sum(self.flops.values()) - self.flops["evaluations"]) / self.work.updates

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self._seconds(sum(self.flops.values()))

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.config.plan.gpus

    @property
    def cost(self) -> float | None:
        price = self.config.plan.price_per_hour
        return None if price is None else price * self.gpu_hours

    def _seconds(self, flops: float) -> float:
        return flops / (self.device.flops * self.mfu * self.config.plan.gpus)


def make_plan(config: PlanRun) -> Plan:
    """Plans a run, and beside it the same run with each adapter of `plan.compare`.

    Raises:
        ValueError: the model or the data is unknown, a target matches no module, or a CPU is to be several.
    """
    if config.plan.gpu == GpuKind.cpu and config.plan.gpus > 1:
        raise UserError(
            f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes all its threads. "
            "Leave plan.gpus at 1."
        )
    plan = _plan(config)
    compared = [_plan(_with_adapter(config, kind)) for kind in config.plan.compare]
    return replace(plan, compared=compared, remedies={} if plan.fits else _remedies(config))


def _plan(config: PlanRun, cpu_threads: int | None = None) -> Plan:
    """One run alone; on a CPU with so many threads, or as many as torch takes."""
    model = config.model
    facts = model_facts(model)
    if config.data.max_length > facts.max_position_embeddings:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the {facts.max_position_embeddings} positions of "
            f"{model.path}: lower it."
        )
    data = data_size(config.data, config.plan.tokens_per_row)
    on_gpu = config.plan.gpu != GpuKind.cpu
    setting = setting_of(config, data, on_gpu, config.plan.gpus)
    work = work_of(config, data)
    other = replace(config, model=replace(model, gradient_checkpointing=not model.gradient_checkpointing))
    return Plan(
        config=config,
        device=GPUS[config.plan.gpu] if on_gpu else this_cpu(setting.base_bytes == 2, cpu_threads),
        data=data,
        frozen=frozen_parameters(facts),
        adapter=adapter_parameters(adapted_linears(facts, config.adapter), config.adapter.kind, config.adapter.r),
        work=work,
        memory=memory_of(config, facts, data, setting),
        other_activations=memory_of(other, facts, data, setting).training["activations"],
        flops=flops_of(config, facts, data, work, setting),
        mfu=config.plan.mfu or (GPU_MFU if on_gpu else CPU_MFU),
    )


def _with_adapter(config: PlanRun, kind: AdapterKind) -> PlanRun:
    """The same run with another adapter, at the same rank or the same number of parameters."""
    adapter, r = config.adapter, config.adapter.r
    if config.plan.compare_at == CompareAt.budget:
        adapted = adapted_linears(model_facts(config.model), adapter)
        r = rank_for_budget(adapted, kind, sum(adapter_parameters(adapted, adapter.kind, r).values()))
    gate = adapter.activation if kind == AdapterKind.cera else Activation.silu
    return replace(config, adapter=replace(adapter, kind=kind, r=r, activation=gate))


def _remedies(config: PlanRun) -> dict[str, Plan]:
    """What lowers the peak, each by itself and all together: an override and the plan with it."""
    model, train = config.model, config.train
    fewer = max(config.data.max_length, train.micro_batch_tokens // 4)
    # nf4 does not compute in float16.
    quantized = model if model.dtype == Dtype.float16 else replace(model, quantization=Quantization.nf4)
    shorter = replace(train, micro_batch_tokens=fewer)
    changed = {
        "model.gradient_checkpointing=true": replace(config, model=replace(model, gradient_checkpointing=True)),
        "model.quantization=nf4": replace(config, model=quantized),
        f"train.micro_batch_tokens={fewer}": replace(config, train=shorter),
    }
    changed = {override: other for override, other in changed.items() if other != config}
    if len(changed) > 1:
        together = replace(config, model=replace(quantized, gradient_checkpointing=True), train=shorter)
        changed["all of these"] = together
    return {override: _plan(other) for override, other in changed.items()}


# --- what it prints --------------------------------------------------------------------------------------------------

Cell = Callable[[Plan], str]


def say_plan(plan: Plan) -> None:
    """The plan, and the compared ones beside it."""
    config, data, device = plan.config, plan.data, plan.device
    quantization = "" if config.model.quantization == Quantization.none else f", {config.model.quantization}"
    print_line(
        "plan", f"{config.name}: {describe(config.adapter)} on {config.model.path}, {config.model.dtype}{quantization}"
    )
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
    _table(plans, _rows(plans))
    print()
    _say_fit(plans)
    if plan.cost is None and config.plan.gpu != GpuKind.cpu:
        print_line("cost", "set plan.price_per_hour to the price of one GPU")


def describe(adapter: AdapterConfig) -> str:
    """An adapter in a few words."""
    return f"{adapter.kind} r={adapter.r} on {targets(adapter.target_modules)}"


def _rows(plans: list[Plan]) -> list[tuple[str, Cell | None]]:
    """Labels and cells; without a cell it is a heading."""
    first = plans[0]

    def count(part: str, name: str) -> Cell:
        return lambda plan: f"{getattr(plan, part)[name]:,}"

    def bytes_of(moment: str, name: str) -> Cell:
        return lambda plan: _gigabytes(getattr(plan.memory, moment)[name])

    rows: list[tuple[str, Cell | None]] = [("parameters", None)]
    rows += [(f"  {name}", count("frozen", name)) for name, own in first.frozen.items() if own or name == "head"]
    rows += [("  frozen", lambda plan: f"{sum(plan.frozen.values()):,}")]
    rows += [(f"  adapter {name}", count("adapter", name)) for name in first.adapter]
    rows += [
        ("  trainable", lambda plan: f"{plan.trainable:,}"),
        ("  share", lambda plan: f"{plan.trainable / (plan.trainable + sum(plan.frozen.values())):.2%}"),
        ("memory of one process", None),
        *((f"  {name}", bytes_of("training", name)) for name in first.memory.training),
        ("  peak in training", lambda plan: _gigabytes(sum(plan.memory.training.values()))),
        ("  peak in evaluation", lambda plan: _gigabytes(sum(plan.memory.evaluation.values()))),
        (
            f"  activations with{'out' * first.config.model.gradient_checkpointing} checkpointing",
            lambda plan: _gigabytes(plan.other_activations),
        ),
        ("work", None),
        ("  updates", lambda plan: f"{plan.work.updates:,}"),
        ("  tokens", lambda plan: f"{plan.work.tokens:,.0f}"),
        ("  evaluations", lambda plan: f"{plan.work.evaluations:,}"),
        ("PFLOP", None),
        *((f"  {name}", lambda plan, name=name: _petaflops(plan.flops.get(name, 0))) for name in _flop_names(plans)),
        ("  in all", lambda plan: _petaflops(sum(plan.flops.values()))),
        ("time and cost", None),
        ("  an update", lambda plan: f"{plan.update_seconds:.3g} s"),
        ("  the run, h:mm:ss", lambda plan: duration(plan.seconds)),
    ]
    if first.config.plan.gpu != GpuKind.cpu:
        rows.append(("  GPU-hours", lambda plan: f"{plan.gpu_hours:,.2f}"))
    if first.cost is not None:
        rows.append(("  cost", lambda plan: f"{plan.cost:,.2f}"))
    return rows


def _flop_names(plans: list[Plan]) -> list[str]:
    names = dict.fromkeys(name for plan in plans for name in plan.flops if name != "evaluations")
    return [*names, "evaluations"]


def _table(plans: list[Plan], rows: list[tuple[str, Cell | None]]) -> None:
    columns = [[cell(plan) if cell else "" for _, cell in rows] for plan in plans]
    widths = [max(16, *map(len, column)) for column in columns]
    if len(plans) > 1:
        heads = [f"{plan.config.adapter.kind} r={plan.config.adapter.r}" for plan in plans]
        print(" " * 36 + "  ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for index, (label, cell) in enumerate(rows):
        values = "  ".join(f"{column[index]:>{width}}" for column, width in zip(columns, widths, strict=True))
        print(f"{label:<36}{values}" if cell else label)


def _say_fit(plans: list[Plan]) -> None:
    for plan in plans:
        needs = f"{describe(plan.config.adapter)} needs {_gigabytes(plan.memory.peak)}"
        there = f"{plan.device.memory / GB:.0f} GB of {plan.device.name}"
        if plan.fits:
            print_line("fits", f"{needs} of the {there}")
        else:
            print_line("too large", f"{needs}, more than {USABLE:.0%} of the {there}")
    for override, other in plans[0].remedies.items():
        print_line(
            "", f"{_gigabytes(other.memory.peak)} with {override}: {'fits' if other.fits else 'still too large'}"
        )


def say_sweep(plans: list[Plan]) -> None:
    """The jobs of a sweep, one a line by what differs, and their sum."""
    settings = [_settings(plan.config) for plan in plans]
    keys = [key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings)]
    for path in ("model.path", "data.path"):  # says it all about its section
        section = path.split(".")[0] + "."
        keys = [key for key in keys if path not in keys or key == path or not key.startswith(section)]
    names = [
        " ".join(f"{key}={own.get(key)}" for key in keys) or plan.config.name
        for own, plan in zip(settings, plans, strict=True)
    ]
    width = max(12, *map(len, names))
    print(f"{'job':<{width}}{'trainable':>16}{'peak':>11}{'updates':>10}{'time':>12}{'GPU-hours':>12}{'cost':>12}")
    for name, plan in zip(names, plans, strict=True):
        mark = "" if plan.fits else f"  does not fit {plan.device.name}"
        cost = "" if plan.cost is None else f"{plan.cost:,.2f}"
        print(
            f"{name:<{width}}{plan.trainable:>16,}{_gigabytes(plan.memory.peak):>11}{plan.work.updates:>10,}"
            f"{duration(plan.seconds):>12}{plan.gpu_hours:>12,.2f}{cost:>12}{mark}"
        )
    costs = [plan.cost for plan in plans]
    total = "" if None in costs else f"{sum(costs):,.2f}"
    largest = _gigabytes(max(plan.memory.peak for plan in plans))
    jobs = "1 job" if len(plans) == 1 else f"{len(plans)} jobs"
    print(
        f"{jobs:<{width}}{'':>16}{largest:>11}{sum(plan.work.updates for plan in plans):>10,}"
        f"{duration(sum(plan.seconds for plan in plans)):>12}{sum(plan.gpu_hours for plan in plans):>12,.2f}{total:>12}"
    )


def _settings(config: PlanRun) -> dict[str, Any]:
    """The settings that can tell jobs apart."""
    settings = flatten(to_plain(config))
    return {key: value for key, value in settings.items() if changes_of(PlanRun, key) != Changes.nothing}


def _gigabytes(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)


def _petaflops(flops: float) -> str:
    return f"{flops / 1e15:,.3f}" if flops < 1e17 else f"{flops / 1e15:,.0f}"


def _scaled(value: float, unit: str) -> str:
    return f"{value / 1e12:,.0f} T{unit}" if value >= 1e12 else f"{value / 1e9:,.0f} G{unit}"


# --- after a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One figure of a finished run beside its prediction."""

    name: str
    predicted: float
    """Not a number where it cannot be told."""
    measured: float
    show: Callable[[float], str]

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def cells(self) -> list[str]:
        """Predicted, measured, deviation."""
        if math.isnan(self.predicted):
            return ["-", self.show(self.measured), "-"]
        deviation = "equal" if self.predicted == self.measured else f"{self.deviation:+.1%}"
        return [self.show(self.predicted), self.show(self.measured), deviation]


def measured(folder: Path, plan: PlanConfig) -> tuple[Plan, list[Measured]]:
    """The plan of a finished run on the device it ran on, and the predictions beside what it measured.

    Args:
        plan: its `mfu` counts; device and tokens are the run's.

    Raises:
        ValueError: the folder is missing, holds no run, or the run is unfinished or broken.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"run={folder}: there is no config.yaml of a run. Name the folder of one, such as outputs/NAME."
        )
    if not (folder / "result.json").is_file():
        raise UserError(f"run={folder} is unfinished: it has no result.json yet.")
    config = load_config(folder / "config.yaml", Config)
    result = _read(folder / "result.json", "updates", "tokens", "seconds", "trainable_parameters", "peak_memory_bytes")
    machine = _read(folder / "environment.json", "gpus")
    gpus = machine["gpus"]
    kind = next((kind for kind, gpu in GPUS.items() if gpus and gpu.cuda_name == gpus[0]), None)

    config = replace(config, train=replace(config.train, max_updates=result["updates"]))  # it may have lost patience
    if not is_known(config.data):
        rows = result["updates"] * config.train.batch_size
        data = replace(config.data, train_rows=rows, eval_rows=config.data.eval_rows or rows)
        config = replace(config, data=data)
    rows = work_of(config, data_size(config.data, tokens_per_row=1)).rows
    plan = replace(
        plan,
        gpu=kind or (GpuKind.h100 if gpus else GpuKind.cpu),  # memory is alike on every GPU
        gpus=machine.get("processes", max(1, len(gpus))),  # which the first versions did not write down
        tokens_per_row=result["tokens"] / rows,
    )
    predicted = _plan(PlanRun(**vars(config) | {"plan": plan}), machine.get("cpu_threads"))
    if gpus and kind is None:
        predicted = replace(predicted, device=Device(gpus[0], math.nan, math.nan))
    return predicted, [
        Measured("trainable parameters", predicted.trainable, result["trainable_parameters"], "{:,.0f}".format),
        Measured("peak memory", predicted.memory.peak, result["peak_memory_bytes"], _gigabytes),
        Measured("seconds an update", predicted.update_seconds, result["seconds"] / result["updates"], "{:.3g}".format),
    ]


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A file that a finished run left."""
    try:
        values = json.loads(path.read_text())
        absent = [key for key in keys if values.get(key) in (None, 0)]
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}. Restore it.") from error
    if absent:
        raise UserError(f"{path} does not say {', '.join(absent)}. Restore it.")
    return values


def say_measured(folder: Path, plan: PlanConfig) -> None:
    """Predicted beside measured, for a finished run."""
    predicted, rows = measured(folder, plan)
    device = predicted.device
    print(f"{'':<24}{'predicted':>16}{'measured':>16}{'deviation':>12}")
    for row in rows:
        prediction, measurement, deviation = row.cells
        print(f"{row.name:<24}{prediction:>16}{measurement:>16}{deviation:>12}")
    print(f"{predicted.data.tokens_per_row:,.0f} tokens a row, as the run had")
    if math.isnan(device.flops):
        print(f"no prediction of seconds: cera-plan does not know the speed of {device.name}")
    else:
        whose = "this machine's CPU now" if predicted.config.plan.gpu == GpuKind.cpu else f"the {device.name}"
        print(f"seconds by {_scaled(device.flops, 'FLOP/s')}, the speed of {whose}, at {predicted.mfu:.0%} (plan.mfu)")
