"""What a study needs before it runs, and the smallest difference that it detects. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from omegaconf import DictConfig

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import counted, print_line, print_table
from cera_train.planning.plan import RunPlan, make_plan, shape_of
from cera_train.planning.table import JOB_HEADS, describe_data, job_cells, model_of, print_device, print_missing_price
from cera_train.settings.planning import PlanConfig
from cera_train.settings.run import PlanRun
from cera_train.settings.sweep import LOSS, SCORE, StudyConfig
from cera_train.study.cells import Cell, read_study
from cera_train.study.design import check_cells, study_record
from cera_train.study.verdict import POWER, Variances, detectable
from cera_train.sweep.folder import ComposeJob

# --- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedCell:
    """An arm under a condition, and its runs."""

    cell: Cell
    runs: list[RunPlan]
    """The dearest is the last."""


def plan_cells(config: DictConfig, compose: ComposeJob[PlanRun]) -> list[PlannedCell]:
    """Plans the runs of a study, each shape of a run once.

    Args:
        config: what Hydra composed for the sweep, with its own section.
    """
    plans: dict[str, RunPlan] = {}

    def plan(overrides: list[str]) -> RunPlan:
        run = compose(overrides)
        if (shape := shape_of(run)) not in plans:
            plans[shape] = make_plan(run, with_advice=False)
        return plans[shape]

    planned = []
    for cell, _ in check_cells(config, study_record(config), compose):
        candidates = sorted((plan(each.overrides) for each in cell.candidates), key=lambda each: each.seconds)
        tuning = cell.tune_seeds or cell.seeds
        planned.append(PlannedCell(cell, candidates * tuning + candidates[-1:] * (cell.seeds - tuning)))
    return planned


def print_cells(cells: Sequence[PlannedCell], study: StudyConfig) -> None:
    """The table of all cells with their sum."""
    first = cells[0].runs[-1]
    print_line("study", study.question)
    for model in dict.fromkeys(model_of(planned.runs[-1]) for planned in cells):
        print_line("model", model)
    for label, text in dict.fromkeys(itertools.chain.from_iterable(map(_describe_data, cells))):
        print_line(label, text)
    print_device(first)
    print()
    runs = [run for planned in cells for run in planned.runs]
    total = [counted(len(cells), "cell"), "", f"{len(runs):,}", *job_cells(runs), ""]
    print_table(["cell", "trainable", "runs", *JOB_HEADS, ""], [*map(_row, cells), total], right=range(1, 8))
    print()
    print_missing_price(first)


def _describe_data(planned: PlannedCell) -> list[tuple[str, str]]:
    """Labels and texts, under the study's name for the task where it has several."""
    task = planned.cell.task
    return [(label, f"{task}: {text}" if task else text) for label, text in describe_data(planned.runs[-1])]


def _row(planned: PlannedCell) -> list[str]:
    dearest = planned.runs[-1]
    note = "" if dearest.fits else f"does not fit {dearest.device.name}"
    trainable = f"{dearest.parameters.trainable:,}"
    return [planned.cell.name, trainable, f"{len(planned.runs)}", *job_cells(planned.runs), note]


# --- power -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """What a study can find in one outcome."""

    outcome: str
    seeds: int
    problems: int
    comparisons: int
    """Contrasts in this outcome, over which Holm corrects."""
    variances: Variances
    """Those of the difference between two arms."""

    @property
    def detectable(self) -> float:
        """The smallest difference that is found with power 80 % where Holm corrects the most."""
        return detectable(self.variances, self.seeds, self.problems, self.comparisons)


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


def powers(study: StudyConfig, cells: Sequence[PlannedCell], variances: Mapping[str, Variances]) -> list[Power]:
    """What a study can find in the outcomes whose variances are known."""
    contrasts = count_contrasts(study, cells)
    return [
        Power(outcome, study.seeds, problems_of(outcome, cells), contrasts, variances[outcome])
        for outcome in study.outcomes
        if outcome in variances
    ]


def count_contrasts(study: StudyConfig, cells: Sequence[PlannedCell]) -> int:
    """The contrasts of one outcome, as `Study.contrasts` has them."""
    arms: dict[str, set[str]] = {}
    for planned in cells:
        arms.setdefault(planned.cell.condition, set()).add(planned.cell.arm)
    return sum({*pair} <= there for there in arms.values() for pair in study.pairs)


def problems_of(outcome: str, cells: Sequence[PlannedCell]) -> int:
    """Rows of a loss or problems of a task; under the condition that has the fewest."""
    return min(_problems(outcome, planned.runs[-1]) for planned in cells)


def _problems(outcome: str, plan: RunPlan) -> int:
    if outcome == LOSS:
        return plan.data.eval_rows
    return next(size.problems for size in plan.tasks if outcome in (SCORE, size.name))


def variances_measured(folder: Path) -> dict[str, Variances]:
    """By outcome, the means over the contrasts of a finished study."""
    study = read_study(folder)
    if missing := study.missing():
        raise UserError(f"plan.variances={folder} is unfinished: {missing[0]}. Run it to its end, or name another one.")
    from cera_train.study.results import compare_cells, read_results

    found: dict[str, list[Variances]] = {}
    for comparison in compare_cells(study, read_results(study)):
        if comparison.contrast.variances is not None:
            found.setdefault(comparison.outcome, []).append(comparison.contrast.variances)
    require(
        bool(found),
        f"plan.variances={folder} has one seed an arm, which tells nothing of others. Name a study with more.",
    )
    parts = {outcome: [dataclasses.astuple(each) for each in variances] for outcome, variances in found.items()}
    return {outcome: Variances(*map(fmean, zip(*rows, strict=True))) for outcome, rows in parts.items()}


def print_powers(study: StudyConfig, powers: Sequence[Power], source: str) -> None:
    """The smallest difference that is found in each outcome, beside the one that matters."""
    for power in powers:
        what = "rows" if power.outcome == LOSS else "problems"
        print_line(
            "detects",
            f"{power.outcome}: a difference of {power.detectable:.2g} with probability {POWER}: {power.seeds} seeds, "
            f"{power.problems:,} {what}, Holm's first step over {power.comparisons} contrasts",
        )
        seed, problem, residual = map(math.sqrt, dataclasses.astuple(power.variances))
        print_line(
            "",
            f"standard deviations of a difference by {source}: {seed:.2g} between seeds, {problem:.2g} between {what}, "
            f"{residual:.2g} beyond both",
        )
        if power.outcome == study.outcomes[0]:
            verb = "is" if power.detectable <= study.matters else "is not"
            print_line("", f"study.matters={study.matters:g} {verb} detected")
    for outcome in study.outcomes:
        if outcome not in [power.outcome for power in powers]:
            print_line("detects", f"{outcome}: set plan.spread.seed={{{outcome}: ...}}, or plan.variances to a study")
