"""A study's folder: its cells, and which of them are compared. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cera_train.common.settings import key_of
from cera_train.study.cells import Cell, GridPoint, Replicate, describe_choices, means_of
from cera_train.study.record import ARM, SEED, StudyRecord
from cera_train.sweep.folder import RECORD, SweepRecord


class Study(StudyRecord):
    """A study's folder: what is measured in it and compared."""

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells in the order of the record's jobs."""
        grids: dict[tuple[str, tuple], dict[tuple, GridPoint]] = {}
        for overrides in self.record.jobs.values():
            values = dict(word.partition("=")[::2] for word in overrides)
            if values[SEED] != "0":
                continue
            arm = values[ARM]
            choices = tuple((key, values[key]) for key in self._open_conditions(arm))
            tuned = {key: values[key] for key in self.config.tune if key in values}
            grid = grids.setdefault((arm, choices), {})
            grid.setdefault(tuple(tuned.values()), GridPoint(tuned, overrides))
        return [
            Cell(self, arm, dict(choices), list(grid.values()))
            for (arm, choices), grid in grids.items()
        ]

    def _open_conditions(self, arm: str) -> list[str]:
        """The conditions whose setting an arm does not set itself."""
        set_by_arm = {key_of(word) for word in self.config.arms[arm]}
        return [key for key in self.config.conditions if key_of(key) not in set_by_arm]

    @property
    def by_condition(self) -> dict[str, dict[str, Cell]]:
        """Condition -> arm -> cell. An arm that has a condition's setting itself stands under all
        of its values."""
        choices = dict.fromkeys(choice for cell in self.cells for choice in cell.choices.items())
        by_key = [
            [choice for choice in choices if choice[0] == key] for key in self.config.conditions
        ]
        return {
            describe_choices(condition): {
                cell.arm: cell for cell in self.cells if cell.choices.items() <= {*condition}
            }
            for condition in itertools.product(*filter(None, by_key))
        }

    def pairs(self) -> list[Pair]:
        """Every pair of cells, or of differences of two, to compare, once."""
        pairs: dict[tuple[str, str], Pair] = {}
        for arms in self.by_condition.values():
            for asked, *sides in self.config.comparisons:
                if arms_of(sides) <= arms.keys():
                    pair = Pair(asked, *(side_of(side, arms) for side in sides))
                    pairs[pair.first.name, pair.second.name] = pair
        return list(pairs.values())

    def is_primary(self, asked: str) -> bool:
        """Whether a comparison is tested before the others."""
        return asked in self.config.primary

    def planned_contrasts(self, is_primary: bool) -> int:
        """The number of primary, or of other, verdicts that the study's file plans, over which
        Holm's method corrects. Otherwise dropping arms could flip a verdict."""
        planned = 0
        for asked, *sides in self.config.comparisons:
            keys = {key for arm in arms_of(sides) for key in self._open_conditions(arm)}
            if self.is_primary(asked) == is_primary:
                planned += math.prod(len(self.config.conditions[key]) for key in keys)
        found = sum(self.is_primary(pair.asked) == is_primary for pair in self.pairs())
        return max(found, planned)

    def missing(self) -> list[str]:
        """The folders of runs that have not ended."""
        return [name for cell in self.cells for name in cell.missing()]


def find_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    record = SweepRecord.find(folder / RECORD)
    return None if record is None or record.study is None else Study(folder, record)


class Pair(NamedTuple):
    """Two sides to compare, cells or pairs of them: the second minus the first."""

    asked: str  # what the comparison asks
    first: Cell | Pair
    second: Cell | Pair

    @property
    def arm(self) -> str:
        return f"({self.second.arm} - {self.first.arm})"

    @property
    def name(self) -> str:
        return f"({self.second.name} - {self.first.name})"

    @property
    def choices(self) -> dict[str, str]:
        """The condition, by setting, of all sides together."""
        return self.first.choices | self.second.choices

    @property
    def obstacles(self) -> list[str]:
        return list(dict.fromkeys([*self.first.obstacles, *self.second.obstacles]))

    @property
    def diverged(self) -> list[Replicate]:
        """The compared runs that diverged, of all sides."""
        return [*self.first.diverged, *self.second.diverged]

    def values(self, outcome: str) -> np.ndarray:
        """[seeds, problems], without bases."""
        return self.second.values(outcome) - self.first.values(outcome)

    def weights(self, outcome: str) -> np.ndarray | None:
        return self.first.weights(outcome)

    def by_base(self, outcome: str) -> dict[str | None, np.ndarray]:
        """Base -> [seeds] the difference of each seed; none where a compared run diverged."""
        if self.diverged:
            return {}
        first = self.first.by_base(outcome)
        return {base: values - first[base] for base, values in self.second.by_base(outcome).items()}

    def means(self, outcome: str) -> list[float]:
        """The difference of each seed; with bases, of each base."""
        return means_of(self.by_base(outcome))

    @property
    def grid_slack(self) -> tuple[float, float]:
        """The most by which other tuned values could lower and raise the difference."""
        first_lower, first_higher = self.first.grid_slack
        second_lower, second_higher = self.second.grid_slack
        return second_lower + first_higher, second_higher + first_lower


def arms_of(sides: Iterable[Any]) -> set[str]:
    """The arms of the sides of a comparison."""
    arms = set()
    for side in sides:
        arms.update([side] if isinstance(side, str) else side)
    return arms


def side_of(side: Any, cells: dict[str, Cell]) -> Cell | Pair:
    """The cell of an arm, or the difference of a pair of arms."""
    return cells[side] if isinstance(side, str) else Pair("", *(cells[arm] for arm in side))
