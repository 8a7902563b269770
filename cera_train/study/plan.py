"""What a study needs before it runs, and the smallest difference that it detects. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cera_train.common.settings import require
from cera_train.common.terminal import print_line
from cera_train.planning.plan import RunPlan, make_plan
from cera_train.planning.table import print_plans
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Study
from cera_train.study.design import check_cells, study_of, study_record
from cera_train.study.verdict import POWER, Variances, detectable
from cera_train.sweep.grid import ComposeJob


def plan_study(config: DictConfig, compose: ComposeJob) -> None:
    """Prints the plan of every cell, their sum, and what the study detects.

    Args:
        config: what Hydra composed for the sweep, with its own section.
    """
    outcomes, spread = study_of(config).outcomes, OmegaConf.to_object(config.plan).spread or {}
    for outcome in spread:
        names = ", ".join(outcomes)
        require(outcome in outcomes, f"plan.spread: {outcome} is no outcome of this study: choose from {names}.")
    study = Study(Path(config.hydra.sweep.dir), study_record(config))
    print_line("study", study.config.question)
    check_cells(config, study, compose)
    planned: dict[str, list[RunPlan]] = {}
    for cell in study.cells:
        candidates = [make_plan(compose(each.overrides)) for each in cell.candidates]
        candidates.sort(key=lambda plan: plan.seconds)  # the values that will be chosen are unknown: count the dearest
        planned[cell.name] = candidates * len(cell.tuning) + candidates[-1:] * (study.config.seeds - len(cell.tuning))
    print_plans("cell", planned)
    print()
    print_power(study, [runs[-1] for runs in planned.values()], spread)


def print_power(study: Study, plans: Sequence[RunPlan], spread: Mapping[str, Sequence[float]]) -> None:
    """The smallest difference that a study detects in each outcome, beside the one that matters.

    Args:
        plans: one of each cell.
        spread: outcome -> standard deviations of a difference between seeds, between problems, and beyond both.
    """
    config, contrasts, seeds = study.config, study.family, len(study.cells[0].judging)
    for outcome in config.outcomes:
        if outcome not in spread:
            print_line("detects", f"{outcome}: set plan.spread={{{outcome}: [...]}}")
            continue
        what = "rows" if outcome == LOSS else "problems"
        sizes = [{LOSS: plan.data.eval_rows} | {task.name: task.problems for task in plan.tasks} for plan in plans]
        problems = min(size[outcome] for size in sizes)
        variances = Variances(*(deviation**2 for deviation in spread[outcome]))
        smallest = detectable(variances, seeds, problems, contrasts)
        print_line(
            "detects",
            f"{outcome}: a difference of {smallest:.2g} with probability {POWER}: {seeds} seeds, {problems:,} "
            f"{what}, Holm's first step over {contrasts} contrasts",
        )
        if outcome == config.outcomes[0]:
            verb = "is" if smallest <= config.matters else "is not"
            print_line("", f"study.matters={config.matters:g} {verb} detected")
