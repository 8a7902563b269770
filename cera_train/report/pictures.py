"""The pictures: one function plans each, and a picture without figures is left out and named.

A run has the same colour, marker and dash in every picture; runs of one method share the colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cera_train.common.drawing import BACKGROUND, COLORS, Picture, shortened, styles_of
from cera_train.evaluation.tasks.task import display_name
from cera_train.report.comparison import comparable, graded, group_by, task_names
from cera_train.report.runs import Run, accuracy_metric, task_of
from cera_train.runs.results import mean_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = list[tuple[float, float | None]]

MOST_POINTS = 400
"""Points of one curve; longer ones are averaged over stretches."""


def plan_pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """The pictures that these runs have figures for, and a line for each that they have not."""
    planned: dict[str, Picture | str] = _perplexities(runs)
    for quantity in ("Effective rank", "Manifold dimension"):
        planned[f"{quantity} against rank"] = _against_rank(runs, quantity.lower().replace(" ", "-"), quantity)
    planned |= _curves(runs)
    tasks = [task for task in task_names(runs) if graded(runs, task)]
    planned |= {f"Accuracy on {display_name(task)} against parameters": _accuracy(runs, task) for task in tasks}
    if not tasks:
        planned["Accuracy against parameters"] = "no run has a finished evaluation with accuracies"
    pictures = [own for own in planned.values() if isinstance(own, Picture)]
    return pictures, [f"{title}: {reason}." for title, reason in planned.items() if isinstance(reason, str)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite(line: Line) -> Line:
    return [(x, y) for x, y in line if _is_finite(y)]


# --- against the rank ------------------------------------------------------------------------------------------------


def _perplexities(runs: Sequence[Run]) -> dict[str, Picture | str]:
    """One picture for each set of runs whose perplexities compare."""
    title, name = "Perplexity against rank", "perplexity-rank"
    measured = [run for run in runs if run.files.result and _is_finite(run.figures.perplexity)]
    groups = list(group_by(measured, comparable).values())
    if len(groups) < 2:
        return {title: _against_rank(measured, name, "Perplexity")}
    planned: dict[str, Picture | str] = {}
    for number, own in enumerate([own for own in groups if len(own) > 1], start=1):
        names = f" ({', '.join(run.name for run in own)})"
        planned[title + names] = _against_rank(own, f"{name}-{number}", "Perplexity", names)
    if alone := [own[0].name for own in groups if len(own) == 1]:
        planned[title] = f"no run is on the same evaluation rows and model as {', '.join(alone)}"
    return planned


def _against_rank(runs: Sequence[Run], name: str, quantity: str, names: str = "") -> Picture | str:
    """The perplexity of each run, or the mean and the largest of a quantity over its modules, by its rank."""
    is_spectrum, has_bound = quantity != "Perplexity", quantity == "Effective rank"

    def values(run: Run) -> list[float | None]:
        if not is_spectrum:
            return [run.figures.perplexity]
        return [getattr(run.figures.spectrum, f"{name.replace('-', '_')}_{end}") for end in ("mean", "max")]

    own = [run for run in runs if run.files.result and run.rank and _is_finite(values(run)[0])]
    if len(own) < 2:
        return f"only {own[0].name} has a figure, and it takes two to compare" if own else "no finished run has one"
    ranks, methods = sorted({run.rank for run in own}), group_by(own, lambda run: run.method)
    styles = styles_of({method: same[0].kind for method, same in methods.items()})

    def worst_first(run: Run) -> tuple[int, float]:
        return run.rank, -run.figures.perplexity if _is_finite(run.figures.perplexity) else -math.inf

    def draw(axes: Axes) -> None:
        if len(ranks) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="rank r", ylabel=quantity.lower())
        axes.margins(y=0.15)
        for method, same in methods.items():
            best = {run.rank: run for run in sorted(same, key=worst_first)}.values()
            for place, dash in enumerate("-:" if is_spectrum else "-"):
                style = styles[method] | ({"markerfacecolor": BACKGROUND} if place else {})
                label = f"{method}, largest module" if place else method
                for shown, change in ((same, {"linestyle": "none"}), (best, {"linestyle": dash, "label": label})):
                    line = _finite([(run.rank, values(run)[place]) for run in shown])
                    axes.plot(*zip(*line, strict=True), **style | change)
        if is_spectrum:
            axes.set_ylim(bottom=0)
        if has_bound:  # as far as it is near the figures
            top = axes.get_ylim()[1]
            style = {"color": COLORS["base"], "linewidth": 1.1, "linestyle": "--", "marker": "_", "zorder": 1}
            axes.plot(ranks, ranks, label="r, at most", **style)
            axes.set_ylim(0, min(max(top, 1.05 * ranks[-1]), 2 * top))

    texts = [" / ".join("–" if value is None else f"{value:.4g}" for value in values(run)) for run in own]
    shown = "; ".join(f"{run.method} r = {run.rank}: {text}" for run, text in zip(own, texts, strict=True))
    caption = "Filled: mean over modules; hollow: the largest module. " * is_spectrum
    caption += "A line joins, at each rank, a method's run of lowest perplexity. " * (len(ranks) > 1)
    caption += "Dashed: r, the most that a branch of rank r can have." * has_bound
    title = f"{quantity} against rank{names}"
    return Picture(name, title, f"{title}{' (mean / max)' * is_spectrum}. {shown}.", caption.strip(), draw)


# --- spectra and curves ----------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> dict[str, Picture | str]:
    spectra = {run.name: list(enumerate(mean_spectrum(run.files.spectrum), start=1)) for run in runs}
    losses = {run.name: thinned([(own.update, own.loss) for own in run.files.metrics.updates]) for run in runs}
    evaluations = {run.name: run.files.metrics.evaluations for run in runs}
    perplexities = {name: [(own.update, own.perplexity) for own in lines] for name, lines in evaluations.items()}
    linear_shares = {
        name: [(own.update, own.spectrum.linear_share_mean) for own in lines] for name, lines in evaluations.items()
    }
    evaluated = [run for run in runs if perplexities[run.name]]
    tasks = {name for run in runs for own in run.files.metrics.evaluations for name in own.tasks.found}
    incomparable = " Not all runs are on the same rows and model: see the cautions."
    return {
        "Spectra": _curve(
            runs, "spectra", "Spectra", ("direction", "share of the singular values"),
            {name: [(k, value) for k, value in line if value > 0] for name, line in spectra.items()},
            "Singular values of the branch's centred output over their sum, in the mean over modules. Flatter is more "
            "directions in use.",
            "no adapter gives an output" if any(spectra.values()) else "no run has a spectrum.json",
        ),
        "Training curves": _curve(
            runs, "training-curves", "Training loss", ("update", "training loss"), losses,
            f"In nats per supervised token; long runs are averaged to at most {MOST_POINTS} points.",
            "no run has a metrics.jsonl with training losses",
        ),
        "Evaluation curves": _curve(
            runs, "evaluation-curves", "Perplexity during training", ("update", "perplexity"), perplexities,
            "On the evaluation rows; update 0 is before training."
            + incomparable * (len(group_by(evaluated, comparable)) > 1),
            "no run has a metrics.jsonl with evaluations", from_zero=False,
        ),
        "Linear share": _curve(
            runs, "linear-share", "Linear share during training", ("update", "linear share"), linear_shares,
            "Share of a branch's variance that the best affine map of A x explains, in the mean over modules: what a "
            "LoRA could do as well. A LoRA's is 1.",
            "no run has a metrics.jsonl with linear shares", from_zero=False,
        ),
    } | {f"{name} during training": _task_curve(runs, name) for name in sorted(tasks)}  # fmt: skip


def _task_curve(runs: Sequence[Run], name: str) -> Picture | str:
    """A figure of `train.tasks`, such as gsm8k/exact."""
    lines = {
        run.name: [(own.update, own.tasks.found.get(name)) for own in run.files.metrics.evaluations] for run in runs
    }
    task, _, figure = name.partition("/")
    metrics = (metric.label for metric in task_of(task).shown if metric.key == figure)
    label, title = next(metrics, figure), f"{display_name(task)} during training"
    limits = {run.settings.get("train.tasks_limit") for run in runs if any(y is not None for _, y in lines[run.name])}
    problems = f"the first {limits.pop():,}" if len(limits) == 1 and None not in limits else "the first few"
    caption = f"Greedy answers to {problems} problems; update 0 is the untouched base model."
    slug = "training-" + name.replace("/", "-")
    return _curve(runs, slug, f"{title}: {label}", ("update", label), lines, caption, "no run has figures")


def _curve(runs: Sequence[Run], name: str, title: str, labels: tuple[str, str], lines: dict[str, Line],
           caption: str, reason: str, from_zero: bool = True) -> Picture | str:  # fmt: skip
    """One line for each run; `reason` where there is none."""
    if not (lines := {run: finite for run, line in lines.items() if (finite := _finite(line))}):
        return reason
    styles, (xlabel, ylabel) = styles_of({run.name: run.kind for run in runs}), labels

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        plain = FuncFormatter(lambda value, position: f"{value:g}")
        for run, line in lines.items():
            marked = [0, len(line) // 2, len(line) - 1] if from_zero else None
            axes.plot(*zip(*line, strict=True), **styles[run], markevery=marked, label=shortened(run))
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
    line = _finite(line)
    step = max(1, math.ceil(len(line) / MOST_POINTS))
    stretches = [line[start : start + step] for start in range(0, len(line), step)]
    return [tuple(sum(values) / len(values) for values in zip(*stretch, strict=True)) for stretch in stretches]


# --- accuracy --------------------------------------------------------------------------------------------------------


def _accuracy(runs: Sequence[Run], task: str) -> Picture | str:
    evaluations = {run.name: run.evaluations[task] for run in graded(runs, task)}
    added = [metric for own in evaluations.values() for metric in own.task.shown if metric.in_picture]
    metrics = [*added, accuracy_metric("verified/pass@1"), accuracy_metric("exact/pass@1")]
    common = (metric for metric in metrics if all(_is_finite(own.figure(metric)[0]) for own in evaluations.values()))
    if (metric := next(common, None)) is None:
        return "no accuracy is on record in every evaluation"
    figures = {name: own.figure(metric) for name, own in evaluations.items()}
    parameters = {run.name: run.figures.trainable_parameters for run in runs if run.name in evaluations}
    if not any(parameters.values()):
        return "no evaluated run has a number of trainable parameters"
    styles = styles_of({run.name: run.kind for run in runs})

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator

        axes.set_xscale("log")
        placed = list(filter(None, parameters.values()))
        axes.set_xlim(min(placed) / 1.6, max(placed) * 1.6)
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

    title = f"Accuracy on {display_name(task)} against parameters"
    shown = "; ".join(f"{name}: {value:.1%}" for name, (value, _) in figures.items())
    caption = f"{metric.label.capitalize()}."
    caption += " Bars: 95 % intervals over problems." * any(interval for _, interval in figures.values())
    caption += " Dashed: without a number of trainable parameters." * (not all(parameters.values()))
    return Picture(f"accuracy-{task}", title, f"{title}. {shown}.", caption, draw)
