"""The pictures of runs side by side. A run has the same colour and marker in every picture of runs;
a picture without figures is left out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, MaxNLocator

from cera_train.report.comparison import graded_runs, task_names
from cera_train.report.document import Picture, styles_of
from cera_train.report.runs import Run, accuracy_metric, group_by
from cera_train.runs.results import EvaluationMetrics

OBJECTIVES = {
    "train/reward": ("reward", "In the mean over the answers of an update."),
    "train/completions/mean_length": (
        "length of answers",
        "In tokens, in the mean over the answers of an update.",
    ),
    "train/rewards/margins": ("margin", "Of the chosen answer's reward over the rejected one's."),
}
"""By key of metrics.jsonl: what only some objectives log, and how."""


class Line(NamedTuple):
    kind: str  # of the adapter
    points: list[tuple[float, float | None]]


def plan_pictures(runs: Sequence[Run]) -> list[Picture]:
    """The pictures that these runs have figures for."""

    def of_runs(points: Callable[[Run], list[tuple[float, float | None]]]) -> dict[str, Line]:
        return {run.name: Line(run.kind, points(run)) for run in runs}

    def by_update(figure: Callable[[EvaluationMetrics], float | None]) -> dict[str, Line]:
        return of_runs(
            lambda run: [(line.update, figure(line)) for line in run.metrics.evaluations]
        )

    on_same_rows = "Runs on the same held-out rows and model."
    perplexities = _by_rank(runs, lambda run: run.figures.perplexity)
    effective_ranks = _by_rank(runs, lambda run: run.figures.spectrum.effective_rank_mean)
    spectra = of_runs(lambda run: list(enumerate(run.spectrum, start=1)))
    losses = of_runs(lambda run: [(line.update, line.loss) for line in run.metrics.updates])
    pictures = [
        _lines("perplexity by rank", perplexities, on_same_rows),
        _lines("effective rank by rank", effective_ranks, on_same_rows),
        _lines(
            "share of the singular values by direction",
            spectra,
            "Singular values of the branch's centred output over their sum, in the mean over "
            "modules.",
        ),
        _lines("training loss by update", losses, "In nats per supervised token."),
        _lines(
            "perplexity by update",
            by_update(lambda line: line.perplexity),
            "On the held-out rows; update 0 is before training.",
        ),
        _lines(
            "linear share by update",
            by_update(lambda line: line.spectrum.linear_share_mean),
            "Share of a branch's variance that the best affine map of A x explains, in the mean "
            "over modules. A LoRA's is 1.",
        ),
    ]
    for key, (label, caption) in OBJECTIVES.items():
        logged = of_runs(
            lambda run, key=key: [
                (line.update, line.details.get(key)) for line in run.metrics.updates
            ]
        )
        pictures.append(_lines(f"{label} by update", logged, caption))
    pictures += [_accuracy(runs, task) for task in task_names(runs)]
    return [picture for picture in pictures if picture is not None]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _by_rank(runs: Sequence[Run], value: Callable[[Run], float | None]) -> dict[str, Line]:
    """A figure of the finished runs of each method on the same held-out rows and base model: of
    the largest such group."""
    runs = [run for run in runs if run.result and run.rank and _is_finite(value(run))]
    groups = group_by(runs, lambda run: (run.environment.held_out, run.base))
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        return {}
    methods = group_by(largest, lambda run: run.method)
    return {
        method: Line(same[0].kind, sorted((run.rank, value(run)) for run in same))
        for method, same in methods.items()
    }


def _lines(title: str, lines: Mapping[str, Line], caption: str) -> Picture | None:
    """A picture of `y by x`: lines by name."""
    points = {}
    for name, line in lines.items():
        finite = [(x, y) for x, y in line.points if _is_finite(y)]
        if finite:
            points[name] = finite
    if not points:
        return None
    styles = styles_of({name: line.kind for name, line in lines.items()})
    ylabel, _, xlabel = title.partition(" by ")

    def draw(axes: Axes) -> None:
        for name, line in points.items():
            places = [x for x, _ in line]
            style = styles[name] | {"markevery": math.ceil(len(line) / 10)}
            style["linestyle"] = "-" if len({*places}) == len(places) else "none"
            axes.plot(*zip(*line, strict=True), **style, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if xlabel == "rank":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        values = [y for line in points.values() for _, y in line]
        if max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())

    ends = "; ".join(
        f"{name}: {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in points.items()
    )
    return Picture(
        title.replace(" ", "-"), title.capitalize(), f"{title.capitalize()}. {ends}.", caption, draw
    )


def _accuracy(runs: Sequence[Run], task: str) -> Picture | None:
    """Accuracy by trainable parameters, by the first metric that every evaluation of the task
    has."""
    evaluations = {run.name: run.evaluations[task] for run in graded_runs(runs, task)}
    metrics = [
        metric
        for evaluation in evaluations.values()
        for metric in evaluation.task.shown
        if metric.in_picture
    ]
    metrics += [accuracy_metric("verified/pass@1"), accuracy_metric("exact/pass@1")]
    common = [
        metric
        for metric in metrics
        if all(_is_finite(each.figure(metric)[0]) for each in evaluations.values())
    ]
    parameters = {
        run.name: run.figures.trainable_parameters for run in runs if run.name in evaluations
    }
    if not common or not any(parameters.values()):
        return None
    metric = common[0]
    figures = {name: evaluation.figure(metric) for name, evaluation in evaluations.items()}
    styles = styles_of({run.name: run.kind for run in runs})
    untouched = [run.name for run in runs if run.adapter is None]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        counts = list(filter(None, parameters.values()))
        axes.set_xlim(min(counts) / 1.6, max(counts) * 1.6)
        for name, (value, interval) in figures.items():
            if parameters[name]:
                lower, upper = interval or (value, value)
                bars = [[100 * max(0, value - lower)], [100 * max(0, upper - value)]]
                style = styles[name] | {"linestyle": "none", "capsize": 3, "elinewidth": 1.1}
                axes.errorbar(parameters[name], 100 * value, yerr=bars, **style, label=name)
            elif name in untouched:
                axes.axhline(100 * value, color=styles[name]["color"], linestyle="--", label=name)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xticks([], minor=True)
        axes.set(
            xlabel="trainable parameters",
            ylabel=f"{metric.label}, %",
            ylim=(0, max(1.0, axes.get_ylim()[1])),
        )

    title = f"Accuracy on {task} by parameters"
    numbers = "; ".join(f"{name}: {value:.1%}" for name, (value, _) in figures.items())
    caption = (
        f"{metric.label.capitalize()}. Bars: 95 % intervals over problems. Dashed: the untouched "
        "base model."
    )
    return Picture(f"accuracy-{task}", title, f"{title}. {numbers}.", caption, draw)
