"""The smallest difference that a study detects, from how much its outcomes vary. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from cera_train.evaluation.power import detectable, needed
from cera_train.evaluation.verdict import Variances
from cera_train.settings.planning import SpreadConfig


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
        """The smallest difference that is found with this power where Holm corrects the most."""
        return detectable(self.variances, self.seeds, self.problems, self.comparisons)

    def needed(self, difference: float) -> tuple[int | None, int | None]:
        """The seeds at these problems, and the problems at these seeds, that find a difference; None: none do."""
        return needed(self.variances, difference, self.seeds, self.problems, self.comparisons)

    @property
    def spreads(self) -> list[float]:
        """The standard deviations between seeds, between problems, and of one problem on one seed."""
        return [sqrt(value) for value in (self.variances.seed, self.variances.problem, self.variances.residual)]


def variances_given(spread: SpreadConfig) -> dict[str, Variances]:
    """By outcome."""
    return {outcome: Variances(*(sd**2 for sd in given)) for outcome, given in spread.by_outcome.items()}


def pooled(variances: Sequence[Variances]) -> Variances:
    """The means of several contrasts' variances."""
    parts = [(each.seed, each.problem, each.residual) for each in variances]
    return Variances(*map(fmean, zip(*parts, strict=True)))
