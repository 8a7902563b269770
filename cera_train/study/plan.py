"""What a study needs before it runs, and the smallest difference that it detects. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from omegaconf import DictConfig

from cera_train.common.settings import require
from cera_train.common.terminal import counted, print_line, print_table
from cera_train.planning.plan import RunPlan, make_plan
from cera_train.planning.table import JOB_HEADS, describe_data, job_cells, model_of, print_device, print_missing_price
from cera_train.settings.planning import PlanConfig
from cera_train.settings.run import PlanRun
from cera_train.settings.sweep import LOSS, SCORE, StudyConfig
from cera_train.study.cells import Cell, read_study
from cera_train.study.design import check_cells, study_record
from cera_train.study.verdict import POWER, Variances, detectable
from cera_train.sweep.folder import ComposeJob

# --- cost ------------------------------------------------------------------------------------------------------------


def plan_cells(config: DictConfig, compose: ComposeJob[PlanRun]) -> list[tuple[Cell, list[RunPlan]]]:
    """The cells of a study, each with the plans of its runs, the dearest last.

    Args:
        config: what Hydra composed for the sweep, with its own section.
    """
    planned = []
    for cell, _ in check_cells(config, study_record(config), compose):
        candidates = [make_plan(compose(each.overrides)) for each in cell.candidates]
        candidates.sort(key=lambda plan: plan.seconds)
        tuning = len(cell.tuning)
        planned.append((cell, candidates * tuning + candidates[-1:] * (cell.seeds - tuning)))
    return planned


def print_cells(cells: Sequence[tuple[Cell, list[RunPlan]]], study: StudyConfig) -> None:
    """The table of all cells with their sum."""
    print_line("study", study.question)
    lines = [("model", model_of(runs[-1])) for _, runs in cells]
    lines += [(label, f"{cell.task}: {text}" if cell.task else text)
              for cell, runs in cells for label, text in describe_data(runs[-1])]  # fmt: skip
    for line in dict.fromkeys(lines):
        print_line(*line)
    first = cells[0][1][-1]
    print_device(first)
    print()
    rows = [
        [
            *(cell.name, f"{runs[-1].parameters.trainable:,}", f"{len(runs)}", *job_cells(runs)),
            "" if runs[-1].fits else f"does not fit {runs[-1].device.name}",
        ]
        for cell, runs in cells
    ]
    every = [run for _, runs in cells for run in runs]
    rows.append([counted(len(cells), "cell"), "", f"{len(every):,}", *job_cells(every), ""])
    print_table(["cell", "trainable", "runs", *JOB_HEADS, ""], rows, right=range(1, 8))
    print()
    print_missing_price(first)


# --- power -----------------------------------------------------------------------------------------------------------


def known_variances(study: StudyConfig, plan: PlanConfig) -> dict[str, Variances]:
    """The variances of outcomes, as they are given or were measured.

    Raises:
        UserError: they are given for an outcome that the study has not, or those of an unfinished study.
    """
    if plan.variances is not None:
        return variances_measured(Path(plan.variances))
    for outcome in plan.spread.by_outcome:
        names = ", ".join(study.outcomes)
        require(outcome in study.outcomes, f"plan.spread: {outcome} is no outcome of this study: choose from {names}.")
    return {outcome: Variances(*(sd**2 for sd in given)) for outcome, given in plan.spread.by_outcome.items()}


def variances_measured(folder: Path) -> dict[str, Variances]:
    """By outcome, the means over the contrasts of a finished study."""
    from cera_train.study.results import compare_cells, read_results

    study, parts = read_study(folder), dict[str, list[tuple[float, ...]]]()
    for comparison in compare_cells(study, read_results(study)):
        if comparison.variances is not None:
            parts.setdefault(comparison.outcome, []).append(dataclasses.astuple(comparison.variances))
    require(
        bool(parts),
        f"plan.variances={folder} has one seed an arm, which tells nothing of others. Name a study with more.",
    )
    return {outcome: Variances(*map(fmean, zip(*rows, strict=True))) for outcome, rows in parts.items()}


def print_power(
    study: StudyConfig, cells: Sequence[tuple[Cell, list[RunPlan]]], variances: Mapping[str, Variances], source: str
) -> None:
    """The smallest difference that a study detects in each outcome, beside the one that matters.

    Args:
        source: the setting that the variances come from.
    """
    arms: dict[str, set[str]] = {}
    for cell, _ in cells:
        arms.setdefault(cell.condition, set()).add(cell.arm)
    contrasts = sum({*pair} <= names for names in arms.values() for pair in study.pairs)
    for outcome in study.outcomes:
        if outcome not in variances:
            mend = f"set plan.spread.seed={{{outcome}: ...}}, or plan.variances to a study"
            print_line("detects", f"{outcome}: {mend}")
            continue
        what = "rows" if outcome == LOSS else "problems"
        problems = min(_problems(outcome, runs[-1]) for _, runs in cells)
        smallest = detectable(variances[outcome], study.seeds, problems, contrasts)
        print_line(
            "detects",
            f"{outcome}: a difference of {smallest:.2g} with probability {POWER}: {study.seeds} seeds, {problems:,} "
            f"{what}, Holm's first step over {contrasts} contrasts",
        )
        seed, problem, residual = map(math.sqrt, dataclasses.astuple(variances[outcome]))
        print_line(
            "",
            f"standard deviations of a difference by {source}: {seed:.2g} between seeds, {problem:.2g} between {what}, "
            f"{residual:.2g} beyond both",
        )
        if outcome == study.outcomes[0]:
            verb = "is" if smallest <= study.matters else "is not"
            print_line("", f"study.matters={study.matters:g} {verb} detected")


def _problems(outcome: str, plan: RunPlan) -> int:
    """Rows of a loss, or problems of a task."""
    if outcome == LOSS:
        return plan.data.eval_rows
    return next(size.problems for size in plan.tasks if outcome in (SCORE, size.name))
