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
from cera_train.study.results import OutcomeContrast, Slope, contrasts_of, slopes

RESULTS = "study_results.json"

LONGEST_NAME = 28  # characters of an arm or a condition beside the picture, which is narrow

FIGURES = {
    "trainable_parameters": ("parameters", "{:,.0f}".format),
    "seconds": ("time of a run", duration),
    "spectrum.effective_rank_mean": ("effective rank", "{:.1f}".format),
    "spectrum.manifold_dimension_mean": ("manifold dimension", "{:.1f}".format),
    "linear_share_before": ("linear share, start", "{:.1%}".format),
    "spectrum.linear_share_mean": ("linear share, end", "{:.1%}".format),
    "spectrum.gamma": ("gamma", "{:.2f}".format),
}
"""Fields of a RunResult -> the column of a cell's mean over seeds, and its form."""


def write_study(study: Study, output: Path) -> Page:
    """Writes the page of a finished study, and study_results.json: numbers to commit as evidence.
    Raises UserError where runs are missing or cannot be compared."""
    announce("comparing", counted(len(study.cells), "cell"))
    contrasts = contrasts_of(study)
    trends = slopes(study)
    name = study.folder.resolve().name
    command = Environment(study.record.command).command_line or "not on record"
    tables = [verdict_table(study, contrasts), cell_table(study), slope_table(study, trends)]
    page = Page(
        study.config.question or f"Study {name}",
        tables,
        [picture_of(study, contrasts)],
        {name: command},
    )
    page.write(output)

    numbers = {
        "study": name,
        "command": command,
        "config": dataclasses.asdict(study.config),
        "planned_contrasts": study.planned_contrasts,
        "contrasts": list(map(dataclasses.asdict, contrasts)),
        "cells": list(map(_cell_json, study.cells)),
        "slopes": list(map(dataclasses.asdict, trends)),
        **_environments(study),
    }
    numbers = map_values(lambda number: float(f"{number:.6g}"), finite(numbers), float)
    text = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(output / RESULTS, f"{text}\n")
    return page


def _environments(study: Study) -> dict[str, Any]:
    """The machines and the versions of packages that a study's runs had."""
    machines = set[str]()
    versions: dict[str, str] = {}
    for cell in study.cells:
        for run in cell.runs:
            environment = run.environment
            python = f"Python {environment.python}"
            machines.add(f"{environment.machine}, {environment.platform}, {python}")
            versions |= environment.packages or {}
    return {"machines": sorted(machines), "versions": versions}


# --- tables ---------------------------------------------------------------------------------------


def verdict_table(study: Study, contrasts: Sequence[OutcomeContrast]) -> Table:
    primary = study.config.outcomes[0]
    matters = study.config.matters
    rows = []
    for contrast in contrasts:
        outcome = contrast.outcome
        too_small = ""
        if outcome == primary:
            too_small = "yes" if contrast.is_within(matters) else "no"
        row = {
            "contrast": f"{contrast.second} - {contrast.first}",
            "of": f"{contrast.condition}, {outcome}" if contrast.condition else outcome,
            "verdict": contrast.verdict,
            "edge": "; ".join(contrast.edges),
            "difference": _number(outcome, contrast.difference, "+"),
            "95 % interval": _interval(outcome, contrast.lower, contrast.upper),
            "p after Holm": f"{contrast.p_holm:.2g}",
            "detectable": _number(outcome, contrast.detectable),
            "too small": too_small,
        }
        rows.append(row)
    return Table(
        "Verdicts",
        rows,
        "Differences of a loss are in nats a token, of a score in points; the verdict is on the "
        "first-named arm. Edge: an arm is best at the end of its grid, which allows no verdict: "
        "add values beyond it, by study.extend=true. The interval holds for other seeds and "
        f"problems. Holm corrects p over the {counted(study.planned_contrasts, 'contrast')} of "
        "the study's file. Detectable: the smallest difference shown with power 80 %. Too small: "
        f"the interval lies within ±{matters:g}.",
    )


def cell_table(study: Study) -> Table:
    rows = []
    for cell in study.cells:
        chosen = " ".join(f"{key}={value}" for key, value in cell.chosen.values.items())
        row = {"cell": cell.name, "tuned": f"{chosen} (edge)" if cell.edges else chosen}
        for outcome in study.config.outcomes:
            row[outcome] = _mean_and_deviation(outcome, cell.means(outcome))
        for field, (label, form) in FIGURES.items():
            value = cell.figure(field)
            row[label] = "" if value is None else form(value)
        rows.append(row)
    caption = "Means over seeds at the values of the lowest mean loss, ± a standard deviation."
    return Table("Cells", rows, f"{caption} {SPECTRUM_TERMS}")


