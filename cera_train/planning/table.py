"""Plans in the terminal: of one run, of the jobs of a sweep, or of the cells of a study."""

from collections.abc import Mapping, Sequence

from cera_train.common.terminal import counted, duration, gigabytes, print_line, print_table
from cera_train.planning.plan import GB, USABLE, RunPlan
from cera_train.settings.model import Quantization

NOT_COUNTED = "generation time not counted"
WHAT_LOWERS_MEMORY = (
    "model.gradient_checkpointing=true, model.quantization=nf4, a lower train.micro_batch_tokens"
)


def print_plan(plan: RunPlan) -> None:
    adapter = plan.config.adapter
    rank = "" if adapter.r is None else f" r={adapter.r}"
    places = f" on {adapter.places}" if adapter.places else ""
    print_line("plan", f"{plan.config.name}: {adapter.kind}{rank}{places}")
    _print_basis([plan])
    share = f"{plan.trainable / plan.parameters:.2%}"
    print_line("trains", f"{plan.trainable:,} of {plan.parameters:,} parameters, {share}")
    totals = plan.totals
    counts = f"{totals.updates:,} updates on {totals.tokens:,.0f} tokens"
    operations = f"{sum(plan.flops.values()):.3g} FLOPs"
    print_line("work", f"{counts}, {totals.evaluations:,} evaluations, {operations}")
    time = f"{duration(plan.seconds)}, {plan.update_seconds:.3g} s an update"
    if plan.config.plan.on_gpu:
        time += f", {plan.gpu_hours:,.2f} GPU-hours"
    print_line("time", time)
    if plan.cost is not None:
        print_line("cost", f"{plan.cost:,.2f}")
    parts = ", ".join(f"{name} {_size(part)}" for name, part in plan.memory.items())
    print_line("memory", f"of one process: {parts}")
    needs = f"{_size(plan.peak)} needed"
    memory = f"{plan.device.memory / GB:.0f} GB of {plan.device.name}"
    if plan.fits:
        print_line("fits", f"{needs} of the {memory}")
    else:
        limit = f"{USABLE:.0%} of the {memory}"
        print_line("too large", f"{needs}, more than {limit}: try {WHAT_LOWERS_MEMORY}")


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
    lines = [line for plan in plans for line in _basis(plan)]
    for label, text in dict.fromkeys(lines):
        print_line(label, text)
    print()


def _basis(plan: RunPlan) -> list[tuple[str, str]]:
    """The model, rows, sampled answers, tasks and device of a run: labels and texts."""
    config = plan.config
    model = config.model
    stored = model.dtype if model.quantization == Quantization.none else model.quantization
    data = plan.data
    rows = (
        f"{config.data.title}: {data.train_rows:,} rows of {data.tokens_per_row:,.0f} tokens, "
        f"{data.supervised:.0%} supervised; {data.eval_rows:,} to evaluate"
    )
    lines = [("model", f"{model.path}, {stored}"), ("data", rows)]
    if config.work.answers:
        answers = config.train.batch_size * config.sequences
        text = f"{answers:,} an update, of up to {config.work.answer_tokens:,} tokens"
        lines.append(("answers", f"{text} ({NOT_COUNTED})"))
    for task in config.train.tasks:
        lines.append(("task", f"{task} ({NOT_COUNTED})"))
    device = plan.device
    speed = f"{device.peak_speed / 1e12:.3g} TFLOP/s at best, {device.mfu:.0%} of it in training"
    memory = f"{config.plan.gpus} x {device.name}, {device.memory / GB:.0f} GB"
    return [*lines, ("device", f"{memory}, {speed} (an assumption)")]


def _size(size: float) -> str:
    return gigabytes(size, decimals=3 if size < GB else 2)
