"""Every contrast of the arms of a finished study, with a verdict, and its slope over the rank."""

import math
from dataclasses import dataclass

import numpy
from scipy.stats import ttest_1samp

from cera_train.common.settings import require
from cera_train.evaluation.statistics import LEVEL, holm
from cera_train.settings.sweep import LOSS
from cera_train.study.cells import Study, words_of
from cera_train.study.verdict import Contrast, Verdict, contrast, detectable


def check_runs(study: Study) -> None:
    """Raises UserError where runs have not ended or have diverged, or learned or were judged on
    different rows."""
    missing = study.missing()
    require(
        not missing,
        f"{study.folder} is an unfinished study. Its command runs what is missing: "
        f"{'; '.join(missing[:5])}"
        f"{f'; and {len(missing) - 5:,} more' * (len(missing) > 5)}.",
    )
    for cells in study.by_condition.values():
        first, *others = [run for cell in cells.values() for run in cell.runs]
        for run in others:
            what = next(
                (what for what, rows in run.rows.items() if rows != first.rows.get(what)), None
            )
            require(
                what is None,
                f"{first.folder} and {run.folder} had different {what}, and cannot be compared: "
                f"restore the rows, and "
                "run the study again under another name=...",
            )


@dataclass(frozen=True)
class Comparison(Contrast):
    """Two arms in one outcome under one condition: second - first."""

    outcome: str
    asked: str
    first: str
    second: str
    condition: str
    by_seed: list[float]  # the difference of each seed
    p_holm: float  # after Holm, over the contrasts of the outcome
    verdict: Verdict  # on the second arm; `not shown` where an edge speaks against it
    edges: list[
        str
    ]  # what is best at the end of its grid, such as `cera at the largest optimizer.lr, 0.01`
    detectable: float  # the smallest difference that this design shows with power 80 %


def compare_cells(study: Study) -> list[Comparison]:
    """Every contrast in every outcome, the primary outcome first. Raises UserError where runs
    cannot be compared."""
    check_runs(study)
    pairs = study.contrasts()
    require(
        bool(pairs),
        f"{study.folder} has no two arms to compare, only {study.cells[0].arm}. Run it without "
        f"study.arm; "
        f"cera-report {study.folder}/* compares the runs that are there.",
    )
    comparisons = []
    for outcome in study.config.outcomes:
        # Tuned values are chosen by the first outcome, and how others bend between them is unknown.
        is_first = outcome == study.config.outcomes[0]
        differences = [
            contrast(
                *(first.values(outcome), second.values(outcome), first.weights(outcome)),
                between=max(first.between, second.between) * is_first,
            )
            for _, first, second in pairs
        ]
        adjusted = holm([difference.p_value for difference in differences], study.family)
        for (asked, first, second), difference, p_holm in zip(
            pairs, differences, adjusted, strict=True
        ):
            means = zip(first.means(outcome), second.means(outcome), strict=True)
            edges = [*first.edges, *second.edges]
            verdict = difference.verdict_at(p_holm, higher_is_better=outcome != LOSS)
            both = first.choices | second.choices
            least = detectable(
                difference.variances, difference.seeds, difference.problems, study.family
            )
            comparisons.append(
                Comparison(
                    **vars(difference),
                    outcome=outcome,
                    asked=asked,
                    first=first.arm,
                    second=second.arm,
                    condition=words_of(
                        (key, both[key]) for key in study.config.conditions if key in both
                    ),
                    by_seed=[b - a for a, b in means],
                    p_holm=p_holm,
                    verdict="not shown" if edges else verdict,
                    edges=edges,
                    detectable=least + difference.between,
                )
            )
    return comparisons


@dataclass(frozen=True)
class Slope:
    """The change of a contrast in the primary outcome with every doubling of the rank."""

    name: str
    by_seed: list[float]
    value: float
    interval: list[
        float
    ]  # Student's 95 % interval over seeds, on the problems at hand; without bounds for one seed


def slopes(study: Study) -> list[Slope]:
    """The least-squares slope of every contrast against log2 of the rank, where several ranks are
    conditions."""
    by_rank: dict[str, dict[int, numpy.ndarray]] = {}
    for _, first, second in study.contrasts():
        choices = first.choices | second.choices
        rank = int(choices.pop("adapter.r", 0))
        name = ", ".join(
            [f"{second.arm} - {first.arm}", *(f"{key}={value}" for key, value in choices.items())]
        )
        means = (cell.means(study.config.outcomes[0]) for cell in (second, first))
        by_rank.setdefault(name, {})[rank] = numpy.subtract(*means)
    return [
        _slope(name, differences) for name, differences in by_rank.items() if len(differences) > 1
    ]


def _slope(name: str, differences: dict[int, numpy.ndarray]) -> Slope:
    by_seed = numpy.polyfit(numpy.log2(list(differences)), list(differences.values()), 1)[0]
    interval = [-math.inf, math.inf]
    if len(by_seed) > 1:
        interval = [*map(float, ttest_1samp(by_seed, 0.0).confidence_interval(LEVEL))]
    return Slope(name, by_seed.tolist(), float(by_seed.mean()), interval)
