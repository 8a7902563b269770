"""The smallest difference that a study detects, before it runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import print_line
from cera_train.evaluation.power import POWER
from cera_train.planning.plan import RunPlan
from cera_train.planning.power import Power, pooled, variances_given
from cera_train.settings.planning import PlanConfig
from cera_train.settings.sweep import LOSS, SCORE, StudyConfig
from cera_train.sweep.plan import PlannedGroup
from cera_train.sweep.study import read_study

if TYPE_CHECKING:
    from cera_train.evaluation.verdict import Variances


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
    return variances_given(plan.spread)


def powers(study: StudyConfig, groups: Sequence[PlannedGroup], variances: Mapping[str, Variances]) -> list[Power]:
    """What a study can find in the outcomes whose variances are known."""
    contrasts = count_contrasts(study, groups)
    return [
        Power(outcome, study.seeds, problems_of(outcome, groups), contrasts, variances[outcome])
        for outcome in study.outcomes
        if outcome in variances
    ]


def count_contrasts(study: StudyConfig, groups: Sequence[PlannedGroup]) -> int:
    """The contrasts of one outcome, as `Study.contrasts` has them."""
    arms: dict[str, set[str]] = {}
    for group in groups:
        arms.setdefault(group.condition, set()).add(group.arm)
    return sum({*pair} <= there for there in arms.values() for pair in study.pairs)


def problems_of(outcome: str, groups: Sequence[PlannedGroup]) -> int:
    """Rows of a loss or problems of a task; under the condition that has the fewest."""
    return min(_problems(outcome, group.whole) for group in groups)


def _problems(outcome: str, plan: RunPlan) -> int:
    if outcome == LOSS:
        return plan.data.eval_rows
    return next(size.problems for size in plan.tasks if outcome in (SCORE, size.name))


def variances_measured(folder: Path) -> dict[str, Variances]:
    """By outcome, the means over the contrasts of a finished study."""
    study = read_study(folder)
    if missing := study.missing():
        raise UserError(f"plan.variances={folder} is unfinished: {missing[0]}. Run it to its end, or name another one.")
    from cera_train.report.study.cells import read_cells
    from cera_train.report.study.contrasts import compare_cells

    found: dict[str, list[Variances]] = {}
    for comparison in compare_cells(study, read_cells(study)):
        if comparison.contrast.variances is not None:
            found.setdefault(comparison.outcome.name, []).append(comparison.contrast.variances)
    require(
        bool(found),
        f"plan.variances={folder} has one seed an arm, which tells nothing of others. Name a study with more.",
    )
    return {outcome: pooled(variances) for outcome, variances in found.items()}


def print_powers(study: StudyConfig, powers: Sequence[Power], source: str) -> None:
    """The smallest difference that is found in each outcome, and what it takes to find one that matters."""
    for power in powers:
        what = "rows" if power.outcome == LOSS else "problems"
        print_line(
            "detects",
            f"{power.outcome}: a difference of {power.detectable:.2g} with probability {POWER}: {power.seeds} seeds, "
            f"{power.problems:,} {what}, Holm's first step over {power.comparisons} contrasts",
        )
        seed, problem, residual = power.spreads
        print_line(
            "",
            f"standard deviations of a difference by {source}: {seed:.2g} between seeds, {problem:.2g} between {what}, "
            f"{residual:.2g} beyond both",
        )
        if power.outcome == study.outcomes[0]:
            print_line("", describe_need(study.matters, power, what))
    for outcome in study.outcomes:
        if outcome not in [power.outcome for power in powers]:
            print_line(
                "detects", f"{outcome}: set plan.spread.seed={{{outcome}: ...}}, or plan.variances to a finished study"
            )


def describe_need(matters: float, power: Power, what: str) -> str:
    """Whether a study finds the difference that matters, or what would."""
    if power.detectable <= matters:
        return f"study.matters={matters:g} is found"
    seeds, problems = power.needed(matters)
    needs = [] if seeds is None else [f"{seeds:,} seeds"]
    needs += [] if problems is None else [f"{problems:,} {what}"]
    return f"study.matters={matters:g} takes {' or '.join(needs) or f'both more seeds and more {what}'}"
