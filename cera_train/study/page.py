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
from cera_train.common.settings import map_values, require
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


def write_studies(studies: Sequence[Study], output: Path) -> Page:
    """Writes the page of finished studies, and each one's study_results.json: numbers to commit as
    evidence. Raises UserError where they are not of one family, where runs are missing, or where
    they cannot be compared."""
    families = {study.config.family for study in studies}
    names = [study.folder.resolve().name for study in studies]
    require(
        len(studies) == 1 or (len(families) == 1 and None not in families),
        f"{', '.join(names)}: their study.family is {', '.join(map(str, families))}. Report "
        "families apart.",
    )
    announce("comparing", counted(sum(len(study.cells) for study in studies), "cell"))
    contrasts = dict(zip(names, contrasts_of(*studies), strict=True))
    planned = sum(study.planned_contrasts for study in studies)
    tables = []
    pictures = []
    commands = {}
    for name, study in zip(names, studies, strict=True):
        of_study = f" of {name}" if len(studies) > 1 else ""
        trends = slopes(study)
        tables += [
            verdict_table(study, contrasts[name], f"Verdicts{of_study}", planned),
            cell_table(study, f"Cells{of_study}"),
            slope_table(study, trends, f"Slopes{of_study}"),
        ]
        pictures.append(picture_of(study, contrasts[name], of_study))
        commands[name] = Environment(study.record.command).command_line or "not on record"
        numbers = {
            "study": name,
            "command": commands[name],
            "config": dataclasses.asdict(study.config),
            "family": names,
            "planned_contrasts": planned,
            "contrasts": list(map(dataclasses.asdict, contrasts[name])),
            "cells": list(map(_cell_json, study.cells)),
            "slopes": list(map(dataclasses.asdict, trends)),
            **_environments(study),
        }
        numbers = map_values(lambda number: float(f"{number:.6g}"), finite(numbers), float)
        text = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
        file = output / (f"{name}/{RESULTS}" if of_study else RESULTS)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{text}\n")
    title = studies[0].config.question or f"Study {names[0]}"
    page = Page(title, tables, pictures, commands)
    page.write(output)
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


def verdict_table(
    study: Study, contrasts: Sequence[OutcomeContrast], title: str, planned: int
) -> Table:
    """
    Args:
        planned: the contrasts over which Holm's method corrects.
    """
    matters = study.config.matters
    rows = []
    for contrast in contrasts:
        outcome = contrast.outcome
        too_small = ""
        if outcome == study.config.primary:
            too_small = "yes" if contrast.is_within(matters) else "no"
        verdict = contrast.verdict
        if verdict == "not shown" and math.isfinite(contrast.detectable):
            verdict += f" (detects {_number(outcome, contrast.detectable)})"
        row = {
            "contrast": f"{contrast.second} - {contrast.first}",
            "of": f"{contrast.condition}, {outcome}" if contrast.condition else outcome,
            "verdict": verdict,
            "no verdict": "; ".join(contrast.obstacles),
            "difference": _number(outcome, contrast.difference, "+"),
            "95 % interval": _interval(outcome, contrast.lower, contrast.upper),
            "p after Holm": "" if contrast.p_holm is None else f"{contrast.p_holm:.2g}",
            "too small": too_small,
        }
        rows.append(row)
    drawn = "bases" if study.config.bases else "seeds and problems"
    tuned = study.config.tuned_elsewhere
    family = study.config.family
    of_family = f" of the studies of {family} in this report" if family else ""
    return Table(
        title,
        rows,
        "Differences of a loss are in nats a token, of a score in points; the verdict is on the "
        "first-named arm or difference. Not shown: the difference that is shown with power 80 %. "
        "No verdict: the best value is at an end of its grid (add values beyond it, by "
        "study.extend=true), was alone or has no order, or was chosen by another outcome. "
        f"The interval holds for other {drawn}. Holm corrects p over {planned} planned "
        f"{'contrast' if planned == 1 else 'contrasts'}{of_family}. Too small: the interval "
        f"lies within ±{matters:g}." + (f" Arms were tuned in {tuned}." if tuned else ""),
    )


def cell_table(study: Study, title: str) -> Table:
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
    drawn = "bases" if study.config.bases else "seeds"
    caption = f"Means over {drawn} at the values of the lowest mean loss, ± a standard deviation."
    return Table(title, rows, f"{caption} {SPECTRUM_TERMS}")


def slope_table(study: Study, slopes: Sequence[Slope], title: str) -> Table:
    outcome = study.config.primary
    step = "doubling of the rank"
    for key, numbers in study.config.slope.items():
        step = f"unit of {key} at {', '.join(f'{number:g}' for number in numbers)}"
    rows = [
        {
            "contrast": slope.name,
            f"{outcome} per step": _number(outcome, slope.value, "+"),
            "95 % interval": _interval(outcome, *slope.interval),
        }
        for slope in slopes
    ]
    return Table(
        title,
        rows,
        f"Change of the difference with every {step}. The interval holds for other "
        f"{'bases' if study.config.bases else 'seeds'}.",
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
        "obstacles": cell.obstacles,
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


def picture_of(study: Study, contrasts: Sequence[OutcomeContrast], of_study: str) -> Picture:
    """A row for every contrast of the primary outcome, with the band of differences that do not
    matter."""
    outcome = study.config.primary
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

    title = f"Differences in {outcome}{of_study}"
    numbers = "; ".join(
        f"{contrast.second}: {_number(outcome, contrast.difference, '+')}" for contrast in shown
    )
    caption = (
        f"{better} of zero the first-named arm is better. Lines: 95 % intervals; strokes: "
        f"{'bases' if study.config.bases else 'seeds'}; filled: a difference is shown."
    )
    height = 0.9 + 0.42 * len(shown)
    return Picture(
        f"differences{of_study}".replace(" ", "_"),
        title,
        f"{title}. {numbers}.",
        caption,
        draw,
        height,
    )


def _label(contrast: OutcomeContrast) -> str:
    lines = [shortened(f"{contrast.second} - {contrast.first}", LONGEST_NAME)]
    if contrast.condition:
        lines.append(shortened(contrast.condition, LONGEST_NAME))
    return "\n".join(lines)
