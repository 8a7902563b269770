"""The page of a study: a verdict for every contrast, one picture, and the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from cera_train.common.drawing import BACKGROUND, COLORS, TEXT, Picture, render, styles_of
from cera_train.common.files import finite, write_bytes, write_text
from cera_train.common.pages import Table, print_rows, template, without_empty_columns
from cera_train.common.settings import map_values
from cera_train.common.terminal import duration, print_line
from cera_train.runs.card import escape
from cera_train.runs.results import Environment
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Study
from cera_train.study.results import CellResult, Comparison, Slope, compare_cells, read_results, slopes
from cera_train.sweep.record import RECORD, SweepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = "study_results.json"


@dataclass(frozen=True)
class StudyReport:
    """What a study found."""

    study: Study
    results: list[CellResult]
    comparisons: list[Comparison]
    slopes: list[Slope]
    command: str
    """Runs the study, and goes on with it."""

    @property
    def title(self) -> str:
        return self.study.config.question or f"Study {self.study.folder.resolve().name}"

    @property
    def tables(self) -> list[Table]:
        outcomes, matters = self.study.config.outcomes, self.study.config.matters
        tables = [
            Table(
                "Verdicts",
                [_verdict(each, matters if each.outcome == outcomes[0] else None) for each in self.comparisons],
                "Differences of a loss are in nats a token, of a score in points; the verdict is on the first-named "
                "arm. The interval holds for other seeds and problems. Holm corrects p over the contrasts of an "
                "outcome. Detectable: the smallest difference shown with power 80 %. Too small: the interval lies "
                f"within ±{matters:g}.",
            ),
            Table(
                "Cells",
                without_empty_columns([_cell(result, outcomes) for result in self.results]),
                "Means over seeds at the values that the other seeds chose, ± a standard deviation. Edge: the last "
                "value of the grid, so a better one may lie beyond it. Linear share: what an affine map explains of a "
                "branch's variance.",
            ),
            Table(
                "Slopes",
                [_slope(slope, outcomes[0]) for slope in self.slopes],
                "Change of the outcome with every doubling of the rank. The interval holds for other seeds.",
            ),
        ]
        return [table for table in tables if table.rows]

    @property
    def picture(self) -> Picture:
        outcome = self.study.config.outcomes[0]
        primary = [comparison for comparison in self.comparisons if comparison.outcome == outcome]
        return _differences(outcome, self.study.config.matters, primary)

    def to_json(self) -> dict[str, Any]:
        """study_results.json: numbers to commit as evidence."""
        environments = [each for result in self.results for each in result.environments.values()]
        return {
            "study": self.study.folder.resolve().name,
            "command": self.command,
            "config": dataclasses.asdict(self.study.config),
            "contrasts": list(map(dataclasses.asdict, self.comparisons)),
            "cells": list(map(_cell_json, self.results)),
            "slopes": list(map(dataclasses.asdict, self.slopes)),
            "machines": sorted({f"{each.machine}, {each.platform}, Python {each.python}" for each in environments}),
            "versions": {name: version for each in environments for name, version in (each.packages or {}).items()},
        }


def write_study(study: Study, output: Path) -> StudyReport:
    """Writes report.html, which needs nothing beside it, report.md with its picture, and study_results.json.

    Raises:
        UserError: what `read_results` and `compare_cells` refuse.
    """
    results = read_results(study)
    command = Environment(SweepRecord.read(study.folder / RECORD).command).command_line or ""
    report = StudyReport(study, results, compare_cells(study, results), slopes(study, results), command)
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / f"{report.picture.name}.png", render(report.picture, "png"))
    for name in ("report.md", "report.html"):
        write_text(output / name, template("cera_train.study", name, md=escape).render(report=report))
    rounded = map_values(lambda number: float(f"{number:.6g}"), finite(report.to_json()), float)
    write_text(output / RESULTS, json.dumps(rounded, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return report


def print_study(report: StudyReport, output: Path) -> None:
    print(f"{report.title}\n")
    for table in report.tables:
        print_rows(table.rows)
    print_line("report", f" {output / 'report.html'}, {output / 'report.md'}, {output / RESULTS}")


def _cell_json(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    figures = ("trainable_parameters", "seconds", "effective_rank_mean", "manifold_dimension_mean",
               "linear_share_mean", "gamma")  # fmt: skip
    return {
        "arm": cell.arm,
        "condition": cell.condition,
        "chosen": result.chosen,
        "losses": [each.values | {"loss": [each.loss(seed) for seed in cell.tuning]} for each in cell.candidates],
        "outcomes": {outcome: values.means for outcome, values in result.values.items()},
        **{name: result.figure(name) for name in figures},
        "endings": result.endings,
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def _verdict(comparison: Comparison, matters: float | None) -> dict[str, str]:
    outcome = comparison.outcome
    return {
        "contrast": f"{comparison.second} - {comparison.first}",
        "of": ", ".join(filter(None, [comparison.condition, outcome])),
        "verdict": comparison.verdict,
        "difference": _number(outcome, comparison.difference, "+"),
        "95 % interval": _interval(outcome, (comparison.lower, comparison.upper)),
        "p after Holm": f"{comparison.p_holm:.2g}",
        "detectable": _number(outcome, comparison.detectable),
        "too small": "" if matters is None else "yes" if comparison.is_within(matters) else "no",
    }


def _cell(result: CellResult, outcomes: Sequence[str]) -> dict[str, str]:
    forms = {
        "parameters": ("trainable_parameters", "{:,.0f}".format),
        "time of a run": ("seconds", duration),
        "effective rank": ("effective_rank_mean", "{:.1f}".format),
        "linear share": ("linear_share_mean", "{:.1%}".format),
        "gamma": ("gamma", "{:.2f}".format),
    }
    row = {"cell": result.cell.name, "tuned": "; ".join(result.chosen)}
    for outcome in outcomes:
        means = result.values[outcome].means
        row[outcome] = f"{fmean(means):.4f}" if outcome == LOSS else f"{fmean(means):.1%}"
        row[outcome] += f" ± {_number(outcome, stdev(means))}" if len(means) > 1 else ""
    figures = {label: (result.figure(name), form) for label, (name, form) in forms.items()}
    return row | {label: "" if value is None else form(value) for label, (value, form) in figures.items()}


def _slope(slope: Slope, outcome: str) -> dict[str, str]:
    return {
        "arm": slope.name,
        f"{outcome} per doubling": _number(outcome, slope.value, "+"),
        "95 % interval": _interval(outcome, slope.interval),
    }


def _number(outcome: str, value: float, sign: str = "") -> str:
    """Nats of a loss, points of a score."""
    if math.isinf(value):
        return ""
    return f"{value:{sign}.4f}" if outcome == LOSS else f"{100 * value:{sign}.1f}"


def _interval(outcome: str, ends: tuple[float, float]) -> str:
    return "" if math.isinf(ends[0]) else " to ".join(_number(outcome, end, "+") for end in ends)


# --- the picture -----------------------------------------------------------------------------------------------------


def _differences(outcome: str, matters: float, comparisons: Sequence[Comparison]) -> Picture:
    """A row for every contrast of the primary outcome, with the band of differences that do not matter."""
    scale, unit = (1, "nats") if outcome == LOSS else (100, "points")
    styles = styles_of({each.second: each.second for each in comparisons})

    def draw(axes: Axes) -> None:
        axes.axvspan(-scale * matters, scale * matters, color=COLORS["base"], alpha=0.15, label="would not matter")
        axes.axvline(0, color=TEXT, linewidth=0.8)
        for row, each in enumerate(comparisons):
            style = styles[each.second] | {"linestyle": "none", "markersize": 7}
            fill = BACKGROUND if each.verdict == "not shown" else style["color"]
            ends = [scale * each.lower, scale * each.upper]
            if math.isfinite(ends[0]):
                axes.plot(ends, [row, row], color=style["color"], linewidth=1.8)
            seeds = [scale * value for value in each.by_seed]
            axes.plot(seeds, [row + 0.2] * len(seeds), linestyle="none", marker="|", color=style["color"])
            axes.plot(scale * each.difference, row, **style | {"markerfacecolor": fill})
        labels = ["\n".join(filter(None, [f"{each.second} - {each.first}", each.condition])) for each in comparisons]
        axes.set_yticks(range(len(comparisons)), labels, fontsize=8.5)
        axes.set_ylim(len(comparisons) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"difference in {outcome}, {unit}")

    title, better = f"Differences in {outcome}", "Left" if outcome == LOSS else "Right"
    numbers = "; ".join(f"{each.second}: {_number(outcome, each.difference, '+')}" for each in comparisons)
    caption = (
        f"{better} of zero the first-named arm is better. Lines: 95 % intervals; strokes: seeds; filled: a difference "
        "is shown."
    )
    return Picture("differences", title, f"{title}. {numbers}.", caption, draw, 0.9 + 0.42 * len(comparisons))
