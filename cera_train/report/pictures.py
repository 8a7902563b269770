"""The pictures of runs side by side. A run has the same colour and marker in every picture of runs;
a picture without figures is left out."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy import format_float_positional

from cera_train.report.comparison import graded_runs, task_names
from cera_train.report.document import BACKGROUND, Picture, shortened, styles_of
from cera_train.report.runs import Evaluation, Metric, Run, accuracy_metric, group_by
from cera_train.runs.evaluation_folder import (
    COLLAPSED,
    ENDINGS,
    LOOP,
    RIGHT,
    TRUNCATED,
    WRONG,
)
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


ON_SAME_ROWS = "Runs on the same held-out rows and model."

LONGEST_NAME = 24  # characters of a run beside its bar
NARROWEST_LABELLED = 7  # % of a bar's length
SPACE = 1.06  # between points of one size, as a ratio

ENDING_COLORS = {
    RIGHT: ("#0072b2", "#ffffff"),
    WRONG: ("#d3d8de", "#1f2328"),
    LOOP: ("#e69f00", "#1f2328"),
    TRUNCATED: ("#a8437f", "#ffffff"),
    COLLAPSED: ("#3b4148", "#ffffff"),
}
"""Ending -> the colours of its bar and of the number on it, which differ in lightness too."""


class Line(NamedTuple):
    kind: str  # of the adapter
    points: list[tuple[float, float | None]]


def endings_of_answers(runs: Sequence[Run]) -> list[Picture]:
    """How the answers to each task ended."""
    pictures = []
    for task in task_names(runs):
        shares = {}
        for run in graded_runs(runs, task):
            endings = run.evaluations[task].endings
            if any(endings.values()):
                shares[run.name] = endings
        if shares:
            pictures.append(_endings(task, shares))
    return pictures


def _endings(task: str, shares: Mapping[str, Mapping[str, float]]) -> Picture:
    """
    Args:
        shares: run -> ending -> the share of its answers.
    """
    endings = [ending for ending in ENDINGS if any(each.get(ending) for each in shares.values())]

    def draw(axes: Axes) -> None:
        names = [shortened(name, LONGEST_NAME) for name in shares]
        left = [0.0] * len(shares)
        for ending in endings:
            widths = [100 * each.get(ending, 0.0) for each in shares.values()]
            color, text_color = ENDING_COLORS[ending]
            bars = axes.barh(
                range(len(shares)), widths, 0.62, left, color=color, edgecolor=BACKGROUND
            )
            bars.set_label(ending)
            labels = [f"{width:.0f}" if width >= NARROWEST_LABELLED else "" for width in widths]
            axes.bar_label(bars, labels, label_type="center", color=text_color, fontsize=9)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(shares)), names, fontsize=8.5)
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set(xlabel="% of the answers", xlim=(0, 100))
        axes.grid(axis="y", visible=False)

    title = f"How answers to {task} ended"
    numbers = "; ".join(
        f"{name}: {', '.join(f'{each.get(ending, 0.0):.1%} {ending}' for ending in endings)}"
        for name, each in shares.items()
    )
    height = 0.75 + 0.34 * len(shares)
    return Picture(f"answers-{task}", title, f"{title}. {numbers}.", "", draw, height)


def curves(runs: Sequence[Run]) -> list[Picture]:
    """Losses, perplexities and what the objective logs by update, and by rank or size."""

    def by_update(figure: Callable[[EvaluationMetrics], float | None]) -> dict[str, Line]:
        return _of_runs(
            runs, lambda run: [(line.update, figure(line)) for line in run.metrics.evaluations]
        )

    losses = _of_runs(runs, lambda run: [(line.update, line.loss) for line in run.metrics.updates])
    pictures = [
        _lines("training loss by update", losses, "In nats per supervised token."),
        _lines(
            "perplexity by update",
            by_update(lambda line: line.perplexity),
            "On the held-out rows; update 0 is before training.",
        ),
    ]
    for key, (label, caption) in OBJECTIVES.items():
        logged = _of_runs(
            runs,
            lambda run, key=key: [
                (line.update, line.details.get(key)) for line in run.metrics.updates
            ],
        )
        pictures.append(_lines(f"{label} by update", logged, caption))
    perplexities = _by_rank(runs, lambda run: run.figures.perplexity)
    pictures.append(_lines("perplexity by rank", perplexities, ON_SAME_ROWS))
    pictures += [_accuracy(runs, task) for task in task_names(runs)]
    return [picture for picture in pictures if picture is not None]


def spectra(runs: Sequence[Run]) -> list[Picture]:
    """What the adapters' branches do."""
    effective_ranks = _by_rank(runs, lambda run: run.figures.spectrum.effective_rank_mean)
    singular_values = _of_runs(runs, lambda run: list(enumerate(run.spectrum, start=1)))
    linear_shares = _of_runs(
        runs,
        lambda run: [
            (line.update, line.spectrum.linear_share_mean) for line in run.metrics.evaluations
        ],
    )
    pictures = [
        _lines("effective rank by rank", effective_ranks, ON_SAME_ROWS),
        _lines(
            "share of the singular values by direction",
            singular_values,
            "Singular values of the branch's centred output over their sum, in the mean over "
            "modules.",
        ),
        _lines(
            "linear share by update",
            linear_shares,
            "Share of a branch's variance that the best affine map of A x explains, in the mean "
            "over modules. A LoRA's is 1.",
        ),
    ]
    return [picture for picture in pictures if picture is not None]


