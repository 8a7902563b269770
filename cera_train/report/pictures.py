"""The pictures: one function plans each, and a picture without figures is left out and named.

A run has the same colour, marker and dash in every picture; runs of one method share the colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cera_train.common.drawing import BACKGROUND, COLORS, Picture, shortened, styles_of
from cera_train.report.comparison import comparable, graded, group_by, task_names
from cera_train.report.runs import Run, accuracy_metric
from cera_train.runs.results import mean_spectrum
from cera_train.tasks.registry import display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = list[tuple[float, float]]

MOST_POINTS = 400
"""Points of one curve; longer ones are averaged over stretches."""


def plan_pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """The pictures that these runs have figures for, and a line for each that they have not."""
    planned: dict[str, Picture | str] = _perplexities(runs)
    planned |= {
        f"{quantity} against rank": _against_rank(runs, quantity.lower().replace(" ", "-"), quantity, "spectrum")
        for quantity in ("Effective rank", "Manifold dimension")
    }
    planned |= {
        "Spectra": _spectra(runs),
        "Training curves": _training_curves(runs),
        "Evaluation curves": _evaluation_curves(runs),
    }
    tasks = [task for task in task_names(runs) if graded(runs, task)]
    planned |= {f"Accuracy on {display_name(task)} against parameters": _accuracy(runs, task) for task in tasks}
    if not tasks:
        planned["Accuracy against parameters"] = "no run has a finished evaluation with accuracies"
    pictures = [own for own in planned.values() if isinstance(own, Picture)]
    return pictures, [f"{title}: {reason}." for title, reason in planned.items() if isinstance(reason, str)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _or_infinite(value: float | None) -> float:
    return value if _is_finite(value) else math.inf


def _xy(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    finite = [(x, y) for x, y in points if _is_finite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


# --- against the rank ------------------------------------------------------------------------------------------------


def _perplexities(runs: Sequence[Run]) -> dict[str, Picture | str]:
    """One picture for each set of runs whose perplexities compare."""
    title = "Perplexity against rank"
    measured = [run for run in runs if run.files.result and _is_finite(run.figures.perplexity)]
    groups = list(group_by(measured, comparable).values())
    if len(groups) < 2:
        return {title: _against_rank(measured, "perplexity-rank", "Perplexity", "perplexity")}
    planned: dict[str, Picture | str] = {}
    for number, own in enumerate([own for own in groups if len(own) > 1], start=1):
        names = f" ({', '.join(run.name for run in own)})"
        planned[title + names] = _against_rank(own, f"perplexity-rank-{number}", "Perplexity", "perplexity", names)
    if alone := [own[0].name for own in groups if len(own) == 1]:
        planned[title] = f"no run is on the same evaluation rows and model as {', '.join(alone)}"
    return planned


def _against_rank(runs: Sequence[Run], name: str, quantity: str, figure: str, names: str = "") -> Picture | str:
    """The perplexity of each run, or the mean and the largest of a quantity over its modules, by its rank."""
    is_spectrum = figure == "spectrum"
    attributes = [f"{name.replace('-', '_')}_{end}" for end in ("mean", "max")] if is_spectrum else [figure]

    def values(run: Run) -> list[float | None]:
        return [getattr(run.figures.spectrum if is_spectrum else run.figures, attribute) for attribute in attributes]

    own = [run for run in runs if run.files.result and run.rank and _is_finite(values(run)[0])]
    if len(own) < 2:
        return f"only {own[0].name} has a figure, and it takes two to compare" if own else "no finished run has one"
    ranks = sorted({run.rank for run in own})
    methods = group_by(own, lambda run: run.method)
    styles = styles_of({method: same[0].kind for method, same in methods.items()})

    def draw(axes: Axes) -> None:
        if len(ranks) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="rank r", ylabel=quantity.lower())
        axes.margins(y=0.15)
        for method, same in methods.items():
            style = styles[method]
            worst_first = sorted(same, key=lambda run: (run.rank, -_or_infinite(run.figures.perplexity)))
            best = {run.rank: run for run in worst_first}.values()
            for place, dash in enumerate(["-", ":"][: len(attributes)]):
                face = {"markerfacecolor": BACKGROUND} if place else {}
                label = f"{method}, largest module" if place else method
                axes.plot(*_xy((run.rank, values(run)[place]) for run in same), **style | face | {"linestyle": "none"})
                axes.plot(*_xy((run.rank, values(run)[place]) for run in best), label=label,
                          **style | face | {"linestyle": dash})  # fmt: skip
        if is_spectrum:
            axes.set_ylim(bottom=0)
        if has_bound:  # as far as it is near the figures
            top = axes.get_ylim()[1]
            axes.plot(
                ranks,
                ranks,
                color=COLORS["base"],
                linewidth=1.1,
                linestyle="--",
                marker="_",
                zorder=1,
                label="r, at most",
            )
            axes.set_ylim(0, min(max(top, 1.05 * ranks[-1]), 2 * top))

    has_bound = quantity == "Effective rank"
    shown = "; ".join(
        f"{run.method} r = {run.rank}: " + " / ".join("–" if value is None else f"{value:.4g}" for value in values(run))
        for run in own
    )
    caption = "Filled: mean over modules; hollow: the largest module. " * is_spectrum
    caption += "A line joins, at each rank, a method's run of lowest perplexity. " * (len(ranks) > 1)
    caption += "Dashed: r, the most that a branch of rank r can have." * has_bound
    title = f"{quantity} against rank{names}"
    return Picture(name, title, f"{title}{' (mean / max)' * is_spectrum}. {shown}.", caption.strip(), draw)


# --- spectra and curves ----------------------------------------------------------------------------------------------


def _spectra(runs: Sequence[Run]) -> Picture | str:
    spectra = {run.name: mean_spectrum(run.files.spectrum) for run in runs}
    lines = {name: [(k, value) for k, value in enumerate(own, start=1) if value > 0] for name, own in spectra.items()}
    caption = "Singular values of the branch's centred output over their sum, in the mean over modules."
    reason = "no adapter gives an output" if any(spectra.values()) else "no run has a spectrum.json"  # B is still zero
    axes = ("direction", "share of the singular values")
    return _curves(runs, "spectra", "Spectra", axes, lines, f"{caption} Flatter is more directions in use.", reason)


def _training_curves(runs: Sequence[Run]) -> Picture | str:
    lines = {run.name: thinned([(own.update, own.loss) for own in run.files.metrics.updates]) for run in runs}
    caption = f"In nats per supervised token; long runs are averaged to at most {MOST_POINTS} points."
    reason = "no run has a metrics.jsonl with training losses"
    return _curves(runs, "training-curves", "Training loss", ("update", "training loss"), lines, caption, reason)


def _evaluation_curves(runs: Sequence[Run]) -> Picture | str:
    lines = {run.name: [(own.update, own.perplexity) for own in run.files.metrics.evaluations] for run in runs}
    caption = "On the evaluation rows; update 0 is the untouched base model."
    if len(group_by([run for run in runs if lines[run.name]], comparable)) > 1:
        caption += " Not all runs are on the same rows and model: see the cautions."
    reason = "no run has a metrics.jsonl with evaluations"
    title = "Perplexity during training"
    return _curves(runs, "evaluation-curves", title, ("update", "perplexity"), lines, caption, reason, False)


def _curves(runs: Sequence[Run], name: str, title: str, labels: tuple[str, str], lines: Mapping[str, Line],
            caption: str, reason: str, from_zero: bool = True) -> Picture | str:  # fmt: skip
    """One line for each run; `reason` where there is none."""
    finite = {run: [(x, y) for x, y in line if _is_finite(y)] for run, line in lines.items()}
    lines = {run: line for run, line in finite.items() if line}
    if not lines:
        return reason
    styles, (xlabel, ylabel) = styles_of({run.name: run.kind for run in runs}), labels

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        plain = FuncFormatter(lambda value, position: f"{value:g}")
        for run, line in lines.items():
            marked = [0, len(line) // 2, len(line) - 1] if from_zero else None
            axes.plot(*_xy(line), **styles[run], markevery=marked, label=shortened(run))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        lengths, values = [line[-1][0] for line in lines.values()], [y for line in lines.values() for _, y in line]
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if xlabel == "direction" and max(lengths) >= 4 * min(lengths):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(plain)
        if max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(plain)
        elif from_zero:
            axes.set_ylim(bottom=0)

    ends = "; ".join(f"{run}: {line[0][1]:.3g} to {line[-1][1]:.3g}" for run, line in lines.items())
    return Picture(name, title, f"{ylabel.capitalize()} by {xlabel}. {ends}.", caption, draw)


def thinned(line: Line) -> Line:
    """At most MOST_POINTS points, each the mean of a stretch; without losses that are not finite."""
    line = [(x, y) for x, y in line if _is_finite(y)]
    step = max(1, math.ceil(len(line) / MOST_POINTS))
    stretches = [line[start : start + step] for start in range(0, len(line), step)]
    return [tuple(sum(values) / len(values) for values in zip(*stretch, strict=True)) for stretch in stretches]


# --- accuracy --------------------------------------------------------------------------------------------------------


def _accuracy(runs: Sequence[Run], task: str) -> Picture | str:
    evaluations = {run.name: run.evaluations[task] for run in graded(runs, task)}
    added = [metric for own in evaluations.values() for metric in own.task.shown if metric.in_picture]
    metrics = [*added, accuracy_metric("verified/pass@1"), accuracy_metric("exact/pass@1")]
    common = [metric for metric in metrics if all(_is_finite(own.value(metric)) for own in evaluations.values())]
    if not common:
        return "no accuracy is on record in every evaluation"
    metric = common[0]
    values = {name: own.value(metric) for name, own in evaluations.items()}
    intervals = {name: own.interval(metric) for name, own in evaluations.items()}
    parameters = {run.name: run.figures.trainable_parameters for run in runs}
    if not any(parameters[name] for name in values):
        return "no evaluated run has a number of trainable parameters"
    styles = styles_of({run.name: run.kind for run in runs})

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator

        axes.set_xscale("log")
        placed = [parameters[name] for name in values if parameters[name]]
        axes.set_xlim(min(placed) / 1.6, max(placed) * 1.6)
        for name, value in values.items():
            style = styles[name] | {"linestyle": "none", "label": shortened(name)}
            if parameters[name]:
                lower, upper = intervals[name] or (value, value)
                bars = [[100 * max(0, value - lower)], [100 * max(0, upper - value)]]
                axes.errorbar(parameters[name], 100 * value, yerr=bars, capsize=3, elinewidth=1.1, **style)
            else:  # the untouched base model
                axes.axhline(100 * value, color=style["color"], linestyle="--", label=style["label"])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xticks([], minor=True)
        axes.set(xlabel="trainable parameters", ylabel=f"{metric.label}, %", ylim=(0, max(1.0, axes.get_ylim()[1])))

    title = f"Accuracy on {display_name(task)} against parameters"
    shown = "; ".join(f"{name}: {value:.1%}" for name, value in values.items())
    caption = f"{metric.label.capitalize()}."
    caption += " Bars: 95 % intervals over problems." * any(intervals.values())
    caption += " Dashed: without a number of trainable parameters." * (not all(parameters[name] for name in values))
    return Picture(f"accuracy-{task}", title, f"{title}. {shown}.", caption, draw)
