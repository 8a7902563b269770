"""The pictures. One function draws each, in a theme; a picture whose figures are missing is left out and named.

Methods are told apart by colour (Okabe and Ito's palette, for colour-blind readers), by marker and by a label beside
the data.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cera_train.report.comparison import group_by, is_graded, name_of
from cera_train.report.runs import Run
from cera_train.report.table import NOTHING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.5, 3.5)
"""Inches: on a telephone the text is still large enough."""
MOST_POINTS = 400
"""Of one curve; longer ones are averaged over stretches."""
LABEL_HEIGHT = 0.065
"""Of a line of text, as a share of the axes' height."""


@dataclass(frozen=True)
class Theme:
    name: str
    background: str
    text: str
    grid: str
    colors: dict[str, str]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1f2328",
    "#d9dde2",
    {"cera": "#0072b2", "lora": "#c04a00", "rslora": "#00795a", "dora": "#a8437f", "base": "#5f6670"},
)
DARK = Theme(
    "dark",
    "#161b22",
    "#e6e9ee",
    "#39424e",
    {"cera": "#56b4e9", "lora": "#f0883e", "rslora": "#2fc8a0", "dora": "#e69ac4", "base": "#a3acb8"},
)
MARKERS = {"cera": "o", "lora": "s", "rslora": "^", "dora": "D", "base": "v"}
VARIANT_MARKERS = ["P", "X", "*", "p"]
"""Of a method's further variants, such as CeRA with another gate."""
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
"""For runs of one method in one picture."""


@dataclass(frozen=True)
class Picture:
    name: str
    """Of its file."""
    title: str
    alt: str
    """What the picture says, in words, for those who do not see it."""
    caption: str
    draw: Callable[[Any, Theme], None]


def plan_pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """The pictures that these runs have figures for, and a line for each that they have not."""
    pictures, not_shown = [], []
    makers = [*_rank_pictures(runs), ("spectra", _spectra), ("training curves", _training_curves),
              ("evaluation curves", _evaluation_curves), *_accuracy_pictures(runs)]  # fmt: skip
    for name, make in makers:
        made = make(runs)
        if isinstance(made, str):
            not_shown.append(f"{name[0].upper()}{name[1:]}: {made}.")
        else:
            pictures.append(made)
    return pictures, not_shown


