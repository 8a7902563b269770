"""The page of a study: a verdict for every contrast, one picture, and the numbers."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes

from cera_train.common.files import finite, write_text
from cera_train.common.settings import map_values
from cera_train.common.terminal import announce, counted, duration
from cera_train.report.document import (
    BACKGROUND,
    COLORS,
    TEXT,
    Page,
    Picture,
    Table,
    shortened,
    styles_of,
)
from cera_train.runs.results import SPECTRUM_TERMS, Environment
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Cell, Study
from cera_train.study.results import Comparison, compare_cells, slopes

RESULTS = "study_results.json"

LONGEST_NAME = 28  # characters of an arm or a condition beside the picture, which is narrow

FIGURES = {
    "trainable_parameters": ("parameters", "{:,.0f}".format),
    "seconds": ("time of a run", duration),
    "effective_rank_mean": ("effective rank", "{:.1f}".format),
    "manifold_dimension_mean": ("manifold dimension", "{:.1f}".format),
    "linear_share_before": ("linear share, start", "{:.1%}".format),
    "linear_share_mean": ("linear share, end", "{:.1%}".format),
    "gamma": ("gamma", "{:.2f}".format),
}
"""Figures of result.json -> the column of a cell's mean over seeds, and its form."""


def write_study(study: Study, output: Path) -> Page:
    """Writes the page of a finished study, and study_results.json: numbers to commit as evidence.
    Raises UserError where runs are missing or cannot be compared."""
    cells = study.cells
    outcome = study.config.outcomes[0]
    matters = study.config.matters
    announce("comparing", counted(len(cells), "cell"))
    comparisons = compare_cells(study)
    trends = slopes(study)
    name = study.folder.resolve().name
    command = Environment(study.record.command).command_line or "not on record"
    tables = [
        Table(
            "Verdicts",
            [
                _verdict_row(each, matters if each.outcome == outcome else None)
                for each in comparisons
            ],
            "Differences of a loss are in nats a token, of a score in points; the verdict is on "
            "the first-named arm. "
            "Edge: an arm is best at the end of its grid, which allows no verdict: add values "
            "beyond it, by "
            "study.extend=true. The interval holds for other seeds and problems. Holm corrects p "
            "over the "
            f"{study.family} contrasts of the study's file. Detectable: the smallest difference "
            f"shown with power 80 %. "
            f"Too small: the interval lies within ±{matters:g}.",
        ),
        Table(
            "Cells",
            list(map(_cell_row, cells)),
            f"Means over seeds at the values of the lowest mean loss, ± a standard deviation. "
            f"{SPECTRUM_TERMS}",
        ),
        Table(
            "Slopes",
            [
                {
                    "contrast": slope.name,
                    f"{outcome} per doubling": _number(outcome, slope.value, "+"),
                }
                | {"95 % interval": _interval(outcome, *slope.interval)}
                for slope in trends
            ],
            "Change of the difference with every doubling of the rank. The interval holds for "
            "other seeds.",
        ),
    ]
    picture = _picture(outcome, matters, [each for each in comparisons if each.outcome == outcome])
    page = Page(study.config.question or f"Study {name}", tables, [picture], {name: command})
    page.write(output)
    environments = [run.environment for cell in cells for run in cell.runs]
    numbers = {
        "study": name,
        "command": command,
        "config": dataclasses.asdict(study.config),
        "family": study.family,
        "contrasts": list(map(dataclasses.asdict, comparisons)),
        "cells": list(map(_cell_json, cells)),
        "slopes": list(map(dataclasses.asdict, trends)),
        "machines": sorted(
            {f"{each.machine}, {each.platform}, Python {each.python}" for each in environments}
        ),
        "versions": {
            package: version
            for each in environments
            for package, version in (each.packages or {}).items()
        },
    }
    numbers = map_values(lambda number: float(f"{number:.6g}"), finite(numbers), float)
    write_text(
        output / RESULTS, json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return page


# --- contrasts and cells --------------------------------------------------------------------------


def _verdict_row(comparison: Comparison, matters: float | None) -> dict[str, str]:
    outcome = comparison.outcome
    return {
        "contrast": f"{comparison.second} - {comparison.first}",
        "of": ", ".join(filter(None, [comparison.condition, outcome])),
        "verdict": comparison.verdict,
        "edge": "; ".join(comparison.edges),
        "difference": _number(outcome, comparison.difference, "+"),
        "95 % interval": _interval(outcome, comparison.lower, comparison.upper),
        "p after Holm": f"{comparison.p_holm:.2g}",
        "detectable": _number(outcome, comparison.detectable),
        "too small": "" if matters is None else "yes" if comparison.is_within(matters) else "no",
    }


def _cell_row(cell: Cell) -> dict[str, str]:
    chosen = " ".join(f"{key}={value}" for key, value in cell.chosen.values.items())
    row = {"cell": cell.name, "tuned": f"{chosen} (edge)" if cell.edges else chosen}
    for outcome in cell.study.config.outcomes:
        means = cell.means(outcome)
        row[outcome] = f"{fmean(means):.4f}" if outcome == LOSS else f"{fmean(means):.1%}"
        row[outcome] += f" ± {_number(outcome, stdev(means))}" if len(means) > 1 else ""
    for name, (label, form) in FIGURES.items():
        value = cell.figure(name)
        row[label] = "" if value is None else form(value)
    return row


def _cell_json(cell: Cell) -> dict[str, Any]:
    outcomes = cell.study.config.outcomes
    return {
        "arm": cell.arm,
        "condition": cell.condition,
        "chosen": cell.chosen.values,
        "edges": cell.edges,
        "losses": [
            each.values | {"loss": row}
            for each, row in zip(cell.candidates, cell.losses, strict=True)
        ],
        "outcomes": {outcome: cell.means(outcome) for outcome in outcomes},
        **{name: cell.figure(name) for name in FIGURES},
        "endings": {outcome: endings for outcome in outcomes if (endings := cell.endings(outcome))},
    }


def _number(outcome: str, value: float, sign: str = "") -> str:
    """Nats of a loss, points of a score."""
    if math.isinf(value):
        return ""
    return f"{value:{sign}.4f}" if outcome == LOSS else f"{100 * value:{sign}.1f}"


def _interval(outcome: str, lower: float, upper: float) -> str:
    return " to ".join(filter(None, (_number(outcome, end, "+") for end in (lower, upper))))


# --- the picture ----------------------------------------------------------------------------------


def _picture(outcome: str, matters: float, comparisons: Sequence[Comparison]) -> Picture:
    """A row for every contrast of the primary outcome, with the band of differences that do not
    matter."""
    scale, unit = (1, "nats") if outcome == LOSS else (100, "points")
    styles = styles_of({each.second: each.second for each in comparisons})

    def draw(axes: Axes) -> None:
        axes.axvspan(
            -scale * matters,
            scale * matters,
            color=COLORS["base"],
            alpha=0.15,
            label="would not matter",
        )
        axes.axvline(0, color=TEXT, linewidth=0.8)
        for row, each in enumerate(comparisons):
            style = styles[each.second] | {"linestyle": "none", "markersize": 7}
            fill = BACKGROUND if each.verdict == "not shown" else style["color"]
            if math.isfinite(each.lower):
                ends = [scale * each.lower, scale * each.upper]
                axes.plot(ends, [row, row], color=style["color"], linewidth=1.8)
            seeds = [scale * value for value in each.by_seed]
            axes.plot(
                seeds, [row + 0.2] * len(seeds), linestyle="none", marker="|", color=style["color"]
            )
            axes.plot(scale * each.difference, row, **style | {"markerfacecolor": fill})
        names = ([f"{each.second} - {each.first}", each.condition] for each in comparisons)
        labels = [
            "\n".join(shortened(name, LONGEST_NAME) for name in lines if name) for lines in names
        ]
        axes.set_yticks(range(len(comparisons)), labels, fontsize=8.5)
        axes.set_ylim(len(comparisons) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"difference in {outcome}, {unit}")

    title = f"Differences in {outcome}"
    better = "Left" if outcome == LOSS else "Right"
    numbers = "; ".join(
        f"{each.second}: {_number(outcome, each.difference, '+')}" for each in comparisons
    )
    caption = (
        f"{better} of zero the first-named arm is better. Lines: 95 % intervals; strokes: seeds; "
        f"filled: a difference "
        "is shown."
    )
    return Picture(
        "differences", title, f"{title}. {numbers}.", caption, draw, 0.9 + 0.42 * len(comparisons)
    )
