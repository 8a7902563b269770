"""Plans in the terminal: of one run, of the jobs of a sweep, or of the cells of a study."""

from collections.abc import Mapping, Sequence

from cera_train.common.settings import differing_settings, flatten, to_plain
from cera_train.common.terminal import counted, duration, gigabytes, print_line, print_table
from cera_train.planning.plan import GB, USABLE, RunPlan
from cera_train.settings.model import Quantization
from cera_train.settings.run import PlanRun

NOT_COUNTED = "generation time not counted"


def print_plan(plan: RunPlan) -> None:
    adapter = plan.config.adapter
    rank = "" if adapter.r is None else f" r={adapter.r}"
    print_line(
        "plan",
        f"{plan.config.name}: {adapter.kind}{rank}{adapter.places and f' on {adapter.places}'}",
    )
    _print_basis([plan])
    totals = plan.totals
    flops = plan.flops | {"in all": sum(plan.flops.values())}
    peaks = {
        "peak in training": sum(plan.memory.values()),
        "peak in evaluation": plan.evaluation_memory,
    }
    time = {"an update": f"{plan.update_seconds:.3g} s"}
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
        "memory of one process": {
            name: _size(part) for name, part in (plan.memory | peaks).items()
        },
        "work": {
            name: f"{getattr(totals, name):,.0f}" for name in ("updates", "tokens", "evaluations")
        },
        "PFLOP": {
            name: f"{part / 1e15:,.{0 if part >= 1e17 else 3}f}" for name, part in flops.items()
        },
        "time and cost": time,
    }
    rows = []
    for section, figures in sections.items():
        rows += [[section, ""], *([f"  {name}", text] for name, text in figures.items())]
    print_table(["", ""], rows, right=[1])
    print()
    needs = f"{_size(plan.peak)} needed"
    memory = f"{plan.device.memory / GB:.0f} GB of {plan.device.name}"
    if plan.fits:
        print_line("fits", f"{needs} of the {memory}")
    else:
        print_line("too large", f"{needs}, more than {USABLE:.0%} of the {memory}")


def print_plans(noun: str, groups: Mapping[str, Sequence[RunPlan]]) -> None:
    """Prints the runs of each job or cell together, and the sum of all.

    Args:
        noun: what a group is.
        groups: name -> its runs.
    """
    every = [plan for plans in groups.values() for plan in plans]
    _print_basis(every)
    rows = []
    for name, plans in groups.items():
        note = "" if plans[-1].fits else f"does not fit {plans[-1].device.name}"
        rows.append([name, f"{plans[-1].trainable:,}", *_sums(plans), note])
    rows.append([counted(len(groups), noun), "", *_sums(every), ""])
    header = [noun, "trainable", "runs", "peak", "updates", "time", "GPU-hours", "cost", ""]
    print_table(header, rows, right=range(1, 8))


def name_jobs(plans: Sequence[RunPlan]) -> dict[str, list[RunPlan]]:
    """The jobs of a sweep by what differs between them."""
    keys = differing_settings(
        {str(n): flatten(to_plain(plan.config)) for n, plan in enumerate(plans)}, PlanRun
    )
    for path in ("model.path", "data.path"):  # tells its whole section apart
        if path in keys:
            keys = {
                key: words
                for key, words in keys.items()
                if key == path or key.split(".")[0] != path.split(".")[0]
            }
    named: dict[str, list[RunPlan]] = {}
    for n, plan in enumerate(plans):
        name = " ".join(f"{key}={words[str(n)]}" for key, words in keys.items())
        named.setdefault(name or plan.config.name, []).append(plan)
    return named


def _sums(plans: Sequence[RunPlan]) -> list[str]:
    """The number of runs, their peak, updates, time, GPU-hours and cost."""
    costs = [plan.cost for plan in plans]
    return [
        f"{len(plans):,}",
        _size(max(plan.peak for plan in plans)),
        f"{sum(plan.totals.updates for plan in plans):,}",
        duration(sum(plan.seconds for plan in plans)),
        f"{sum(plan.gpu_hours for plan in plans):,.2f}",
        "" if None in costs else f"{sum(costs):,.2f}",
    ]


def _print_basis(plans: Sequence[RunPlan]) -> None:
    """Prints every model, data set, task and device of these runs."""
    lines = [("model", _describe_model(plan)) for plan in plans]
    lines += [line for plan in plans for line in _describe_data(plan)]
    lines += [("device", _describe_device(plan)) for plan in plans]
    for line in dict.fromkeys(lines):
        print_line(*line)
    print()


def _describe_model(plan: RunPlan) -> str:
    """The base and how its weights are stored."""
    model = plan.config.model
    precision = (
        model.dtype
        if model.quantization == Quantization.none
        else f"{model.dtype}, {model.quantization}"
    )
    return f"{model.path}, {precision}"


def _describe_data(plan: RunPlan) -> list[tuple[str, str]]:
    """The rows and the tasks of a run: labels and texts."""
    data = plan.data
    times = plan.totals.task_evaluations
    rows = (
        f"{plan.config.data.title}: {data.train_rows:,} rows of {data.tokens_per_row:,.0f} tokens "
        f"({data.source}), "
        f"{data.supervised:.0%} supervised; {data.eval_rows:,} to evaluate"
    )
    lines = [("data", rows)]
    config = plan.config
    if config.work.answers:
        answers = config.train.batch_size * config.sequences
        text = f"{answers:,} an update, of up to {config.work.answer_tokens:,} tokens"
        lines.append(("answers", f"{text} ({NOT_COUNTED})"))
    for task, problems in plan.problems.items():
        text = f"{task}: {problems:,} problems at {counted(times, 'evaluation')}"
        lines.append(("task", f"{text} ({NOT_COUNTED})"))
    return lines


def _describe_device(plan: RunPlan) -> str:
    device = plan.device
    settings = plan.config.plan
    assumed = (
        "an assumption; set plan.mfu" if settings.on_gpu else "seen with SmolLM2-135M; set plan.mfu"
    )
    speed = (
        f"{device.flops / 1e12:,.0f} TFLOP/s"
        if device.flops >= 1e12
        else f"{device.flops / 1e9:,.0f} GFLOP/s"
    )
    return (
        f"{settings.gpus} x {device.name}, {device.memory / GB:.0f} GB, {speed} at best, "
        f"{plan.mfu:.0%} of it in training ({'plan.mfu' if settings.mfu else assumed})"
    )


def _size(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)
