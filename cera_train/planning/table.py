"""Plans as tables in the terminal: one run, or the jobs of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from cera_train.common.settings import Changes, changes_of, flatten, to_plain
from cera_train.common.terminal import counted, duration, gigabytes, print_line, print_table, targets
from cera_train.planning.devices import GB, USABLE
from cera_train.planning.plan import RunPlan
from cera_train.settings.model import Quantization
from cera_train.settings.run import PlanRun


def print_plan(plan: RunPlan) -> None:
    adapter = plan.config.adapter
    places = [place for place in (targets(adapter.target_modules), adapter.adapted_experts) if place]
    print_line("plan", f"{plan.config.name}: {adapter.kind} r={adapter.r} on {' and '.join(places)}")
    print_line("model", model_of(plan))
    for line in describe_data(plan):
        print_line(*line)
    print_device(plan)
    totals, flops = plan.totals, plan.flops | {"in all": sum(plan.flops.values())}
    peaks = {"peak in training": sum(plan.memory.values()), "peak in evaluation": plan.evaluation_memory}
    time = {"an update": f"{plan.update_seconds:.3g} s"}
    if plan.tasks:
        time["answers, at most"] = duration(plan.answer_seconds)
    time["the run, h:mm:ss"] = duration(plan.seconds)
    if plan.config.plan.on_gpu:
        time["GPU-hours"] = f"{plan.gpu_hours:,.2f}"
    if plan.cost is not None:
        time["cost"] = f"{plan.cost:,.2f}"
    sections = {
        "parameters": {
            "frozen": f"{plan.frozen:,}",
            "trainable": f"{plan.trainable:,}",
            "share": f"{plan.trainable / (plan.trainable + plan.frozen):.2%}",
        },
        "memory of one process": {name: _size(part) for name, part in (plan.memory | peaks).items()},
        "work": {name: f"{getattr(totals, name):,.0f}" for name in ("updates", "tokens", "evaluations")},
        "PFLOP": {name: f"{part / 1e15:,.{0 if part >= 1e17 else 3}f}" for name, part in flops.items()},
        "time and cost": time,
    }
    print()
    rows = []
    for section, figures in sections.items():
        rows += [[section, ""], *([f"  {name}", text] for name, text in figures.items())]
    print_table(["", ""], rows, right=[1])
    print()
    needs, memory = f"{_size(plan.peak)} needed", f"{plan.device.memory / GB:.0f} GB of {plan.device.name}"
    if plan.fits:
        print_line("fits", f"{needs} of the {memory}")
    else:
        print_line("too large", f"{needs}, more than {USABLE:.0%} of the {memory}")
    print_missing_price(plan)


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
        f"{task.name}: {task.problems:,} problems of {task.prompt_tokens:,.0f} tokens ({task.source}), up to "
        f"{task.new_tokens:,} to answer, at {counted(times, 'evaluation')}"
        for task in plan.tasks
    ]
    return [("data", rows), *(("task", text) for text in tasks)]


def print_device(plan: RunPlan) -> None:
    device, settings = plan.device, plan.config.plan
    assumed = "an assumption; set plan.mfu" if settings.on_gpu else "seen with SmolLM2-135M; set plan.mfu"
    speed = f"{device.flops / 1e12:,.0f} TFLOP/s" if device.flops >= 1e12 else f"{device.flops / 1e9:,.0f} GFLOP/s"
    print_line(
        "device",
        f"{settings.gpus} x {device.name}, {device.memory / GB:.0f} GB, {speed} at best, "
        f"{plan.mfu:.0%} of it in training ({'plan.mfu' if settings.mfu else assumed})",
    )


def print_missing_price(plan: RunPlan) -> None:
    if plan.cost is None and plan.config.plan.on_gpu:
        print_line("cost", "set plan.price_per_hour to the price of one GPU")


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
        rows.append([job, f"{plan.trainable:,}", *job_cells([plan]), note])
    total = [counted(len(plans), "job"), "", *job_cells(plans), ""]
    print_table(["job", "trainable", *JOB_HEADS, ""], [*rows, total], right=range(1, 7))


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


def _size(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)
