"""The page of a study: a verdict for every contrast, one picture, and the numbers."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cera_train.common.files import finite, write_text
from cera_train.common.settings import map_values, require
from cera_train.common.terminal import announce, counted, duration
from cera_train.report.document import Page, Table
from cera_train.report.forest import Forest, Group, row_of
from cera_train.report.runs import group_by
from cera_train.runs.results import SPECTRUM_TERMS, Environment
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Cell
from cera_train.study.folder import Study
from cera_train.study.results import OutcomeContrast, contrasts_of
from cera_train.verdicts.verdict import number

RESULTS = "study_results.json"

CAPTION = (
    "The first-named arm minus the second, in multiples of the smallest difference that matters "
    "(dotted); the axis is linear near zero and logarithmic far from it. Line: 95 % interval. "
    "Strokes below: seeds, or bases. Grey: differences that a study would miss in more than one of "
    "five repeats. Too small: the interval lies between the dotted lines."
)

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
    evidence. Studies that are reported together are a family, over which Holm's method corrects.
    Raises UserError where runs are missing, or cannot be compared."""
    names = [study.folder.resolve().name for study in studies]
    require(
        len({*names}) == len(names),
        f"two of the studies have the name {max(names, key=names.count)}: rename a folder.",
    )
    announce("comparing", counted(sum(len(study.cells) for study in studies), "cell"))
    contrasts = dict(zip(names, contrasts_of(*studies), strict=True))
    planned = sum(study.planned_contrasts for study in studies)
    corrected = counted(planned, "planned contrast")
    tables = []
    groups = []
    commands = {}
    for name, study in zip(names, studies, strict=True):
        of_study = f" of {name}" if len(studies) > 1 else ""
        tables += [
            verdict_table(study, contrasts[name], f"Verdicts{of_study}", corrected),
            cell_table(study, f"Cells{of_study}"),
        ]
        groups += groups_of(study, contrasts[name], f"{name}, " if of_study else "")
        commands[name] = Environment(study.record.command).command_line or "not on record"
        numbers = {
            "study": name,
            "command": commands[name],
            "config": dataclasses.asdict(study.config),
            "family": names,
            "planned_contrasts": planned,
            "contrasts": list(map(dataclasses.asdict, contrasts[name])),
            "cells": list(map(_cell_json, study.cells)),
            **_environments(study),
        }
        _write_numbers(numbers, output / name / RESULTS if of_study else output / RESULTS)
    title = studies[0].config.question or f"Study {names[0]}"
    verdicts = Forest("verdicts", title, CAPTION, groups)
    page = Page(title, tables, [], commands, verdicts=verdicts)
    page.write(output)
    return page


def _write_numbers(numbers: dict[str, Any], file: Path) -> None:
    """Writes numbers with six digits, and null for those that are not finite."""
    rounded = map_values(lambda number: float(f"{number:.6g}"), finite(numbers), float)
    text = json.dumps(rounded, indent=1, ensure_ascii=False, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, f"{text}\n")


def _environments(study: Study) -> dict[str, Any]:
    """The machines and the versions of packages that a study's runs had."""
    environments = [run.environment for cell in study.cells for run in cell.runs]
    machines = {f"{each.machine}, {each.platform}, Python {each.python}" for each in environments}
    packages = [each.packages or {} for each in environments]
    versions = {f"{name} {version}" for each in packages for name, version in each.items()}
    return {"machines": sorted(machines), "versions": sorted(versions)}


def groups_of(study: Study, contrasts: Sequence[OutcomeContrast], of_study: str) -> list[Group]:
    """The contrasts of the first outcome that have a difference, by condition."""
    config = study.config
    shown = [
        contrast
        for contrast in contrasts
        if contrast.outcome == config.first_outcome and math.isfinite(contrast.difference)
    ]
    return [
        Group(
            f"{of_study}{brief(condition) or config.first_outcome}",
            unit_of(config.first_outcome, [contrast.matters for contrast in same]),
            [row_of(contrast, contrast.matters, contrast_name(contrast)) for contrast in same],
        )
        for condition, same in group_by(shown, lambda contrast: contrast.condition).items()
    ]


# --- words of the picture -------------------------------------------------------------------------


