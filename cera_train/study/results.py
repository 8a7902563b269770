"""Every contrast of the arms of a finished study, with a verdict, and its slope over the rank."""

import math
from dataclasses import dataclass

import numpy
from scipy.stats import ttest_1samp

from cera_train.common.settings import require
from cera_train.evaluation.statistics import LEVEL, holm
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Pair, Study, describe
from cera_train.study.verdict import Contrast, Verdict, contrast, detectable

MOST_MISSING = 5  # runs that an error names


def check_runs(study: Study) -> None:
    """Raises UserError where runs have not ended or have diverged, or where compared runs have
    different rows."""
    missing = study.missing()
    named = "; ".join(missing[:MOST_MISSING])
    if len(missing) > MOST_MISSING:
        named += f"; and {len(missing) - MOST_MISSING:,} more"
    require(
        not missing,
        f"{study.folder} is an unfinished study. Its command runs what is missing: {named}.",
    )
    for cells in study.by_condition.values():
        first, *others = [run for cell in cells.values() for run in cell.runs]
        for run in others:
            different = [what for what, rows in run.rows.items() if rows != first.rows.get(what)]
            require(
                not different,
                f"{first.folder} and {run.folder} had different {' and '.join(different)}, and "
                "cannot be compared: restore the rows, and run the study again under another "
                "name=...",
            )


@dataclass(frozen=True)
class OutcomeContrast(Contrast):
    """Two arms in one outcome under one condition: second - first."""

    outcome: str
    asked: str
    first: str
    second: str
    condition: str
    by_seed: list[float]  # the difference of each seed
    p_holm: float  # after Holm, over the contrasts of the outcome
    verdict: Verdict  # on the second arm; `not shown` where an edge speaks against it
    edges: list[str]  # such as `cera at the largest optimizer.lr, 0.01`
    detectable: float  # the smallest difference that this design shows with power 80 %


def contrasts_of(study: Study) -> list[OutcomeContrast]:
    """Every contrast in every outcome, the primary outcome first. Raises UserError where runs
    cannot be compared."""
    check_runs(study)
    pairs = study.pairs()
    require(
        bool(pairs),
        f"{study.folder} has no two arms to compare, only {study.cells[0].arm}. Run it without "
        f"study.arm; cera-report {study.folder}/* compares the runs that are there.",
    )
    contrasts = []
    for outcome in study.config.outcomes:
        estimates = [_estimate(pair, outcome) for pair in pairs]
        p_values = [estimate.p_value for estimate in estimates]
        adjusted = holm(p_values, study.planned_contrasts)
        for pair, estimate, p_holm in zip(pairs, estimates, adjusted, strict=True):
            contrasts.append(_with_verdict(study, pair, outcome, estimate, p_holm))
    return contrasts


def _estimate(pair: Pair, outcome: str) -> Contrast:
    _, first, second = pair
    # Tuned values are chosen by the first outcome, and how others bend between them is unknown.
    is_primary = outcome == first.study.config.outcomes[0]
    between = max(first.between, second.between) if is_primary else 0.0
    return contrast(first.values(outcome), second.values(outcome), first.weights(outcome), between)


def _with_verdict(
    study: Study, pair: Pair, outcome: str, estimate: Contrast, p_holm: float
) -> OutcomeContrast:
    means = zip(pair.first.means(outcome), pair.second.means(outcome), strict=True)
    edges = [str(edge) for edge in (*pair.first.edges, *pair.second.edges)]
    verdict = estimate.verdict_at(p_holm, higher_is_better=outcome != LOSS)
    choices = pair.choices
    least = detectable(
        estimate.variances, estimate.seeds, estimate.problems, study.planned_contrasts
    )
    return OutcomeContrast(
        **vars(estimate),
        outcome=outcome,
        asked=pair.asked,
        first=pair.first.arm,
        second=pair.second.arm,
        condition=describe(
            (key, choices[key]) for key in study.config.conditions if key in choices
        ),
        by_seed=[second - first for first, second in means],
        p_holm=p_holm,
        verdict="not shown" if edges else verdict,
        edges=edges,
        detectable=least + estimate.between,
    )


@dataclass(frozen=True)
class Slope:
    """The change of a contrast in the primary outcome with every doubling of the rank."""

    name: str
    by_seed: list[float]
    value: float
    interval: list[float]
    """Student's 95 % interval over seeds, on the problems at hand; without bounds for one seed."""


def slopes(study: Study) -> list[Slope]:
    """The least-squares slope of every contrast against log2 of the rank, where several ranks are
    conditions."""
    outcome = study.config.outcomes[0]
    by_rank: dict[str, dict[int, numpy.ndarray]] = {}  # contrast -> rank -> [seeds] differences
    for pair in study.pairs():
        choices = pair.choices
        rank = int(choices.pop("adapter.r", 0))
        name = f"{pair.second.arm} - {pair.first.arm}"
        if choices:
            name += f", {describe(choices.items())}"
        differences = numpy.subtract(pair.second.means(outcome), pair.first.means(outcome))
        by_rank.setdefault(name, {})[rank] = differences
    return [
        _slope(name, differences) for name, differences in by_rank.items() if len(differences) > 1
    ]


def _slope(name: str, differences: dict[int, numpy.ndarray]) -> Slope:
    by_seed = numpy.polyfit(numpy.log2(list(differences)), list(differences.values()), 1)[0]
    interval = [-math.inf, math.inf]
    if len(by_seed) > 1:
        interval = [*map(float, ttest_1samp(by_seed, 0.0).confidence_interval(LEVEL))]
    return Slope(name, by_seed.tolist(), float(by_seed.mean()), interval)
