"""An update and an evaluation in one line each, as a run prints them. Imports no torch."""

from __future__ import annotations

import itertools

from cera_train.common.terminal import duration
from cera_train.runs.results import EvaluationMetrics, SpectrumSummary, UpdateMetrics


def describe_update(metrics: UpdateMetrics, seconds_left: float | None) -> str:
    parts = [
        None if metrics.loss is None else f"loss {figure(metrics.loss)}",
        None if metrics.perplexity is None else f"perplexity {figure(metrics.perplexity, 2)}",
        None if metrics.tokens_per_s is None else f"{figure(metrics.tokens_per_s, 0)} tokens/s",
        None if seconds_left is None else f"{duration(seconds_left)} left",
    ]
    return "  ".join(part for part in parts if part is not None)


def describe_evaluation(metrics: EvaluationMetrics) -> str:
    text = f"evaluation at update {metrics.update}"
    if metrics.perplexity is not None:
        text += f": perplexity {figure(metrics.perplexity)}"
    rank = describe_rank(metrics.spectrum)
    return f"{text}, effective rank {rank}" if rank else text


def describe_rank(spectrum: SpectrumSummary) -> str:
    if spectrum.effective_rank_mean is None or spectrum.effective_rank_max is None:
        return ""
    return f"{figure(spectrum.effective_rank_mean, 1)} mean, {figure(spectrum.effective_rank_max, 1)} max"


def describe_tasks(figures: dict[str, float]) -> str:
    """Figures of tasks in a line: gsm8k exact 12.0%, verified 14.0%."""
    by_task = itertools.groupby(figures.items(), lambda figure: figure[0].partition("/")[0])
    parts = {task: [f"{key.partition('/')[2]} {value:.1%}" for key, value in found] for task, found in by_task}
    return "; ".join(f"{task} {', '.join(texts)}" for task, texts in parts.items())


def figure(value: float, decimals: int = 3) -> str:
    """A number with so many decimals, or in powers of ten where that would be long."""
    return f"{value:,.{decimals}f}" if abs(value) < 1e9 else f"{value:.3g}"
