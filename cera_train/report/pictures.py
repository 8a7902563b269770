"""The pictures of runs side by side. A run, or a method by rank, has the same colour and marker of
report.mplstyle in every picture. A picture without figures is left out."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy import format_float_positional

from cera_train.report.runs import Run, group_by

CURVES = (
    ("updates", "loss", "training loss", "In nats per supervised token."),
    (
        "evaluations",
        "perplexity",
        "perplexity",
        "On the held-out rows; update 0 is before training.",
    ),
    ("updates", "reward", "reward", "In the mean over the answers of an update."),
    (
        "updates",
        "answer_length",
        "length of answers",
        "In tokens, in the mean over the answers of an update.",
    ),
    ("updates", "margin", "margin", "Of the chosen answer's reward over the rejected one's."),
)
"""Lines of metrics.jsonl and a figure of theirs, by update: its label and caption."""

WIDTH = 4.5  # inches: on a telephone the text is still large enough
HEIGHT = 3.1  # without the legend
LEGEND_LINE = 0.2  # inches
LONGEST_LABEL = 48

STYLE = Path(__file__).with_name("templates") / "report.mplstyle"

ON_SAME_ROWS = "Runs on the same held-out rows and model."

Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Picture:
    name: str  # the stem of its file
    title: str
    alt: str
    caption: str
    png: bytes


def curves(runs: Sequence[Run]) -> list[Picture]:
    """Losses, perplexities and what the objective logs by update, and by rank."""
    pictures = []
    for lines, field, label, caption in CURVES:
        pictures += _lines(f"{label} by update", _by_update(runs, lines, field), caption)
    perplexities = _by_rank(runs, "perplexity")
    return [*pictures, *_lines("perplexity by rank", perplexities, ON_SAME_ROWS)]


def spectra(runs: Sequence[Run]) -> list[Picture]:
    """What the adapters' branches do."""
    effective_ranks = _by_rank(runs, "spectrum.effective_rank_mean")
    singular_values = {run.name: list(enumerate(run.spectrum, start=1)) for run in runs}
    linear_shares = _by_update(runs, "evaluations", "spectrum.linear_share_mean")
    return [
        *_lines("effective rank by rank", effective_ranks, ON_SAME_ROWS),
        *_lines(
            "share of the singular values by direction",
            singular_values,
            "Singular values of the branch's centred output over their sum, in the mean over "
            "modules.",
        ),
        *_lines(
            "linear share by update",
            linear_shares,
            "Share of a branch's variance that the best affine map of A x explains, in the mean "
            "over modules. A LoRA's is 1.",
        ),
    ]


def _by_update(runs: Sequence[Run], lines: str, field: str) -> dict[str, Points]:
    """A figure in lines of metrics.jsonl."""
    value = attrgetter(field)
    return {
        run.name: [(line.update, value(line)) for line in getattr(run.metrics, lines)]
        for run in runs
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _by_rank(runs: Sequence[Run], field: str) -> dict[str, Points]:
    """A figure of the finished runs of each method on the same held-out rows and base model: of
    the largest such group."""
    value = attrgetter(f"figures.{field}")
    runs = [run for run in runs if run.result and run.rank and _is_finite(value(run))]
    groups = group_by(runs, lambda run: (run.environment.held_out, run.base))
    largest = max(groups.values(), key=len, default=[])
    methods = group_by(largest, lambda run: run.method)
    return {
        method: sorted((run.rank, value(run)) for run in same) for method, same in methods.items()
    }


def _lines(title: str, lines: Mapping[str, Points], caption: str) -> list[Picture]:
    """The picture of `y by x`: lines by name; none where it would show no more than the table."""
    finite = {name: [(x, y) for x, y in line if _is_finite(y)] for name, line in lines.items()}
    points = {name: line for name, line in finite.items() if line}
    if all(len({x for x, _ in line}) < 2 for line in points.values()):
        return []
    ylabel, _, xlabel = title.partition(" by ")
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for name, line in finite.items():  # an empty line takes its colour and marker too
            places = [x for x, _ in line]
            axes.plot(
                places,
                [y for _, y in line],
                markevery=math.ceil(len(line) / 10) or None,
                linestyle="-" if len({*places}) == len(places) else "none",
                label=shortened(name) if line else None,
            )
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
        columns = 2 if max(map(len, points)) <= LONGEST_LABEL // 2 else 1
        figure.set_figheight(HEIGHT + LEGEND_LINE * math.ceil(len(points) / columns))
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=180)
    ends = "; ".join(
        f"{name}: {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in points.items()
    )
    shown = title.capitalize()
    alt = f"{shown}. {ends}."
    return [Picture(title.replace(" ", "-"), shown, alt, caption, stream.getvalue())]


def shortened(label: str) -> str:
    """A label, without its middle if it is longer."""
    if len(label) <= LONGEST_LABEL:
        return label
    return f"{label[: LONGEST_LABEL - 13]}…{label[-12:]}"
