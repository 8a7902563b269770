"""The table: a row for each run, a column for each figure, the paper's figure beside ours where a recipe names one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cera_train.common.text import duration, gigabytes
from cera_train.report.runs import Evaluation, Run

NOTHING = "–"
MINUS = "−"

QUALITY, RANK, COST = "Quality", "Rank", "Cost"
"""Groups of columns."""

TASK_NAMES = {
    "math": "MATH",
    "math500": "MATH-500",
    "math_hard": "MATH level 5",
    "gsm8k": "GSM8K",
    "logistic_map": "logistic map",
}


@dataclass(frozen=True)
class Cell:
    value: str | None
    """None: not measured."""
    notes: tuple[str, ...] = ()
    """What belongs beside it: a 95 % bootstrap interval, the paper's figure."""

    @property
    def text(self) -> str:
        return self.value or NOTHING


@dataclass(frozen=True)
class Column:
    label: str
    group: str
    cells: list[Cell] = field(repr=False)

    @property
    def is_empty(self) -> bool:
        return all(cell.value is None and not cell.notes for cell in self.cells)


def build_columns(runs: Sequence[Run]) -> list[Column]:
    """Every column of which a run has a figure, or its recipe the paper's."""
    makers = [
        ("method", QUALITY, lambda run: Cell(run.method)),
        ("r", QUALITY, lambda run: Cell(_format(run.rank, "{:,}"))),
        ("parameters", QUALITY, _parameters),
        ("perplexity", QUALITY, _perplexity),
        *((label_of(task, metric), QUALITY, _of_task(task, metric)) for task, metric in task_metrics(runs)),
        (
            "effective rank, mean / max",
            RANK,
            _mean_and_max("spectrum/effective_rank", ("{:,.1f}", "{:,.1f}"), of_rank=True),
        ),
        ("manifold dimension, mean / max", RANK, _mean_and_max("spectrum/manifold_dimension", ("{:,.1f}", "{:,.0f}"))),
        ("tokens/s", COST, _speed),
        ("peak memory", COST, lambda run: Cell(_format(run.measured("peak_memory_bytes"), gigabytes))),
        ("time", COST, _time),
    ]
    columns = [Column(label, group, [cell(run) for run in runs]) for label, group, cell in makers]
    return [column for column in columns if not column.is_empty]


def _parameters(run: Run) -> Cell:
    share = run.measured("trainable_share")
    return Cell(
        _format(run.measured("trainable_parameters"), "{:,}"), () if share is None else (f"{share:.2%} of the model",)
    )


def _perplexity(run: Run) -> Cell:
    value = run.measured("eval/perplexity")
    notes = []
    if run.is_unfinished and value is not None:
        measured_at = max(line["update"] for line in run.metrics if "eval/perplexity" in line)
        notes.append(f"unfinished, at update {measured_at:,}")
    best, update = run.measured("best_perplexity"), run.measured("best_update")
    if None not in (value, best, update) and best < value:
        notes.append(f"best {best:.3f} at update {update:,}")
    return Cell(_format(value, "{:.3f}"), (*notes, *paper_notes(run, "eval/perplexity", value)))


def _mean_and_max(key: str, forms: tuple[str, str], of_rank: bool = False) -> Callable[[Run], Cell]:
    """Over the adapted modules of a run."""

    def cell(run: Run) -> Cell:
        values = {name: run.measured(name) for name in (f"{key}/mean", f"{key}/max")}
        notes = [f"of r = {run.rank:,}"] if of_rank and any(value is not None for value in values.values()) else []
        for name, value in values.items():
            notes += [f"{name.rpartition('/')[2]}: {note}" for note in paper_notes(run, name, value)]
        if all(value is None for value in values.values()):
            return Cell(None, tuple(notes))
        shown = [_format(value, form) or NOTHING for value, form in zip(values.values(), forms, strict=True)]
        return Cell(" / ".join(shown), tuple(notes))

    return cell


def _speed(run: Run) -> Cell:
    return Cell(_format(run.measured("tokens_per_s"), "{:,.0f}"))


def _time(run: Run) -> Cell:
    updates = run.measured("updates")
    return Cell(_format(run.measured("seconds"), duration), () if updates is None else (f"{updates:,} updates",))


# --- evaluations -----------------------------------------------------------------------------------------------------


