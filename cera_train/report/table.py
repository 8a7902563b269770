"""The table: a row for each run, a column for each figure, the paper's figure beside ours where a recipe names one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from cera_train.common.pages import without_empty_columns
from cera_train.common.terminal import duration, gigabytes
from cera_train.evaluation.tasks.task import Metric, display_name
from cera_train.report.runs import Run, accuracy_metric, task_of
from cera_train.runs.results import (
    ENDINGS,
    Accuracy,
    AccuracyResult,
    PerplexityResult,
    RunResult,
    SpectrumSummary,
    is_task_figure,
)


def run_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The columns for which a run has a figure, or its recipe the paper's."""
    metrics = _task_metrics(runs)
    return without_empty_columns([_row(run, metrics) for run in runs])


def _row(run: Run, metrics: Sequence[tuple[str, Metric]]) -> dict[str, str]:
    figures, tasks = run.figures, dict.fromkeys(task for task, _ in metrics)
    share, updates = cell(figures.trainable_share, "{:.2%} of the model"), cell(figures.updates, "{:,} updates")
    return {
        "run": run.name,
        "method": run.method,
        "r": cell(run.rank, "{:,}"),
        "parameters": cell(figures.trainable_parameters, "{:,}", share),
        "perplexity": _perplexity(run),
        **{f"{display_name(task)} {metric.label}": _of_task(run, task, metric) for task, metric in metrics},
        **{f"{display_name(task)} answers, {' / '.join(ENDINGS)}": _endings(run, task) for task in tasks},
        "effective rank, mean / max": _mean_and_max(run, "effective_rank"),
        "manifold dimension, mean / max": _mean_and_max(run, "manifold_dimension"),
        "linear share, mean": cell(figures.spectrum.linear_share_mean, "{:.1%}"),
        "tokens/s": cell(figures.tokens_per_s, "{:,.0f}"),
        "peak memory": cell(figures.peak_memory_bytes, gigabytes),
        "time": cell(figures.seconds, duration, updates),
    }


def cell(value: float | None, form: str | Callable[[float], str], *notes: str) -> str:
    """A figure and the notes below it; empty without both."""
    if value is None:
        text = ""
    elif not math.isfinite(value):  # a form of whole numbers refuses it
        text = str(value)
    else:
        text = form(value) if callable(form) else form.format(value)
    notes = list(filter(None, notes))
    return "\n".join([text or "–", *notes]) if notes else text


def _perplexity(run: Run) -> str:
    figures, notes = run.figures, []
    value, best = figures.perplexity, figures.best_perplexity
    if run.is_unfinished and value is not None:
        notes.append(f"unfinished, at update {run.files.metrics.evaluations[-1].update:,}")
    if None not in (value, best, figures.best_update) and best < value:
        notes.append(f"best {best:.3f} at update {figures.best_update:,}")
    return cell(value, "{:.3f}", *notes, *_paper(run, RunResult.key_of("perplexity"), value))


def _mean_and_max(run: Run, quantity: str) -> str:
    """Over the adapted modules of a run."""
    values = {end: getattr(run.figures.spectrum, f"{quantity}_{end}") for end in ("mean", "max")}
    notes = [
        f"{end}: {note}"
        for end, value in values.items()
        for note in _paper(run, SpectrumSummary.key_of(f"{quantity}_{end}"), value)
    ]
    texts = [cell(value, "{:,}" if isinstance(value, int) else "{:,.1f}") or "–" for value in values.values()]
    return "\n".join([" / ".join(texts), *notes]) if notes or any(text != "–" for text in texts) else ""


def _task_metrics(runs: Sequence[Run]) -> list[tuple[str, Metric]]:
    """The metrics of each task that get a column: those of the evaluations, then the paper's."""
    metrics: dict[str, dict[str, Metric]] = defaultdict(dict)
    for run in runs:
        for task, evaluation in run.evaluations.items():
            metrics[task] |= {metric.key: metric for metric in evaluation.metrics}
    for key in (key for run in runs for key in run.published):
        if is_task_figure(key):
            task, name = key.split("/", 1)
            known = {metric.key: metric for metric in task_of(task).shown}
            metric = accuracy_metric(name) if Accuracy.KEY.fullmatch(name) else Metric(name, name, is_share=False)
            metrics[task].setdefault(name, known.get(name, metric))
    return [(task, metric) for task in sorted(metrics) for metric in metrics[task].values()]


def _of_task(run: Run, task: str, metric: Metric) -> str:
    key, form = f"{task}/{metric.key}", "{:.1%}" if metric.is_share else "{:.3f}"
    if (evaluation := run.evaluations.get(task)) is None:
        return cell(None, form, *_paper(run, key, None, metric.is_share))
    (value, interval), result, notes = evaluation.figure(metric), evaluation.result, []
    if interval:
        notes.append(_range(interval))
    if isinstance(result, PerplexityResult) and result.perplexity_base is not None:
        notes.append(f"{result.perplexity_base:.3f} without adapter")
    notes += _paper(run, key, value, metric.is_share)
    if evaluation.known.task_limit is not None and key in run.published:
        notes.append(f"ours of the first {evaluation.known.task_limit:,} problems")
    return cell(value, form, *notes)


def _range(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {interval[1]:.1%}"


def _endings(run: Run, task: str) -> str:
    """The shares of the answers by how they ended."""
    result = run.evaluations[task].result if task in run.evaluations else None
    shares = result.endings if isinstance(result, AccuracyResult) else {}
    return " / ".join(f"{100 * share:.1f}" for share in shares.values()) + " %" if shares else ""


def _paper(run: Run, key: str, value: float | None, is_share: bool = False) -> list[str]:
    """The published figure and ours minus it: in percentage points for a share, else as it is."""
    if (published := run.published.get(key)) is None:
        return []
    paper = f"paper {published:.2%}" if is_share else f"paper {published:.2f}"
    if value is None:
        return [f"{paper}, not measured here"]
    difference = f"{100 * (value - published):+.2f} points" if is_share else f"{value - published:+.2f}"
    return [paper, f"difference {difference}"]
