"""What a benchmark found beside what it should have found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One line of the table that `make bench` prints."""

    name: str
    rounds: Sequence[float]
    """One value a round, of which the median counts."""
    bound: float
    is_least: bool = True
    """Whether the value is to be at least the bound, or at most."""

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def is_reached(self) -> bool:
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def line(self) -> str:
        spread = f"{min(self.rounds):.2f} to {max(self.rounds):.2f}"
        wanted = f"{'at least' if self.is_least else 'at most'} {self.bound:.2f}"
        verdict = "reached" if self.is_reached else "missed"
        return f"{self.name:<50}{self.value:>8.2f}   {spread:>16}{wanted:>16}  {verdict}"


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast as theirs ours is, round by round."""
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def print_targets(targets: Sequence[Target]) -> None:
    print(f"\n{'target':<50}{'median':>10} {'spread':>16}{'wanted':>16}")
    for target in targets:
        print(target.line())
