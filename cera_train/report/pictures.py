"""The pictures of runs side by side. A run has the same colour, marker and dash in every picture; a picture without
figures is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cera_train.common.pages import Picture, shortened, styles_of
from cera_train.report.comparison import graded, task_names
from cera_train.report.runs import Run, accuracy_metric, group_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = list[tuple[float, float | None]]

OBJECTIVES = {
    "train/reward": ("Reward", "In the mean over the answers of an update."),
    "train/completions/mean_length": ("Length of answers", "In tokens, in the mean over the answers of an update."),
    "train/rewards/margins": ("Margin", "Of the chosen answer's reward over the rejected one's."),
}
"""By key of metrics.jsonl: what only some objectives log, and how."""

MOST_POINTS = 400
"""Points of one curve, to keep the page small."""


def plan_pictures(runs: Sequence[Run]) -> list[Picture]:
    """The pictures that these runs have figures for."""
    planned = [
        _against_rank(runs, "perplexity", lambda run: run.figures.perplexity),
        _against_rank(runs, "effective rank", lambda run: run.figures.spectrum.effective_rank_mean),
        _curves(
            *(runs, "spectra", "Spectra", "direction", "share of the singular values"),
            lambda run: list(enumerate(run.spectrum, start=1)),
            "Singular values of the branch's centred output over their sum, in the mean over modules.",
        ),
        _curves(
            *(runs, "training-curves", "Training loss", "update", "training loss"),
            lambda run: [(line.update, line.loss) for line in run.metrics.updates],
            "In nats per supervised token.",
        ),
        _curves(
            *(runs, "evaluation-curves", "Perplexity during training", "update", "perplexity"),
            lambda run: [(line.update, line.perplexity) for line in run.metrics.evaluations],
            "On the evaluation rows; update 0 is before training.",
        ),
        _curves(
            *(runs, "linear-share", "Linear share during training", "update", "linear share"),
            lambda run: [(line.update, line.spectrum.linear_share_mean) for line in run.metrics.evaluations],
            "Share of a branch's variance that the best affine map of A x explains, in the mean over modules. A LoRA's "
            "is 1.",
        ),
        *(
            _curves(
                *(runs, key.replace("/", "-"), f"{title} during training", "update", title.lower()),
                lambda run, key=key: [(line.update, line.details.get(key)) for line in run.metrics.updates],
                caption,
            )
            for key, (title, caption) in OBJECTIVES.items()
        ),
        *(_accuracy(runs, task) for task in task_names(runs)),
    ]
    return [picture for picture in planned if picture is not None]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _against_rank(runs: Sequence[Run], label: str, value: Callable[[Run], float | None]) -> Picture | None:
    """A figure of the finished runs on the same evaluation rows and base model, by rank: of the largest such group."""
    runs = [run for run in runs if run.result and run.rank and _is_finite(value(run))]
    runs = max(group_by(runs, lambda run: (run.environment.held_out, run.base)).values(), key=len, default=[])
    if len(runs) < 2:
        return None
    ranks, methods = sorted({run.rank for run in runs}), group_by(runs, lambda run: run.method)
    styles = styles_of({method: same[0].kind for method, same in methods.items()})

    def draw(axes: Axes) -> None:
        if len(ranks) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="rank r", ylabel=label)
        axes.margins(y=0.15)
        for method, same in methods.items():
            points = sorted((run.rank, value(run)) for run in same)
            dash = {"linestyle": "-" if len({rank for rank, _ in points}) == len(points) else "none"}
            axes.plot(*zip(*points, strict=True), **styles[method] | dash, label=method)

    title = f"{label.capitalize()} against rank"
    numbers = "; ".join(f"{run.method} r = {run.rank}: {value(run):.4g}" for run in runs)
    caption = "Runs on the same evaluation rows and model."
    return Picture(f"{label.replace(' ', '-')}-by-rank", title, f"{title}. {numbers}.", caption, draw)


def _curves(
    runs: Sequence[Run],
    name: str,
    title: str,
    xlabel: str,
    ylabel: str,
    line_of: Callable[[Run], Line],
    caption: str,
) -> Picture | None:
    """One line for each run."""
    lines = {run.name: line for run in runs if (line := thinned(line_of(run)))}
    if not lines:
        return None
    styles = styles_of({run.name: run.kind for run in runs})

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        for run, line in lines.items():
            ends = [0, len(line) - 1]
            axes.plot(*zip(*line, strict=True), **styles[run], markevery=ends, label=shortened(run))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        values = [y for line in lines.values() for _, y in line]
        if max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))

    ends = "; ".join(f"{run}: {line[0][1]:.3g} to {line[-1][1]:.3g}" for run, line in lines.items())
    return Picture(name, title, f"{ylabel.capitalize()} by {xlabel}. {ends}.", caption, draw)


def thinned(line: Line) -> Line:
    """At most MOST_POINTS points with finite values, evenly spaced, and the last one."""
    line = [(x, y) for x, y in line if _is_finite(y)]
    step = max(1, math.ceil(len(line) / MOST_POINTS))
    return line[::-step][::-1]


def _accuracy(runs: Sequence[Run], task: str) -> Picture | None:
    """Accuracy against trainable parameters, by the first metric that every evaluation of the task has."""
    evaluations = {run.name: run.evaluations[task] for run in graded(runs, task)}
    added = [metric for evaluation in evaluations.values() for metric in evaluation.task.shown if metric.in_picture]
    metrics = [*added, accuracy_metric("verified/pass@1"), accuracy_metric("exact/pass@1")]
    common = (metric for metric in metrics if all(_is_finite(each.figure(metric)[0]) for each in evaluations.values()))
    parameters = {run.name: run.figures.trainable_parameters for run in runs if run.name in evaluations}
    if (metric := next(common, None)) is None or not any(parameters.values()):
        return None
    figures = {name: evaluation.figure(metric) for name, evaluation in evaluations.items()}
    styles = styles_of({run.name: run.kind for run in runs})

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator

        axes.set_xscale("log")
        counts = list(filter(None, parameters.values()))
        axes.set_xlim(min(counts) / 1.6, max(counts) * 1.6)
        for name, (value, interval) in figures.items():
            style = styles[name] | {"linestyle": "none", "label": shortened(name)}
            if parameters[name]:
                lower, upper = interval or (value, value)
                bars = [[100 * max(0, value - lower)], [100 * max(0, upper - value)]]
                axes.errorbar(parameters[name], 100 * value, yerr=bars, capsize=3, elinewidth=1.1, **style)
            else:  # the untouched base model
                axes.axhline(100 * value, color=style["color"], linestyle="--", label=style["label"])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xticks([], minor=True)
        axes.set(xlabel="trainable parameters", ylabel=f"{metric.label}, %", ylim=(0, max(1.0, axes.get_ylim()[1])))

    title = f"Accuracy on {task} against parameters"
    numbers = "; ".join(f"{name}: {value:.1%}" for name, (value, _) in figures.items())
    caption = f"{metric.label.capitalize()}. Bars: 95 % intervals over problems. Dashed: the untouched base model."
    return Picture(f"accuracy-{task}", title, f"{title}. {numbers}.", caption, draw)
