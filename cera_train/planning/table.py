"""Plans as tables in the terminal: one run and those compared with it, the jobs of a sweep, or a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cera_train.common.settings import Changes, changes_of, flatten, to_plain
from cera_train.common.terminal import counted, duration, gigabytes, print_line, print_table, targets
from cera_train.common.trust import clean
from cera_train.data.order import describe_parts
from cera_train.planning.devices import GB, USABLE
from cera_train.planning.measured import Figure, compare_with_measured
from cera_train.planning.plan import RunPlan
from cera_train.planning.serving import ADAPTERS, Serving, devices_for, plan_serving
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Quantization
from cera_train.settings.planning import PlanConfig
from cera_train.settings.run import PlanRun


def print_plan(plan: RunPlan) -> None:
    """The plan, and the compared ones beside it."""
    config, device = plan.config, plan.device
    print_line("plan", f"{config.name}: {_adapter(config.adapter)} on {model_of(plan)}")
    for line in describe_data(plan):
        print_line(*line)
    print_device(plan)
    print()
    plans = [plan, *plan.compared]
    heads = [f"{other.config.adapter.kind} r={other.config.adapter.r}" if plan.compared else "" for other in plans]
    first, *others = map(_figures, plans)
    rows: list[list[str]] = []
    for section, figures in first.items():
        rows.append([section, *("" for _ in plans)])
        rows += [[f"  {name}", text, *(other[section].get(name, "0") for other in others)]
                 for name, text in figures.items()]  # fmt: skip
    print_table(["", *heads], rows, right=range(1, len(plans) + 1))
    print()
    for other in plans:
        needs = f"{_adapter(other.config.adapter)} needs {_size(other.peak)}"
        there = f"{device.memory / GB:.0f} GB of {device.name}"
        if other.fits:
            print_line("fits", f"{needs} of the {there}")
        else:
            print_line("too large", f"{needs}, more than {USABLE:.0%} of the {there}")
    print_missing_price(plan)
    if (serving := plan_serving(plan)) is not None:
        print_serving(serving, plan)


def model_of(plan: RunPlan) -> str:
    """The base and how its weights are stored."""
    model = plan.config.model
    precision = model.dtype if model.quantization == Quantization.none else f"{model.dtype}, {model.quantization}"
    return f"{model.path}, {precision}"


def describe_data(plan: RunPlan) -> list[tuple[str, str]]:
    """The rows and the tasks of a run: labels and texts."""
    data, times = plan.data, plan.totals.task_evaluations
    rows = (
        f"{plan.config.data.title}: {data.train_rows:,} rows of {data.tokens_per_row:,.0f} tokens ({data.source}), "
        f"{data.supervised:.0%} supervised; {data.eval_rows:,} to evaluate"
    )
    tasks = [
        f"{size.name}: {size.problems:,} problems of {size.prompt_tokens:,.0f} tokens ({size.source}), up to "
        f"{size.new_tokens:,} to answer, at {counted(times, 'evaluation')}"
        for size in plan.tasks
    ]
    parts = [("part", text) for text in describe_parts(data.parts)]
    return [("data", rows), *parts, *(("task", text) for text in tasks)]


def print_device(plan: RunPlan) -> None:
    device, settings = plan.device, plan.config.plan
    assumed = "an assumption; set plan.mfu" if settings.on_gpu else "seen with SmolLM2-135M; set plan.mfu"
    print_line(
        "device",
        f"{settings.gpus} x {device.name}, {device.memory / GB:.0f} GB, {_speed(device.flops)} at best, "
        f"{plan.mfu:.0%} of it in training ({'plan.mfu' if settings.mfu else assumed})",
    )


def print_missing_price(plan: RunPlan) -> None:
    if plan.cost is None and plan.config.plan.on_gpu:
        print_line("cost", "set plan.price_per_hour to the price of one GPU")


def print_serving(serving: Serving, plan: RunPlan) -> None:
    """Memory of one base with 1 to 64 adapters in vLLM, and of a merged model for each."""
    names, device = " ".join(serving.targets), plan.device
    print_line(
        "serving",
        f"vLLM with --max-lora-rank {serving.rank}; the branches add {serving.work:.2%} to the base's FLOPs a token",
    )
    print()
    rows = []
    for count in ADAPTERS:
        whole = serving.base + count * serving.slot
        row = [count * serving.slot, whole, serving.base + count * serving.target_slot, count * serving.adapter]
        devices = (devices_for(1, whole, device), devices_for(count, serving.merged, device))
        fits = " / ".join(f"{number:,}" if number else "too large" for number in devices)
        rows.append([f"{count}", *map(_size, row), _size(count * serving.merged), fits])
    heads = ["adapters", "slots", "base + slots", "targets only", "on the CPU", "merged models", f"{device.name}s"]
    print_table(heads, rows, right=range(1, len(heads)))
    print()
    print_line("", f"targets only: with --lora-target-modules {names}; else a slot has a place at every matrix")
    print_line("", "weights alone: what a device has left is for the cache of keys and values")


def _adapter(adapter: AdapterConfig) -> str:
    places = [place for place in (targets(adapter.target_modules), adapter.adapted_experts) if place]
    return f"{adapter.kind} r={adapter.r} on {' and '.join(places)}"


def _figures(plan: RunPlan) -> dict[str, dict[str, str]]:
    """The figures of a plan, by section of the table."""
    parameters, totals = plan.parameters, plan.totals
    counts = {
        **parameters.frozen,
        "frozen": sum(parameters.frozen.values()),
        **{f"adapter {name}": count for name, count in parameters.adapter.items()},
        "trainable": parameters.trainable,
    }
    peaks = {"peak in training": sum(plan.memory.values()), "peak in evaluation": plan.evaluation_memory}
    flops = plan.flops | {"in all": sum(plan.flops.values())}
    time = {"an update": f"{plan.update_seconds:.3g} s"}
    time |= {"answers, at most": duration(plan.answer_seconds)} if plan.answer_seconds else {}
    time |= {"the run, h:mm:ss": duration(plan.seconds)}
    time |= {"GPU-hours": f"{plan.gpu_hours:,.2f}"} if plan.config.plan.on_gpu else {}
    time |= {} if plan.cost is None else {"cost": f"{plan.cost:,.2f}"}
    return {
        "parameters": {name: f"{count:,}" for name, count in counts.items()} | {"share": f"{parameters.share:.2%}"},
        "memory of one process": {name: _size(part) for name, part in (plan.memory | peaks).items()},
        "work": {name: f"{getattr(totals, name):,.0f}" for name in ("updates", "tokens", "evaluations")},
        "PFLOP": {name: f"{part / 1e15:,.{0 if part >= 1e17 else 3}f}" for name, part in flops.items()},
        "time and cost": time,
    }


# --- a sweep ---------------------------------------------------------------------------------------------------------


def print_sweep_plans(plans: list[RunPlan]) -> None:
    """The jobs of a sweep, one a line by what differs, and their sum."""
    settings = [flatten(to_plain(plan.config)) for plan in plans]
    keys = [key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings)]
    keys = [key for key in keys if changes_of(PlanRun, key) != Changes.nothing]
    for path in ("model.path", "data.path"):  # tells its whole section apart
        section = path.split(".")[0] + "."
        keys = [key for key in keys if path not in keys or key == path or not key.startswith(section)]
    rows = []
    for values, plan in zip(settings, plans, strict=True):
        job = " ".join(f"{key}={values.get(key)}" for key in keys) or plan.config.name
        note = "" if plan.fits else f"does not fit {plan.device.name}"
        rows.append([job, f"{plan.parameters.trainable:,}", *job_cells([plan]), note])
    jobs = "1 job" if len(plans) == 1 else f"{len(plans)} jobs"
    heads = ["job", "trainable", *JOB_HEADS, ""]
    print_table(heads, [*rows, [jobs, "", *job_cells(plans), ""]], right=range(1, 7))


JOB_HEADS = ("peak", "updates", "time", "GPU-hours", "cost")


def job_cells(plans: Sequence[RunPlan]) -> list[str]:
    """Peak, updates, time, GPU-hours and cost of all these together."""
    costs = [plan.cost for plan in plans]
    return [
        _size(max(plan.peak for plan in plans)),
        f"{sum(plan.totals.updates for plan in plans):,}",
        duration(sum(plan.seconds for plan in plans)),
        f"{sum(plan.gpu_hours for plan in plans):,.2f}",
        "" if None in costs else f"{sum(costs):,.2f}",
    ]


# --- after a run -----------------------------------------------------------------------------------------------------


def print_measured(folder: Path, plan: PlanConfig) -> None:
    """Predicted beside measured, for a finished run."""
    measured = compare_with_measured(folder, plan)
    rows = [
        _cells("trainable parameters", measured.trainable_parameters, "{:,.0f}".format),
        _cells("peak memory", measured.peak_memory, _size),
        _cells("seconds an update", measured.update_seconds, "{:.3g}".format),
    ]
    print_table(["", "predicted", "measured", "deviation"], rows, right=(1, 2, 3))
    predicted, device = measured.plan, measured.plan.device
    print(f"{predicted.data.tokens_per_row:,.0f} tokens a row, as the run had")
    if measured.update_seconds.predicted is None:
        print(f"no prediction of seconds: cera-plan does not know the speed of {clean(device.name)}")
    else:
        whose = f"the {device.name}" if predicted.config.plan.on_gpu else "this machine's CPU now"
        print(f"seconds by {_speed(device.flops)}, the speed of {whose}, at {predicted.mfu:.0%} (plan.mfu)")


def _cells(name: str, figure: Figure, show: Callable[[float], str]) -> list[str]:
    if figure.predicted is None:
        return [name, "-", show(figure.measured), "-"]
    deviation = "equal" if figure.predicted == figure.measured else f"{figure.deviation:+.1%}"
    return [name, show(figure.predicted), show(figure.measured), deviation]


def _size(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)


def _speed(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.0f} GFLOP/s"
