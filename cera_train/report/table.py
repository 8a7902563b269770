"""The table: a row for each run, a column for each figure, the paper's figure beside ours where a recipe names one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cera_train.common.terminal import duration, gigabytes
from cera_train.evaluation.tasks.task import Metric, display_name
from cera_train.report.runs import Run, accuracy_metric, task_of
from cera_train.runs.results import (
    ENDINGS,
    Accuracies,
    AccuracyResult,
    PerplexityResult,
    RunResult,
    SpectrumSummary,
    TaskFigures,
)

NOTHING = "–"
MINUS = "−"

QUALITY, ANSWERS, RANK, COST = 1, 2, 3, 4
"""Groups of columns, in the order of their tables in report.md."""


@dataclass(frozen=True)
class Cell:
    value: str | None
    """None: not measured."""
    notes: tuple[str, ...] = ()
    """Stand below the value: an interval, the paper's figure."""

    @property
    def text(self) -> str:
        return self.value or NOTHING


@dataclass(frozen=True)
class Column:
    label: str
    group: int
    cells: list[Cell] = field(repr=False)


def build_columns(runs: Sequence[Run]) -> list[Column]:
    """Every column for which a run has a figure, or its recipe the paper's."""
    metrics = task_metrics(runs)
    rows = [row_of(run, metrics) for run in runs]
    columns = [Column(*cells[0][:2], [cell for *_, cell in cells]) for cells in zip(*rows, strict=True)]
    return [column for column in columns if any(cell.value or cell.notes for cell in column.cells)]


def row_of(run: Run, metrics: Sequence[tuple[str, Metric]] = ()) -> list[tuple[str, int, Cell]]:
    """Label, group and cell of each column: the figures of a run, and these metrics of tasks."""
    figures = run.figures
    tasks = dict.fromkeys(task for task, _ in metrics)
    share, updates = _format(figures.trainable_share, "{:.2%} of the model"), _format(figures.updates, "{:,} updates")
    return [
        ("method", QUALITY, Cell(run.method)),
        ("r", QUALITY, figure_cell(run.rank, "{:,}")),
        ("parameters", QUALITY, figure_cell(figures.trainable_parameters, "{:,}", share)),
        ("perplexity", QUALITY, _perplexity(run)),
        *((f"{display_name(task)} {own.label}", QUALITY, _of_task(run, task, own)) for task, own in metrics),
        *((f"{display_name(task)} answers, {' / '.join(ENDINGS)}", ANSWERS, _endings(run, task)) for task in tasks),
        ("effective rank, mean / max", RANK, _mean_and_max(run, "effective_rank", f"of r = {run.rank}")),
        ("manifold dimension, mean / max", RANK, _mean_and_max(run, "manifold_dimension")),
        ("linear share, mean", RANK, figure_cell(run.figures.spectrum.linear_share_mean, "{:.1%}")),
        ("tokens/s", COST, figure_cell(figures.tokens_per_s, "{:,.0f}")),
        ("peak memory", COST, figure_cell(figures.peak_memory_bytes, gigabytes)),
        ("time", COST, figure_cell(figures.seconds, duration, updates)),
    ]


def _perplexity(run: Run) -> Cell:
    figures, notes = run.figures, []
    value, best = figures.perplexity, figures.best_perplexity
    if run.is_unfinished and value is not None:
        notes.append(f"unfinished, at update {run.files.metrics.evaluations[-1].update:,}")
    if None not in (value, best, figures.best_update) and best < value:
        notes.append(f"best {best:.3f} at update {figures.best_update:,}")
    return figure_cell(value, "{:.3f}", *notes, *paper_notes(run, RunResult.key_of("perplexity"), value))


def _mean_and_max(run: Run, quantity: str, note: str = "") -> Cell:
    """Over the adapted modules of a run."""
    values = {end: getattr(run.figures.spectrum, f"{quantity}_{end}") for end in ("mean", "max")}
    texts = [_format(value, "{:,}" if isinstance(value, int) else "{:,.1f}") for value in values.values()]
    notes = [note] if note and any(texts) else []
    for end, value in values.items():
        key = SpectrumSummary.key_of(f"{quantity}_{end}")
        notes += [f"{end}: {note}" for note in paper_notes(run, key, value)]
    return Cell(" / ".join(text or NOTHING for text in texts) if any(texts) else None, tuple(notes))