def _of_runs(
    runs: Sequence[Run], points: Callable[[Run], list[tuple[float, float | None]]]
) -> dict[str, Line]:
    return {run.name: Line(run.kind, points(run)) for run in runs}


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
    # Points at one place each show no more than the table.
    if all(len({x for x, _ in line}) < 2 for line in points.values()):
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
            axes.yaxis.set_major_formatter(
                lambda value, _: format_float_positional(value, trim="-")
            )
            axes.yaxis.set_minor_formatter(NullFormatter())

    ends = "; ".join(
        f"{name}: {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in points.items()
    )
    return Picture(
        title.replace(" ", "-"), title.capitalize(), f"{title.capitalize()}. {ends}.", caption, draw
    )


def _accuracy(runs: Sequence[Run], task: str) -> Picture | None:
    """Accuracy by trainable parameters."""
    evaluations = {run.name: run.evaluations[task] for run in graded_runs(runs, task)}
    metric = _common_metric(evaluations.values())
    parameters = {
        run.name: run.figures.trainable_parameters for run in runs if run.name in evaluations
    }
    sizes = {(run.method, parameters[run.name]) for run in runs if parameters.get(run.name)}
    if metric is None or len(sizes) == len({method for method, _ in sizes}):
        return None
    figures = {name: evaluation.figures[metric] for name, evaluation in evaluations.items()}
    styles = styles_of({run.name: run.kind for run in runs})
    untouched = [run.name for run in runs if run.is_base]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        counts = list(filter(None, parameters.values()))
        axes.set_xlim(min(counts) / 1.6, max(counts) * 1.6)
        places = apart({name: count for name, count in parameters.items() if count})
        for name, (value, interval) in figures.items():
            if parameters[name]:
                lower, upper = interval or (value, value)
                bars = [[100 * max(0, value - lower)], [100 * max(0, upper - value)]]
                style = styles[name] | {"linestyle": "none", "capsize": 3, "elinewidth": 1.1}
                axes.errorbar(places[name], 100 * value, yerr=bars, **style, label=name)
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


def _common_metric(evaluations: Collection[Evaluation]) -> Metric | None:
    """The first metric that every evaluation has: one made for a picture, else `verified`,
    else `exact`, else any."""
    metrics = [metric for evaluation in evaluations for metric in evaluation.figures]
    drawn = [metric for metric in metrics if metric.in_picture]
    graders = [accuracy_metric("verified/pass@1"), accuracy_metric("exact/pass@1")]
    for metric in (*drawn, *graders, *metrics):
        figures = [evaluation.figures.get(metric) for evaluation in evaluations]
        if all(figure is not None and _is_finite(figure.value) for figure in figures):
            return metric
    return None


def apart(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts, those that are equal a little apart on a logarithmic axis."""
    equal: dict[int, list[str]] = {}
    for name, count in counts.items():
        equal.setdefault(count, []).append(name)
    return {
        name: count * SPACE ** (place - (len(names) - 1) / 2)
        for count, names in equal.items()
        for place, name in enumerate(names)
    }