def render(picture: Picture, theme: Theme, file_format: str) -> bytes:
    """The picture as `png` or `svg`, the same bytes for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "font.size": 10.5,
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a run may be named $x$
        "svg.hashsalt": picture.name,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        picture.draw(figure.subplots(), theme)
        stream = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(stream, format=file_format, dpi=180, metadata=metadata)
        return stream.getvalue()


# --- against the rank ------------------------------------------------------------------------------------------------


def _rank_pictures(runs: Sequence[Run]) -> list[tuple[str, Callable]]:
    """Perplexity for each set of runs that can be compared, effective rank, manifold dimension."""
    measured = [run for run in runs if run.result and _is_finite(run.measured("eval/perplexity"))]
    groups = group_by(measured, lambda run: (run.evaluation_rows, run.base))
    makers = []
    for number, own in enumerate([own for own in groups.values() if len(own) > 1 or len(groups) == 1], start=1):
        suffix = f" ({', '.join(run.name for run in own)})" if len(groups) > 1 else ""
        name = "perplexity-rank" if len(groups) == 1 else f"perplexity-rank-{number}"
        makers.append((f"perplexity against rank{suffix}", _maker(name, "Perplexity against rank" + suffix, own)))
    alone = [run.name for own in groups.values() if len(own) == 1 and len(groups) > 1 for run in own]
    if alone or not groups:
        reason = (
            f"no run is on the same evaluation rows and model as {', '.join(alone)}"
            if alone
            else "no finished run has one"
        )
        makers.append(("perplexity against rank", lambda runs: reason))
    return [*makers, ("effective rank against rank", _effective_rank), ("manifold dimension against rank", _manifold)]


def _maker(name: str, title: str, own: Sequence[Run]) -> Callable:
    return lambda runs: _against_rank(own, name, title, "perplexity", ["eval/perplexity"])


def _effective_rank(runs: Sequence[Run]) -> Picture | str:
    keys = ["spectrum/effective_rank/mean", "spectrum/effective_rank/max"]
    return _against_rank(runs, "effective-rank", "Effective rank against rank", "effective rank", keys, bound=True)


def _manifold(runs: Sequence[Run]) -> Picture | str:
    keys = ["spectrum/manifold_dimension/mean", "spectrum/manifold_dimension/max"]
    return _against_rank(runs, "manifold-dimension", "Manifold dimension against rank", "manifold dimension", keys)


def _against_rank(
    runs: Sequence[Run], name: str, title: str, quantity: str, keys: list[str], bound: bool = False
) -> Picture | str:
    own = [run for run in runs if run.result and _is_finite(run.measured(keys[0]))]
    if not own:
        return "no finished run has a figure"
    if len(own) == 1:
        return f"only {own[0].name} has a figure, and it takes two to compare"
    has_maximum = len(keys) == 2
    caption = (
        "A line joins, at each rank, a method's run of lowest perplexity." if len({run.rank for run in own}) > 1 else ""
    )
    if has_maximum:
        caption = f"Filled: mean over modules; hollow: the largest module. {caption}"
    if bound:
        caption += " Grey: r, the most that a branch of rank r can have."

    def draw(axes: Axes, theme: Theme) -> None:
        ranks = sorted({run.rank for run in own})
        _rank_axis(axes, ranks)
        axes.set_ylabel(quantity)
        labels, markers = [], {}
        for method, same in group_by(own, lambda run: run.method).items():
            color, kind = theme.colors.get(same[0].kind, theme.text), same[0].kind
            free = markers.setdefault(kind, [MARKERS.get(kind, "o"), *VARIANT_MARKERS])
            marker = free.pop(0) if len(free) > 1 else free[0]
            by_rank = group_by(same, lambda run: run.rank)
            best = [min(by_rank[rank], key=_perplexity_or_last) for rank in sorted(by_rank)]
            for position, key in enumerate(keys):
                face = color if position == 0 else theme.background
                style = {"color": color, "marker": marker, "markersize": 6.5, "markerfacecolor": face}
                points = [(run.rank, run.measured(key)) for run in same if _is_finite(run.measured(key))]
                if not points:
                    continue
                axes.plot(*zip(*points, strict=True), linestyle="none", alpha=0.75, **style)
                line = [(run.rank, run.measured(key)) for run in best if _is_finite(run.measured(key))] or points[-1:]
                axes.plot(*zip(*line, strict=True), linewidth=1.6, linestyle="-" if position == 0 else ":", **style)
                labels.append((*line[-1], method if position == 0 else f"{method}, max", color))
        if has_maximum:
            axes.set_ylim(bottom=0)
        else:
            axes.margins(y=0.18)
        if bound:
            labels.append(_draw_bound(axes, theme, ranks))
        _label(axes, labels)

    def figures(run: Run) -> str:
        values = [run.measured(key) for key in keys]
        return " / ".join(NOTHING if value is None else f"{value:.4g}" for value in values)

    said = ", ".join(f"{run.method} r = {run.rank}: {figures(run)}" for run in own)
    said += " (mean / max)" if has_maximum else ""
    return Picture(name, title, f"{title}. {said}.", caption.strip(), draw)


def _draw_bound(axes: Axes, theme: Theme, ranks: list[int]) -> tuple[float, float, str, str]:
    """Effective rank = r, as far as it is near the figures; returns its label."""
    import numpy

    color, high = theme.colors["base"], axes.get_ylim()[1]
    top = max(high, ranks[-1] * 1.05) if ranks[-1] <= 2 * high else high
    axes.set_ylim(0, top)
    if len(ranks) == 1:
        r = numpy.array([ranks[0] - 0.9, ranks[0] + 0.9])
        bound = numpy.full(2, ranks[0])
    else:
        r = bound = numpy.geomspace(ranks[0] / 1.2, ranks[-1], 200)
    inside = bound <= top
    axes.plot(r[inside], bound[inside], color=color, linewidth=1.1, linestyle="--", zorder=1)
    if not inside.any():
        return ranks[0], top, f"r = {ranks[0]:,}: above", color
    return r[inside][-1], bound[inside][-1], "r", color


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _perplexity_or_last(run: Run) -> float:
    value = run.measured("eval/perplexity")
    return value if _is_finite(value) else math.inf


def _rank_axis(axes: Axes, ranks: list[int]) -> None:
    from matplotlib.ticker import NullLocator

    if len(ranks) > 1:
        axes.set_xscale("log", base=2)
        axes.set_xlim(ranks[0] / 1.25, ranks[-1] * 1.25)
    else:
        axes.set_xlim(ranks[0] - 1, ranks[0] + 1)
    axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank r")


# --- spectra and curves ----------------------------------------------------------------------------------------------


def mean_spectrum(run: Run) -> list[float]:
    """Singular values over their sum, in the mean over modules; a module with fewer directions has none further on."""
    normalized: list[list[float]] = []
    for module in run.spectrum.values():
        values = module["singular_values"]
        total = sum(values)
        normalized.append([value / total if total > 0 else 0.0 for value in values])
    length = max(map(len, normalized))
    return [sum(own[k] for own in normalized if k < len(own)) / len(normalized) for k in range(length)]


def _spectra(runs: Sequence[Run]) -> Picture | str:
    curves = {run.name: mean_spectrum(run) for run in runs if run.spectrum}
    if not curves:
        return "no run has a spectrum.json"
    own = [run for run in runs if any(curves.get(run.name, ()))]
    if not own:
        return "no adapter gives an output"  # B is still zero
    lines = {run.name: [(k, value) for k, value in enumerate(curves[run.name], start=1) if value > 0] for run in own}
    said = "; ".join(
        f"{run.name}: first direction {curves[run.name][0]:.1%}, last {curves[run.name][-1]:.2%}" for run in own
    )
    return Picture(
        "spectra",
        "Spectra",
        f"Normalised singular values of the branch by direction. {said}.",
        "Singular values of the branch's centred output over their sum, in the mean over modules. Flatter is more "
        "directions in use.",
        lambda axes, theme: _draw_curves(axes, theme, own, lines, "direction", "share of the singular values"),
    )


def _training_curves(runs: Sequence[Run]) -> Picture | str:
    own = [run for run in runs if any(_is_finite(line.get("train/loss")) for line in run.metrics)]
    if not own:
        return "no run has a metrics.jsonl with training losses"
    lines = {
        run.name: thinned(
            [(line["update"], line["train/loss"]) for line in run.metrics if _is_finite(line.get("train/loss"))]
        )
        for run in own
    }
    said = "; ".join(f"{name}: {line[0][1]:.3f} to {line[-1][1]:.3f}" for name, line in lines.items())
    return Picture(
        "training-curves",
        "Training loss",
        f"Training loss by update. {said}.",
        "In nats per supervised token" + (f"; long runs averaged to at most {MOST_POINTS} points." if any(
            len(run.metrics) > MOST_POINTS for run in own) else "."),
        lambda axes, theme: _draw_curves(axes, theme, own, lines, "update", "training loss"),
    )  # fmt: skip


def _evaluation_curves(runs: Sequence[Run]) -> Picture | str:
    lines = {
        run.name: [
            (line["update"], line["eval/perplexity"]) for line in run.metrics if _is_finite(line.get("eval/perplexity"))
        ]
        for run in runs
    }
    own = [run for run in runs if lines[run.name]]
    if not own:
        return "no run has a metrics.jsonl with evaluations"
    said = "; ".join(f"{run.name}: {lines[run.name][0][1]:.3f} to {lines[run.name][-1][1]:.3f}" for run in own)
    groups = group_by(own, lambda run: (run.evaluation_rows, run.base))
    caution = " Not all runs are on the same rows and model: see the cautions." if len(groups) > 1 else ""
    return Picture(
        "evaluation-curves",
        "Perplexity during training",
        f"Perplexity on the evaluation rows by update. {said}.",
        f"On the evaluation rows; update 0 is the untouched base model.{caution}",
        lambda axes, theme: _draw_curves(axes, theme, own, lines, "update", "perplexity", marked=True, from_zero=False),
    )


def thinned(line: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, each the mean of a stretch."""
    step = -(-len(line) // MOST_POINTS)
    stretches = [line[start : start + step] for start in range(0, len(line), step)]
    return [tuple(sum(values) / len(values) for values in zip(*stretch, strict=True)) for stretch in stretches]


def _draw_curves(
    axes: Axes,
    theme: Theme,
    runs: Sequence[Run],
    lines: dict[str, list[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    marked: bool = False,
    from_zero: bool = True,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    drawn: dict[str, int] = {}
    labels = []
    for run in runs:
        if not lines[run.name]:
            continue
        color = theme.colors.get(run.kind, theme.text)
        dash = DASHES[drawn.setdefault(run.kind, 0) % len(DASHES)]
        drawn[run.kind] += 1
        points = lines[run.name]
        marker = MARKERS.get(run.kind, "o")
        places = None if marked else [0, len(points) // 2, len(points) - 1]
        axes.plot(
            *zip(*points, strict=True), color=color, linestyle=dash, linewidth=1.5, marker=marker, markersize=4.5,
            markevery=places,
        )  # fmt: skip
        labels.append((*points[-1], run.name, color))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    lengths = [line[-1][0] for line in lines.values() if line]
    if xlabel == "direction" and max(lengths) >= 4 * min(lengths):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    values = [y for line in lines.values() for _, y in line]
    if max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0 if from_zero else None)
    _label(axes, labels)


# --- accuracy --------------------------------------------------------------------------------------------------------


def _accuracy_pictures(runs: Sequence[Run]) -> list[tuple[str, Callable]]:
    tasks = dict.fromkeys(name for run in runs for name, own in run.evaluations.items() if is_graded(own))
    if not tasks:
        return [("accuracy against parameters", lambda runs: "no run has a finished evaluation with accuracies")]
    return [
        (f"accuracy on {name_of(task)} against parameters", lambda runs, task=task: _accuracy(runs, task))
        for task in tasks
    ]


def _accuracy(runs: Sequence[Run], task: str) -> Picture | str:
    own = [run for run in runs if is_graded(run.evaluations.get(task))]
    results = {run.name: run.evaluations[task].result for run in own}
    # Of trajectories the share of steps: one that is right to its end is rare.
    metrics = ("step_accuracy/mean", "verified/pass@1", "exact/pass@1")
    common = [key for key in metrics if all(_is_finite(result.get(key)) for result in results.values())]
    if not common:
        return "no accuracy is on record in every evaluation"
    metric = common[0]
    placed = [run for run in own if run.measured("trainable_parameters")]
    level = [run for run in own if run.kind == "base"]
    if not placed:
        return "no evaluated run says how many parameters it trains"
    unplaced = [run.name for run in own if run not in placed and run not in level]

    def draw(axes: Axes, theme: Theme) -> None:
        values = sorted({run.measured("trainable_parameters") for run in placed})
        axes.set_xscale("log")
        axes.set_xlim(values[0] / 1.6, values[-1] * 1.6)
        labels = []
        for run in placed:
            color = theme.colors.get(run.kind, theme.text)
            x, y = run.measured("trainable_parameters"), 100 * results[run.name][metric]
            lower, upper = (100 * bound for bound in results[run.name].get(f"{metric}/interval", (y / 100, y / 100)))
            axes.errorbar(
                x, y, yerr=[[max(0, y - lower)], [max(0, upper - y)]], color=color, marker=MARKERS.get(run.kind, "o"),
                markersize=7, capsize=3, elinewidth=1.1,
            )  # fmt: skip
            labels.append((x, y, run.name, color))
        for run in level:
            y = 100 * results[run.name][metric]
            axes.axhline(y, color=theme.colors["base"], linewidth=1.2, linestyle="--")
            axes.annotate(
                run.name, (0.01, y), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                color=theme.colors["base"], fontsize=9.5,
            )  # fmt: skip
        _parameter_ticks(axes, values)
        axes.set(xlabel="trainable parameters", ylabel="accuracy, %")
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        _label(axes, labels)

    measure = "steps right" if metric.startswith("step") else f"grader: {metric.split('/')[0]}"
    has_intervals = any(f"{metric}/interval" in result for result in results.values())
    said = "; ".join(f"{run.name}: {results[run.name][metric]:.1%}" for run in own)
    return Picture(
        f"accuracy-{task}",
        f"Accuracy on {name_of(task)} against parameters",
        f"Accuracy on {name_of(task)} against trainable parameters. {said}.",
        f"{measure.capitalize()}."
        + (" Bars: 95 % bootstrap intervals over problems." if has_intervals else "")
        + (" Dashed: the untouched base model." if level else "")
        + (f" Not shown, for want of a number of parameters: {', '.join(unplaced)}." if unplaced else ""),
        draw,
    )


def _parameter_ticks(axes: Axes, values: list[float]) -> None:
    from matplotlib.ticker import NullLocator

    apart = [values[0]]
    for value in values[1:]:
        if value > 1.5 * apart[-1]:
            apart.append(value)
    axes.set_xticks(apart, [_short(value) for value in apart])
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


# --- labels ----------------------------------------------------------------------------------------------------------


def _label(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Writes each text right of the axes, as near the height of its point as the others let it, with a thin line to
    the point."""
    axes.autoscale_view()
    to_fraction = axes.transScale + axes.transLimits
    labels = sorted(labels, key=lambda label: to_fraction.transform(label[:2])[1])
    heights = spread([to_fraction.transform(label[:2])[1] for label in labels], LABEL_HEIGHT)
    for height, (x, y, text, color) in zip(heights, labels, strict=True):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            _shortened(text),
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=color,
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            arrowprops=leader | {"relpos": (0, 0.5)},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved to have `gap` between them: where they crowd, evenly around their mean, and within
    0 to 1 where there is room."""
    stacks: list[tuple[float, int]] = []  # the height of a stack's lowest label, and how many it has
    for height in heights:
        low, count = height, 1
        while stacks and low < stacks[-1][0] + stacks[-1][1] * gap:
            below, below_count = stacks.pop()
            # The mean over the labels of where each would put the lowest.
            low = (below * below_count + (low - below_count * gap) * count) / (below_count + count)
            count += below_count
        stacks.append((low, count))
    spaced = [low + index * gap for low, count in stacks for index in range(count)]
    if (last := len(spaced) - 1) * gap > 1:
        return spaced
    return [min(max(height, index * gap), 1 - (last - index) * gap) for index, height in enumerate(spaced)]


def _shortened(text: str, most: int = 32) -> str:
    """A run's name; a sweep's job by its values, such as `cera r=64 lr=0.0003`."""
    folder, slash, name = text.rpartition("/")
    choices = [choice.partition("=") for choice in name.split(",")]
    if all(equals for _, equals, _ in choices):
        values = [f"{key.rpartition('.')[2]}={value}" if "." in key else value for key, _, value in choices]
        text = folder + slash + " ".join(values)
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"
