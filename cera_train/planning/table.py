"""Plans in the terminal: of one run, of the jobs of a sweep, or of the cells of a study."""

from collections.abc import Mapping, Sequence

from cera_train.common.terminal import counted, duration, gigabytes, print_line, print_table
from cera_train.planning.plan import GB, USABLE, RunPlan
from cera_train.settings.model import Quantization

NOT_COUNTED = "generation time not counted"
TIME = (
    "of updates and evaluations: what each run needs to start (imports, model, data) is not counted"
)


def print_plan(plan: RunPlan) -> None:
    adapter = plan.config.adapter
    rank = "" if adapter.r is None else f" r={adapter.r}"
    places = f" on {adapter.places}" if adapter.places else ""
    print_line("plan", f"{plan.config.name}: {adapter.kind}{rank}{places}")
    _print_basis([plan])
    sections = {
        "parameters": {
            "frozen": f"{plan.frozen:,}",
            "trainable": f"{plan.trainable:,}",
            "share": f"{plan.trainable / (plan.trainable + plan.frozen):.2%}",
        },
        "memory of one process": {
            **{name: _size(part) for name, part in plan.memory.items()},
            "peak in training": _size(plan.peak),
        },
        "work": {
            "updates": f"{plan.totals.updates:,}",
            "tokens": f"{plan.totals.tokens:,.0f}",
            "evaluations": f"{plan.totals.evaluations:,}",
        },
        "FLOPs": {
            **{name: _operations(part) for name, part in plan.flops.items()},
            "in all": _operations(sum(plan.flops.values())),
        },
        "time and cost": _time_and_cost(plan),
    }
    rows = []
    for section, figures in sections.items():
        rows.append([section, ""])
        rows += [[f"  {name}", text] for name, text in figures.items()]
    print_table(["", ""], rows, right=[1])
    print()
    needs = f"{_size(plan.peak)} needed"
    memory = f"{plan.device.memory / GB:.0f} GB of {plan.device.name}"
    if plan.fits:
        print_line("fits", f"{needs} of the {memory}")
    else:
        smaller = ["a lower train.micro_batch_tokens"]
        if plan.config.model.quantization == Quantization.none:
            smaller.insert(0, "model.quantization=nf4")
        if not plan.config.model.gradient_checkpointing:
            smaller.insert(0, "model.gradient_checkpointing=true")
        tries = ", ".join(smaller)
        print_line("too large", f"{needs}, more than {USABLE:.0%} of the {memory}: try {tries}")


def _time_and_cost(plan: RunPlan) -> dict[str, str]:
    figures = {
        "an update": f"{plan.update_seconds:.3g} s",
        "the run, h:mm:ss": duration(plan.seconds),
    }
    if plan.config.plan.on_gpu:
        figures["GPU-hours"] = f"{plan.gpu_hours:,.2f}"
    if plan.cost is not None:
        figures["cost"] = f"{plan.cost:,.2f}"
    return figures


def print_plans(noun: str, groups: Mapping[str, Sequence[RunPlan]]) -> None:
    """Prints the runs of each job or cell together, and the sum of all.

    Args:
        noun: what a group is called.
        groups: name -> its runs.
    """
    every = [plan for plans in groups.values() for plan in plans]
    _print_basis(every)
    rows = []
    for name, plans in groups.items():
        fits = all(plan.fits for plan in plans)
        note = "" if fits else f"does not fit {plans[-1].device.name}"
        counts = dict.fromkeys(f"{plan.trainable:,}" for plan in plans)
        rows.append([name, " or ".join(counts), *_sums(plans), note])
    rows.append([counted(len(groups), noun), "", *_sums(every), ""])
    header = [noun, "trainable", "runs", "peak", "updates", "time", "GPU-hours", "cost", ""]
    print_table(header, rows, right=range(1, 8))


def name_jobs(jobs: Sequence[tuple[Sequence[str], RunPlan]]) -> dict[str, list[RunPlan]]:
    """The jobs of a sweep by the overrides that differ between them.

    Args:
        jobs: the overrides and the plan of each.
    """
    common = set.intersection(*(set(overrides) for overrides, _ in jobs))
    plans: dict[str, list[RunPlan]] = {}
    for overrides, plan in jobs:
        differing = [override for override in overrides if override not in common]
        plans[" ".join(differing) or plan.config.name] = [plan]
    return plans


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
    """Prints every model, data set, task and device of these runs, each once."""
    lines = [("model", _describe_model(plan)) for plan in plans]
    for plan in plans:
        lines += _describe_data(plan)
    lines += [("device", _describe_device(plan)) for plan in plans]
    if len(plans) > 1:  # many short runs start for longer than they train
        lines.append(("time", TIME))
    for label, text in dict.fromkeys(lines):
        print_line(label, text)
    print()


def _describe_model(plan: RunPlan) -> str:
    """The base and how its weights are stored."""
    model = plan.config.model
    stored = model.dtype if model.quantization == Quantization.none else model.quantization
    return f"{model.path}, {stored}"


def _describe_data(plan: RunPlan) -> list[tuple[str, str]]:
    """The rows, the sampled answers and the tasks of a run: labels and texts."""
    config = plan.config
    data = plan.data
    rows = (
        f"{config.data.title}: {data.train_rows:,} rows of {data.tokens_per_row:,.0f} tokens "
        f"({data.source}), {data.supervised:.0%} supervised; {data.eval_rows:,} to evaluate"
    )
    lines = [("data", rows)]
    if config.work.answers:
        answers = config.train.batch_size * config.sequences
        text = f"{answers:,} an update, of up to {config.work.answer_tokens:,} tokens"
        lines.append(("answers", f"{text} ({NOT_COUNTED})"))
    for task, problems in plan.problems.items():
        lines.append(("task", f"{task}: {problems:,} problems ({NOT_COUNTED})"))
    return lines


def _describe_device(plan: RunPlan) -> str:
    device = plan.device
    settings = plan.config.plan
    return (
        f"{settings.gpus} x {device.name}, {device.memory / GB:.0f} GB, "
        f"{_operations(device.peak_speed)}/s at best, {plan.mfu:.0%} of it in training "
        "(an assumption)"
    )


def _size(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)


def _operations(flops: float) -> str:
    """Floating-point operations, in the unit that leaves one to three digits before the point."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= scale:
            return f"{flops / scale:,.1f} {unit}"
    return f"{flops / 1e9:,.1f} GFLOP"