def contrast_name(contrast: OutcomeContrast) -> str:
    """A difference of differences has the name of its question."""
    is_plain = "(" not in contrast.first + contrast.second
    return f"{contrast.second} - {contrast.first}" if is_plain else contrast.asked


def brief(condition: str) -> str:
    """`r = 16, even` of `adapter.r=16, data.train_files=['folder/even.jsonl']`."""
    condition = re.sub(r"[\w.]+=\[?'?[^',]*/([^/',]+?)(\.jsonl)?'?\]?(?=,|$)", r"\1", condition)
    return re.sub(r"(?:\w+\.)*(\w+)=", r"\1 = ", condition)


def unit_of(outcome: str, matters: Sequence[float]) -> str:
    """What a unit of rows is, in words; of rows of several studies, their range."""
    factor = 1 if outcome == LOSS else 100
    ends = dict.fromkeys(f"{factor * end:g}" for end in (min(matters), max(matters)))
    unit = "nats" if outcome == LOSS else f"points of {outcome}"
    return f"what matters: {' to '.join(ends)} {unit}"


# --- tables ---------------------------------------------------------------------------------------


def verdict_table(
    study: Study, contrasts: Sequence[OutcomeContrast], title: str, corrected: str
) -> Table:
    """
    Args:
        corrected: over which contrasts Holm's method corrects, in words.
    """
    rows = [
        {
            "contrast": f"{contrast.second} - {contrast.first}",
            "of": ", ".join(filter(None, [brief(contrast.condition), contrast.outcome])),
            "verdict": contrast.mark,
            "reason": "; ".join(contrast.obstacles),
            "difference": contrast.difference_text,
            "95 % interval": contrast.interval_text,
            "detects": number(contrast.detectable, contrast.is_loss),
            "p after Holm": "" if contrast.p_holm is None else f"{contrast.p_holm:.2g}",
        }
        for contrast in contrasts
    ]
    drawn = "bases" if study.config.bases else "seeds and problems"
    return Table(
        title,
        rows,
        "Differences of a loss are in nats a token, of a score in points; the verdict is on the "
        "first-named arm or difference. Detects: the difference that is shown with power 80 %. "
        "No verdict: the best value is at an end of its grid (add values beyond it, by "
        "study.extend=true), was alone, or was chosen by another outcome; or a "
        "judging run diverged (let more seeds choose, by study.tune_seeds, under another name). "
        f"The interval holds for other {drawn}. Holm corrects p over {corrected}. "
        f"Too small: the interval lies within ±{study.config.matters:g}, and within a tenth of the "
        "first side's loss.",
    )


def cell_table(study: Study, title: str) -> Table:
    rows = []
    for cell in study.cells:
        chosen = " ".join(f"{key}={value}" for key, value in cell.chosen.values.items())
        name = ", ".join(filter(None, [cell.arm, brief(cell.condition)]))
        row = {"cell": name, "tuned": chosen}
        for outcome in study.config.outcomes:
            row[outcome] = _mean_and_deviation(outcome, cell.means(outcome))
        for field, (label, form) in FIGURES.items():
            value = cell.figure(field)
            row[label] = "" if value is None else form(value)
        rows.append(row)
    drawn = "bases" if study.config.bases else "seeds"
    caption = f"Means over {drawn} at the values of the lowest mean loss, ± a standard deviation."
    return Table(title, rows, f"{caption} {SPECTRUM_TERMS}")


def _cell_json(cell: Cell) -> dict[str, Any]:
    outcomes = cell.study.config.outcomes
    losses = [
        point.values | {"loss": losses}
        for point, losses in zip(cell.grid, cell.losses, strict=True)
    ]
    return {
        "arm": cell.arm,
        "condition": cell.condition,
        "chosen": cell.chosen.values,
        "obstacles": cell.obstacles,
        "losses": losses,
        "outcomes": {outcome: cell.means(outcome) for outcome in outcomes},
        **{field.removeprefix("spectrum."): cell.figure(field) for field in FIGURES},
    }


def _mean_and_deviation(outcome: str, by_seed: list[float]) -> str:
    if not by_seed:
        return ""
    mean = f"{fmean(by_seed):.4f}" if outcome == LOSS else f"{fmean(by_seed):.1%}"
    if len(by_seed) == 1:
        return mean
    return f"{mean} ± {number(stdev(by_seed), outcome == LOSS)}"