def slope_table(study: Study, slopes: Sequence[Slope]) -> Table:
    outcome = study.config.outcomes[0]
    rows = [
        {
            "contrast": slope.name,
            f"{outcome} per doubling": _number(outcome, slope.value, "+"),
            "95 % interval": _interval(outcome, *slope.interval),
        }
        for slope in slopes
    ]
    return Table(
        "Slopes",
        rows,
        "Change of the difference with every doubling of the rank. The interval holds for other "
        "seeds.",
    )


def _cell_json(cell: Cell) -> dict[str, Any]:
    outcomes = cell.study.config.outcomes
    losses = [
        point.values | {"loss": losses}
        for point, losses in zip(cell.grid, cell.losses, strict=True)
    ]
    endings = {outcome: cell.endings(outcome) for outcome in outcomes}
    return {
        "arm": cell.arm,
        "condition": cell.condition,
        "chosen": cell.chosen.values,
        "edges": list(map(str, cell.edges)),
        "losses": losses,
        "outcomes": {outcome: cell.means(outcome) for outcome in outcomes},
        **{field.removeprefix("spectrum."): cell.figure(field) for field in FIGURES},
        "endings": {outcome: shares for outcome, shares in endings.items() if shares},
    }


def _mean_and_deviation(outcome: str, by_seed: list[float]) -> str:
    mean = f"{fmean(by_seed):.4f}" if outcome == LOSS else f"{fmean(by_seed):.1%}"
    if len(by_seed) == 1:
        return mean
    return f"{mean} ± {_number(outcome, stdev(by_seed))}"


def _number(outcome: str, value: float, sign: str = "") -> str:
    """Nats of a loss, points of a score."""
    if math.isinf(value):
        return ""
    return f"{value:{sign}.4f}" if outcome == LOSS else f"{100 * value:{sign}.1f}"


def _interval(outcome: str, lower: float, upper: float) -> str:
    return " to ".join(filter(None, (_number(outcome, end, "+") for end in (lower, upper))))


# --- the picture ----------------------------------------------------------------------------------


def picture_of(study: Study, contrasts: Sequence[OutcomeContrast]) -> Picture:
    """A row for every contrast of the primary outcome, with the band of differences that do not
    matter."""
    outcome = study.config.outcomes[0]
    shown = [contrast for contrast in contrasts if contrast.outcome == outcome]
    if outcome == LOSS:
        scale = 1
        unit = "nats"
        better = "Left"
    else:
        scale = 100
        unit = "points"
        better = "Right"
    styles = styles_of({contrast.second: contrast.second for contrast in shown})

    def draw(axes: Axes) -> None:
        matters = scale * study.config.matters
        axes.axvspan(-matters, matters, color=COLORS["base"], alpha=0.15, label="would not matter")
        axes.axvline(0, color=TEXT, linewidth=0.8)
        for row, contrast in enumerate(shown):
            style = styles[contrast.second] | {"linestyle": "none", "markersize": 7}
            color = style["color"]
            fill = BACKGROUND if contrast.verdict == "not shown" else color
            if math.isfinite(contrast.lower):
                ends = [scale * contrast.lower, scale * contrast.upper]
                axes.plot(ends, [row, row], color=color, linewidth=1.8)
            seeds = [scale * value for value in contrast.by_seed]
            below = [row + 0.2] * len(seeds)
            axes.plot(seeds, below, linestyle="none", marker="|", color=color)
            axes.plot(scale * contrast.difference, row, **style | {"markerfacecolor": fill})
        axes.set_yticks(range(len(shown)), list(map(_label, shown)), fontsize=8.5)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"difference in {outcome}, {unit}")

    title = f"Differences in {outcome}"
    numbers = "; ".join(
        f"{contrast.second}: {_number(outcome, contrast.difference, '+')}" for contrast in shown
    )
    caption = (
        f"{better} of zero the first-named arm is better. Lines: 95 % intervals; strokes: seeds; "
        "filled: a difference is shown."
    )
    height = 0.9 + 0.42 * len(shown)
    return Picture("differences", title, f"{title}. {numbers}.", caption, draw, height)


def _label(contrast: OutcomeContrast) -> str:
    lines = [shortened(f"{contrast.second} - {contrast.first}", LONGEST_NAME)]
    if contrast.condition:
        lines.append(shortened(contrast.condition, LONGEST_NAME))
    return "\n".join(lines)
