"""Verdicts on several contrasts: Holm's correction, and what it leaves of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cera_train.verdicts.contrast import Contrast, Verdict

Mark = Literal[Verdict, "too small", "no verdict"]


def holm(p_values: Sequence[float], planned: int = 0) -> list[float]:
    """P-values adjusted for their number, in the order given (Holm 1979). Where one is at most
    0.05, the chance of any error among all verdicts stays at most 5 %, however the comparisons
    depend on each other.

    Args:
        planned: the number of planned tests where that is larger, as if the others had p = 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    tests = max(planned, len(p_values))
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (tests - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True, kw_only=True)
class JudgedContrast(Contrast):
    """A contrast among others: second - first."""

    first: str
    second: str
    p_holm: float | None = None  # after Holm; None where no verdict is planned
    verdict: Verdict = "not shown"  # on the second, where no obstacle speaks against it
    obstacles: Sequence[str] = ()  # such as `cera at the largest optimizer.lr, 0.01`
    detectable: float = math.inf  # the smallest true difference that is shown with power 80 %
    by_seed: Sequence[float] = ()  # the difference of each seed; with bases, of each base
    matters: float | None = None  # the smallest difference that does; None: unknown

    @property
    def is_loss(self) -> bool:
        """Whether it is in nats a token, where less is better; else of a score."""
        return False

    @property
    def mark(self) -> Mark:
        """The verdict, or that the interval lies within what matters. This errs in 2.5 % of
        comparisons (two one-sided tests, Schuirmann 1987)."""
        if self.obstacles:
            return "no verdict"
        if self.matters is None or self.verdict != "not shown":
            return self.verdict
        is_within = -self.matters <= self.lower and self.upper <= self.matters
        return "too small" if is_within else self.verdict

    @property
    def words(self) -> str:
        """The mark, with what could have been detected where nothing was."""
        if self.mark == "not shown" and math.isfinite(self.detectable):
            return f"not shown (detects {number(self.detectable, self.is_loss)})"
        return self.mark

    @property
    def difference_text(self) -> str:
        return number(self.difference, self.is_loss, "+")

    @property
    def interval_text(self) -> str:
        """Its ends, those that are finite."""
        ends = [number(end, self.is_loss, "+") for end in (self.lower, self.upper)]
        return " to ".join(filter(None, ends))


def number(value: float, is_loss: bool, sign: str = "") -> str:
    """Nats of a loss, points of a score; empty without a bound or a difference."""
    if not math.isfinite(value):
        return ""
    return f"{value:{sign}.4f}" if is_loss else f"{100 * value:{sign}.1f}"