def task_metrics(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The (task, metric) pairs that get a column: pass@1, and pass@n where there are n samples, by both graders."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for key in run.published:
            if is_of_task(key):
                task, metric = key.split("/", 1)
                found.setdefault(task, {})[metric] = None
    for run in runs:
        for name, evaluation in run.evaluations.items():
            found.setdefault(name, {}).update(dict.fromkeys(_metrics(evaluation)))
    return [(task, metric) for task in sorted(found) for metric in sorted(found[task], key=_order)]


def _metrics(evaluation: Evaluation) -> list[str]:
    result = evaluation.result or {}
    samples = result.get("samples") or 1
    wanted = [f"{grader}/pass@{k}" for k in sorted({1, samples}) for grader in ("exact", "verified")]
    return [key for key in (*wanted, "step_accuracy/mean", "state_collapse", "perplexity") if key in result]


def _order(metric: str) -> tuple:
    passes = re.fullmatch(r"(\w+)/pass@(\d+)", metric)
    return (0, int(passes[2]), passes[1]) if passes else (1, 0, "" if metric.startswith("step") else metric)


def label_of(task: str, metric: str) -> str:
    """MATH exact, MATH exact pass@8, GSM8K verified, perplexity on forgetting."""
    name = TASK_NAMES.get(task, task)
    if metric == "perplexity":
        return f"perplexity, task {name}"
    words = {"step_accuracy/mean": "steps right", "state_collapse": "state collapse"}
    return f"{name} {words.get(metric, metric.removesuffix('/pass@1').replace('/', ' '))}"


def _of_task(task: str, metric: str) -> Callable[[Run], Cell]:
    def cell(run: Run) -> Cell:
        evaluation = run.evaluations.get(task)
        result = (evaluation.result if evaluation else None) or {}
        value, notes = result.get(metric), []
        if interval := result.get(f"{metric}/interval"):
            lower, upper = interval  # of problems that came out alike a point, which is not how sure the figure is
            notes.append(f"{100 * lower:.1f} to {upper:.1%}" if lower < upper else "all alike: no interval")
        if value is not None and metric.startswith("exact") and (result.get("samples") or 1) > 1:
            notes.append(f"{result['samples']} samples each")
        if metric == "perplexity" and result.get("perplexity_base") is not None:
            notes.append(f"{result['perplexity_base']:.3f} without adapter")
        notes += paper_notes(run, f"{task}/{metric}", value)
        limit = evaluation.settings.get("task.limit") if evaluation else None
        if limit is not None and f"{task}/{metric}" in run.published:
            notes.append(f"ours of the first {limit:,} problems")
        return Cell(_format(value, "{:.1%}" if is_share(metric) else "{:.3f}"), tuple(notes))

    return cell


# --- the paper's figures ---------------------------------------------------------------------------------------------


def paper_notes(run: Run, key: str, value: float | None) -> tuple[str, ...]:
    """The published figure and ours minus it: in percentage points for a share, else as it is."""
    published = run.published.get(key)
    if published is None:
        return ()
    paper = f"paper {published:.2%}" if is_share(key) else f"paper {published:.2f}"
    if value is None:
        return (f"{paper}, not measured here",)
    difference = f"{signed(100 * (value - published))} points" if is_share(key) else signed(value - published)
    return paper, f"difference {difference}"


def is_of_task(key: str) -> bool:
    """Whether a published figure is an evaluation's, TASK/METRIC."""
    return "/" in key and not key.startswith(("eval/", "spectrum/"))


def has_column(key: str) -> bool:
    """Whether the table has a place for a published figure."""
    return is_of_task(key) or bool(
        re.fullmatch(r"eval/perplexity|spectrum/(effective_rank|manifold_dimension)/(mean|max)", key)
    )


def is_share(key: str) -> bool:
    """Whether a figure is a share of problems or steps, shown in per cent."""
    return "pass@" in key or key.rpartition("step_accuracy/mean")[1] != "" or key.endswith("state_collapse")


# --- how figures look ------------------------------------------------------------------------------------------------


def signed(value: float, form: str = ".2f") -> str:
    text = f"{value:+{form}}".replace("-", MINUS)
    return text if text.strip(f"+{MINUS}0.") else text[1:]


def _format(value: float | None, form: str | Callable[[float], str]) -> str | None:
    """None where there is no figure; infinity and not-a-number by name, which a form of whole numbers refuses."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None if value is None else str(value)
    return form(value) if callable(form) else form.format(value)
