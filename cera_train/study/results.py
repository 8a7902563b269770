"""Every contrast of the arms of finished studies, with a verdict."""

import itertools
import math
from dataclasses import dataclass
from statistics import fmean

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.settings.sweep import LOSS, Equal
from cera_train.study.cells import PARAMETERS, ComparedRun
from cera_train.study.folder import Comparison, Study, name_of
from cera_train.verdicts.contrast import Contrast, Verdict, contrast, contrast_over_bases
from cera_train.verdicts.power import detectable
from cera_train.verdicts.verdict import JudgedContrast, holm

SHARE = 0.1
"""Share of a loss that always matters. Otherwise a perfect arm could count as no better."""


def check_runs(study: Study) -> None:
    """Raises UserError where runs have not ended, an arm diverged at every value, or compared runs
    have different rows."""
    if missing := study.missing():
        raise UserError(
            f"{study.folder} is an unfinished study. Its command runs what is missing: "
            f"{missing[0]}, and {len(missing) - 1:,} more."
        )
    for cells, base in itertools.product(study.by_condition.values(), study.bases):
        runs = [run for cell in cells.values() for run in cell.runs_on(base)]
        sizes = sorted(run.result.trainable_parameters for run in runs) or [0]
        require(
            study.config.equal == Equal.none or sizes[-1] <= sizes[0] * (1 + PARAMETERS),
            f"{study.folder}: study.equal=parameters, but compared runs have {sizes[0]:,} to "
            f"{sizes[-1]:,}. Tune no size, or repeat the command with study.equal=none.",
        )
        first: dict[str, ComparedRun] = {}  # the first run that each of its rows is known of
        for run in runs:
            for what, rows in run.rows.items():
                other = first.setdefault(what, run)
                require(
                    rows == other.rows[what],
                    f"{other.folder} and {run.folder} had different {what}, and cannot be "
                    "compared: restore them, and run the study again under another name=...",
                )


@dataclass(frozen=True, kw_only=True)
class OutcomeContrast(JudgedContrast):
    """Two arms, or two differences of arms, in one outcome under one condition: second - first."""

    outcome: str
    asked: str
    condition: str

    @property
    def is_loss(self) -> bool:
        return self.outcome == LOSS


def contrasts_of(*studies: Study) -> list[list[OutcomeContrast]]:
    """Every contrast of each study in every outcome, in the first one before the others. Holm's
    method corrects over the contrasts of all studies. Raises UserError where runs cannot be
    compared."""
    estimates: list[tuple[Study, Comparison, str, Contrast]] = []
    for study in studies:
        check_runs(study)
        comparisons = study.comparisons()
        require(
            bool(comparisons),
            f"{study.folder} has no two arms to compare, only {study.cells[0].arm}. Run it without "
            f"study.arm; cera-report {study.folder}/* compares the runs that are there.",
        )
        for outcome, comparison in itertools.product(study.config.outcomes, comparisons):
            estimates.append((study, comparison, outcome, _estimate(study, comparison, outcome)))
    tests = sum(study.planned_contrasts for study in studies)
    p_values = {
        number: estimate.p_value
        for number, (study, _, outcome, estimate) in enumerate(estimates)
        if outcome == study.config.first_outcome
    }
    adjusted = dict(zip(p_values, holm([*p_values.values()], tests), strict=True))
    contrasts: dict[Study, list[OutcomeContrast]] = {study: [] for study in studies}
    for number, (study, comparison, outcome, estimate) in enumerate(estimates):
        p_holm = adjusted.get(number)
        contrast = _with_verdict(study, comparison, outcome, estimate, p_holm, tests)
        contrasts[study].append(contrast)
    return list(contrasts.values())


def _estimate(study: Study, comparison: Comparison, outcome: str) -> Contrast:
    """Without a difference where a compared run diverged: that of the others would favour the arm
    that diverges."""
    if comparison.has_diverged:
        return Contrast(math.nan, -math.inf, math.inf, 1.0, None, 0, 0, 0.0)
    # Tuned values are chosen by the first outcome, and how others bend between them is unknown.
    between = comparison.grid_slack if outcome == study.config.first_outcome else 0.0
    if study.config.bases:
        by_problem = [comparison.differences(outcome, base).mean(0) for base in study.bases]
        problems = min(map(len, by_problem))
        scores = () if outcome == LOSS else by_problem
        return contrast_over_bases(comparison.means(outcome), problems, between, scores)
    first, second = comparison.sides(lambda cell: cell.values(outcome))
    return contrast(first, second, comparison.first[0].weights(outcome), between)


def what_matters(study: Study, comparison: Comparison) -> float:
    """The smallest difference in the first outcome that matters: the study's, but at most SHARE of
    the lowest loss of the first side, or of what it misses of a score."""
    outcome = study.config.first_outcome
    if comparison.has_diverged:
        return study.config.matters
    ends = [study.config.matters]
    for cell in comparison.first:
        mean = fmean(cell.means(outcome))
        loss = mean if outcome == LOSS else 1 - mean
        if loss > 0:
            ends.append(float(f"{SHARE * loss:.2g}"))
    return min(ends)


def _with_verdict(
    study: Study,
    comparison: Comparison,
    outcome: str,
    estimate: Contrast,
    p_holm: float | None,
    tests: int,
) -> OutcomeContrast:
    obstacles = list(
        dict.fromkeys(itertools.chain.from_iterable(cell.obstacles for cell in comparison.cells))
    )
    if p_holm is None:
        obstacles.append(f"values tuned by {study.config.first_outcome}")
    verdict: Verdict = "not shown"
    if not obstacles:
        verdict = estimate.verdict_at(p_holm, higher_is_better=outcome != LOSS)
    least = detectable(estimate.variances, estimate.seeds, estimate.problems, tests)
    return OutcomeContrast(
        **vars(estimate),
        outcome=outcome,
        asked=comparison.asked,
        first=name_of(comparison.first),
        second=name_of(comparison.second),
        condition=comparison.first[0].condition,
        by_seed=comparison.means(outcome),
        p_holm=p_holm,
        verdict=verdict,
        obstacles=obstacles,
        detectable=least + estimate.between,
        matters=what_matters(study, comparison) if outcome == study.config.first_outcome else None,
    )
