"""What a study needs before it runs, and the smallest difference that it detects. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cera_train.common.settings import require
from cera_train.common.terminal import counted, print_line, print_table
from cera_train.planning.plan import RunPlan, make_plan
from cera_train.planning.table import JOB_HEADS, describe_data, job_cells, model_of, print_device, print_missing_price
from cera_train.settings.run import PlanRun
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Cell, Study, study_on_record
from cera_train.study.design import check_cells, study_of, study_record
from cera_train.study.verdict import POWER, Variances, detectable
from cera_train.sweep.folder import ComposeJob


def plan_study(config: DictConfig, compose: ComposeJob[PlanRun]) -> None:
    """Prints the plan of every cell, their sum, and what the study detects.

    Args:
        config: what Hydra composed for the sweep, with its own section.
    """
    outcomes, spread = study_of(config).outcomes, OmegaConf.to_object(config.plan).spread or {}
    for outcome in spread:
        names = ", ".join(outcomes)
        require(outcome in outcomes, f"plan.spread: {outcome} is no outcome of this study: choose from {names}.")
    study = study_on_record(Path(config.hydra.sweep.dir), study_record(config))
    planned = []
    for cell, _ in check_cells(config, study, compose):
        candidates = [make_plan(compose(each.overrides)) for each in cell.candidates]
        candidates.sort(key=lambda plan: plan.seconds)  # the values that will be chosen are unknown: count the dearest
        tuning = len(cell.tuning)
        planned.append((cell, candidates * tuning + candidates[-1:] * (cell.seeds - tuning)))
    print_line("study", study.config.question)
    print_cells(planned)
    print_power(study, [runs[-1] for _, runs in planned], spread)


def print_cells(cells: Sequence[tuple[Cell, list[RunPlan]]]) -> None:
    """The table of all cells with their sum.

    Args:
        cells: each with the plans of its runs, the dearest last.
    """
    lines = [("model", model_of(runs[-1])) for _, runs in cells]
    lines += [line for _, runs in cells for line in describe_data(runs[-1])]
    for line in dict.fromkeys(lines):
        print_line(*line)
    first = cells[0][1][-1]
    print_device(first)
    print()
    rows = [
        [
            *(cell.name, f"{runs[-1].trainable:,}", f"{len(runs)}", *job_cells(runs)),
            "" if runs[-1].fits else f"does not fit {runs[-1].device.name}",
        ]
        for cell, runs in cells
    ]
    every = [run for _, runs in cells for run in runs]
    rows.append([counted(len(cells), "cell"), "", f"{len(every):,}", *job_cells(every), ""])
    print_table(["cell", "trainable", "runs", *JOB_HEADS, ""], rows, right=range(1, 8))
    print()
    print_missing_price(first)


def print_power(study: Study, plans: Sequence[RunPlan], spread: Mapping[str, Sequence[float]]) -> None:
    """The smallest difference that a study detects in each outcome, beside the one that matters.

    Args:
        plans: one of each cell.
        spread: outcome -> standard deviations of a difference between seeds, between problems, and beyond both.
    """
    config, contrasts = study.config, len(study.contrasts())
    for outcome in config.outcomes:
        if outcome not in spread:
            print_line("detects", f"{outcome}: set plan.spread={{{outcome}: [...]}}")
            continue
        what = "rows" if outcome == LOSS else "problems"
        problems = min(_problems(outcome, plan) for plan in plans)
        variances = Variances(*(deviation**2 for deviation in spread[outcome]))
        smallest = detectable(variances, config.seeds, problems, contrasts)
        print_line(
            "detects",
            f"{outcome}: a difference of {smallest:.2g} with probability {POWER}: {config.seeds} seeds, {problems:,} "
            f"{what}, Holm's first step over {contrasts} contrasts",
        )
        if outcome == config.outcomes[0]:
            verb = "is" if smallest <= config.matters else "is not"
            print_line("", f"study.matters={config.matters:g} {verb} detected")


def _problems(outcome: str, plan: RunPlan) -> int:
    """Rows of a loss, or problems of a task."""
    if outcome == LOSS:
        return plan.data.eval_rows
    return next(size.problems for size in plan.tasks if size.name == outcome)
