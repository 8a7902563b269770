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
    """One value a round."""
    bound: float
    """The median is to be at least this."""

    def line(self) -> str:
        median = statistics.median(self.rounds)
        spread = f"{min(self.rounds):.2f} to {max(self.rounds):.2f}"
        wanted = f"at least {self.bound:.2f}"
        verdict = "reached" if median >= self.bound else "missed"
        return f"{self.name:<50}{median:>8.2f}   {spread:>16}{wanted:>16}  {verdict}"


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast as theirs ours is, round by round."""
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def print_targets(targets: Sequence[Target]) -> None:
    print(f"\n{'target':<50}{'median':>10} {'spread':>16}{'wanted':>16}")
    for target in targets:
        print(target.line())
