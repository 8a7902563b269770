"""study_results.json: the tables of a study's page as numbers, small enough to commit as evidence."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from cera_train.common.files import finite
from cera_train.common.settings import map_values
from cera_train.report.study.failures import ending_shares

if TYPE_CHECKING:
    from cera_train.report.study.cells import CellResult
    from cera_train.report.study.contrasts import Comparison, RankLine, SlopeGap
    from cera_train.report.study.page import StudyReport

RESULTS = "study_results.json"


def results_of(report: StudyReport) -> str:
    """The text of the file."""
    tree = {
        "study": report.name,
        "question": report.study.config.question,
        "verdicts": report.verdicts,
        "outcomes": [dataclasses.asdict(own) for own in report.outcomes],
        "contrasts": list(map(_contrast, report.comparisons)),
        "cells": [_cell(report, own) for own in report.cells],
        "plateau": list(map(_line, report.lines)),
        "slope_differences": list(map(_gap, report.gaps)),
        "difficulty": list(map(dataclasses.asdict, report.difficulties)),
        "machines": report.machines,
        "versions": report.versions,
        "commands": report.commands | {"each cell alone": report.by_hand},
    }
    rounded = map_values(lambda number: float(f"{number:.6g}"), finite(tree), float)
    return json.dumps(rounded, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _contrast(own: Comparison) -> dict[str, Any]:
    found, (seeds, problems) = own.contrast, own.needed
    return {
        "outcome": own.outcome.name,
        "asked": own.asked,
        "first": own.first.cell.arm,
        "second": own.second.cell.arm,
        "condition": own.condition,
        "difference": found.difference,
        "interval": [found.lower, found.upper],
        "p": found.p_value,
        "p_holm": own.p_value,
        "verdict": own.verdict,
        "detectable": own.detectable,
        "seeds": own.seeds,
        "problems": own.problems,
        "needed_seeds": seeds,
        "needed_problems": problems,
        "by_seed": own.by_seed,
        "variances": found.variances and dataclasses.asdict(found.variances),
    }


def _cell(report: StudyReport, own: CellResult) -> dict[str, Any]:
    result, spectrum = ("trainable_parameters", "seconds"), ("effective_rank", "manifold_dimension", "linear_share")
    return {
        "arm": own.cell.arm,
        "condition": own.condition,
        "chosen": own.cell.chosen,
        "seeds": list(own.runs),
        "outcomes": {outcome.name: own.values[outcome.name].means for outcome in report.outcomes},
        **{name: own.figure(name) for name in result},
        **{name: own.spectrum(f"{name}_mean") for name in spectrum},
        "gamma": own.spectrum("gamma"),
        "endings": {outcome: ending_shares(own, outcome) for outcome in own.grades},
    }


def _line(own: RankLine) -> dict[str, Any]:
    steps = [dataclasses.asdict(step) for step in own.slope.steps]
    overall = dataclasses.asdict(own.slope.overall)
    return {
        "arm": own.arm,
        "condition": own.others,
        "ranks": own.ranks,
        "by_seed": own.slope.values,
        "slope": overall,
        "steps": steps,
        "plateau": own.slope.plateau,
    }


def _gap(own: SlopeGap) -> dict[str, Any]:
    return {
        "first": own.first.arm,
        "second": own.second.arm,
        "condition": own.second.others,
        "slope_difference": dataclasses.asdict(own.difference),
    }
