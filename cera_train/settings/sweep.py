"""Settings of a sweep as a whole, and of a study: a sweep that answers a question."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from cera_train.common.settings import require, setting
from cera_train.settings.data import as_list
from cera_train.settings.values import Filled, Number, Settings

LOSS = "loss"

Equal = StrEnum("Equal", ["parameters", "none"])
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]*[A-Za-z][A-Za-z0-9_.+-]*$")]


@dataclass
class SweepConfig(Settings):
    metric: str = setting("eval/perplexity", "nothing")
    """The figure that ranks jobs and that a searching sweeper optimises: eval/perplexity,
    best_perplexity, or a score of train.tasks, such as gsm8k/exact."""


@dataclass
class StudyConfig(Settings):
    """A question about methods, and the runs that answer it. docs/studies.md"""

    question: str = setting("", "nothing")
    """One sentence with a question mark."""
    arms: Annotated[dict[ArmName, list[str]], Field(min_length=2)] = setting(dict, "nothing")
    """What is compared: names, each with the overrides that define it. Everything else is equal."""
    baseline: str | None = setting(None, "nothing")
    """The arm that every other arm is compared with. null: only the contrasts are planned."""
    contrasts: dict[str, list[Any]] = setting(dict, "nothing")
    """Further comparisons, or the direction of one: its question, and two arms; the difference is
    the second minus the first. Two pairs of arms, [[a, b], [c, d]], are compared in their
    differences: (d - c) - (b - a)."""
    bases: dict[ArmName, list[str]] = setting(dict, "nothing")
    """Models, teachers or data that every arm runs on: names, each with its overrides. Then the
    interval is Student's over bases. Empty: one base."""
    conditions: dict[str, Annotated[list[Any], Filled]] = setting(dict, "nothing")
    """Settings under which all arms are compared, and their values, such as adapter.r: [16, 64]."""
    tune: Annotated[dict[str, Annotated[list[Number], Filled]], Filled] = setting(dict, "nothing")
    """Settings that each arm chooses for itself under each condition, and their values: numbers."""
    seeds: PositiveInt = setting(3, "nothing")
    """The number of values of train.seed, from 0. Each seed runs every tuned value; the arm is
    compared at the value with the lowest mean loss."""
    tune_seeds: PositiveInt | None = setting(None, "nothing")
    """To save runs: only this many seeds, the first ones, run every tuned value and choose; only
    the other seeds are compared."""
    extend: bool = setting(False, "nothing")
    """Add values beyond the end of the grid while an arm is best there, by the ratio of the last
    two."""
    outcomes: Annotated[list[str], Filled] = setting(lambda: [LOSS], "nothing")
    """The outcomes, the primary one first: loss, or a name in train.tasks for its score."""
    equal: Equal = setting(Equal.parameters, "nothing")
    """What all arms have the same amount of under a condition."""
    matters: PositiveFloat = setting(0.01, "nothing")
    """The smallest difference in the first outcome that would matter: in nats per token, or as a
    share of the score. A tenth of the first side's loss, or of what it misses of the score, always
    matters."""
    arm: str | None = setting(None, "nothing")
    """The arm of a job; a study sets it."""
    base: str | None = setting(None, "nothing")
    """The base of a job; a study sets it."""

    def __post_init__(self) -> None:
        names = ", ".join(self.arms)
        require(
            self.baseline in self.arms or (self.baseline is None and bool(self.contrasts)),
            f"study.baseline={self.baseline}: no such arm: choose one of {names}.",
        )
        for question, sides in self.contrasts.items():
            is_difference = self._is_pair(sides) or (
                len(sides) == 2 and all(map(self._is_pair, sides)) and sides[0] != sides[1]
            )
            require(
                is_difference,
                f"study.contrasts.{question}={sides}: expected two arms of {names}, or two pairs "
                "of them.",
            )
        require(
            self.tune_seeds is None or self.tune_seeds < self.seeds,
            f"study.tune_seeds={self.tune_seeds}: the first of study.seeds={self.seeds} choose, "
            f"and the others are compared: give 1 to {self.seeds - 1}, or null.",
        )

    def _is_pair(self, arms: Any) -> bool:
        """Whether these are two different arms."""
        return (
            isinstance(arms, list)
            and all(isinstance(arm, str) for arm in arms)
            and len(arms) == len({*arms}) == 2
            and {*arms} <= self.arms.keys()
        )

    @property
    def first_outcome(self) -> str:
        return self.outcomes[0]

    @property
    def comparisons(self) -> list[tuple[str, list[str], list[str]]]:
        """Every comparison: what it asks, and its first and second side, one arm or two. First
        those of `contrasts`, then with the baseline."""
        comparisons = [
            (question, as_list(first), as_list(second))
            for question, (first, second) in self.contrasts.items()
        ]
        compared = [{*first, *second} for _, first, second in comparisons]
        for arm in self.arms:
            is_new = arm != self.baseline and {self.baseline, arm} not in compared
            if self.baseline is not None and is_new:
                comparisons.append((f"{arm} or {self.baseline}", [self.baseline], [arm]))
        return comparisons