def task_metrics(runs: Sequence[Run]) -> list[tuple[str, Metric]]:
    """The metrics of each task that get a column: those of the evaluations, then the paper's."""
    found: dict[str, dict[str, Metric]] = defaultdict(dict)
    for run in runs:
        for task, evaluation in run.evaluations.items():
            found[task] |= {metric.key: metric for metric in evaluation.metrics}
    for task, name in (key.split("/", 1) for run in runs for key in run.published if is_of_task(key)):
        known = {metric.key: metric for metric in task_of(task).shown}
        metric = accuracy_metric(name) if Accuracies.takes(name) else Metric(name, name, is_share=False)
        found[task].setdefault(name, known.get(name, metric))
    return [(task, metric) for task in sorted(found) for metric in found[task].values()]


def _of_task(run: Run, task: str, metric: Metric) -> Cell:
    key = f"{task}/{metric.key}"
    if (evaluation := run.evaluations.get(task)) is None:
        return Cell(None, paper_notes(run, key, None, metric.is_share))
    (value, interval), result, notes = evaluation.figure(metric), evaluation.result, []
    if interval:
        notes.append(_range(interval))
    if isinstance(result, AccuracyResult):
        notes += _fewer_answers(result, metric)
    if isinstance(result, AccuracyResult) and (result.samples or 1) > 1 and metric.key.startswith("exact"):
        notes.append(f"{result.samples} samples each")
    if isinstance(result, PerplexityResult) and result.perplexity_base is not None:
        notes.append(f"{result.perplexity_base:.3f} without adapter")
    notes += paper_notes(run, key, value, metric.is_share)
    if evaluation.known.task_limit is not None and key in run.published:
        notes.append(f"ours of the first {evaluation.known.task_limit:,} problems")
    return figure_cell(value, "{:.1%}" if metric.is_share else "{:.3f}", *notes)


def _fewer_answers(result: AccuracyResult, metric: Metric) -> list[str]:
    """Below pass@n of n answers: pass@2, pass@4, ... with their intervals."""
    grader, _, most = metric.key.partition("/pass@")
    if most != str(result.samples):
        return []
    ks = {2**power for power in range(1, result.samples.bit_length())} - {result.samples}
    found = [own for own in result.accuracies.found if own.grader == grader and own.k in ks and own.value is not None]
    ranges = [(own, result.interval(own)) for own in sorted(found, key=lambda own: own.k)]
    return [
        f"pass@{own.k} {own.value:.1%}" + (f", {_range(own_range)}" if own_range else "") for own, own_range in ranges
    ]


def _range(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {interval[1]:.1%}"


def _endings(run: Run, task: str) -> Cell:
    """The shares of the answers by how they ended."""
    result = run.evaluations[task].result if task in run.evaluations else None
    shares = result.endings.by_name if isinstance(result, AccuracyResult) else {}
    return Cell(" / ".join(f"{100 * share:.1f}" for share in shares.values()) + " %" if shares else None)


def paper_notes(run: Run, key: str, value: float | None, is_share: bool = False) -> tuple[str, ...]:
    """The published figure and ours minus it: in percentage points for a share, else as it is."""
    if (published := run.published.get(key)) is None:
        return ()
    paper = f"paper {published:.2%}" if is_share else f"paper {published:.2f}"
    if value is None:
        return (f"{paper}, not measured here",)
    difference = f"{signed(100 * (value - published))} points" if is_share else signed(value - published)
    return paper, f"difference {difference}"


def is_of_task(key: str) -> bool:
    """Whether a published figure is an evaluation's, TASK/METRIC."""
    return TaskFigures.takes(key) or ("/" in key and not RunResult.takes(key))


def has_column(key: str) -> bool:
    """Whether the table has a place for a published figure."""
    spectrum = [f"{quantity}_{end}" for quantity in ("effective_rank", "manifold_dimension") for end in ("mean", "max")]
    return is_of_task(key) or key in (RunResult.key_of("perplexity"), *map(SpectrumSummary.key_of, spectrum))


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def signed(value: float, form: str = ".2f") -> str:
    text = f"{value:+{form}}".replace("-", MINUS)
    return text if text.strip(f"+{MINUS}0.") else text[1:]


def figure_cell(value: float | None, form: str | Callable[[float], str], *notes: str | None) -> Cell:
    return Cell(_format(value, form), tuple(filter(None, notes)))


def _format(value: float | None, form: str | Callable[[float], str]) -> str | None:
    """None where there is no figure; infinity and not-a-number by name, which a form of whole numbers refuses."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None if value is None else str(value)
    return form(value) if callable(form) else form.format(value)
