"""A study's folder: its cells, and which of them are compared. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cera_train.common.settings import key_of, require
from cera_train.settings.gone import describe_gone, without_gone
from cera_train.settings.sweep import StudyConfig
from cera_train.settings.values import checked
from cera_train.study.cells import ARM, BASE, SEED, Cell, GridPoint
from cera_train.sweep.folder import RECORD, SweepRecord

T = TypeVar("T")


def read_config(section: Any) -> StudyConfig:
    """The settings of a study. Raises UserError where they do not fit each other, or a key is set
    in two places, or is not one of a study."""
    study = checked(StudyConfig, section, "study")
    arms, bases = (
        [word for words in groups.values() for word in words]
        for groups in (study.arms, study.bases)
    )
    places: dict[str, str] = {}
    for group, keys in (
        ("an arm", arms),
        ("study.bases", bases),
        ("study.tune", study.tune),
        ("study.conditions", study.conditions),
    ):
        for key in dict.fromkeys(map(key_of, keys)):
            gone = describe_gone(key)
            require(gone is None, f"{group}: {gone}")
            fix = "every arm has study.seeds=N seeds. Leave it out."
            require(key != SEED, f"{group}.{key}: {fix}")
            other = places.get(key)
            fix = "Keep one: 0.2.0 was the last to take an arm's beside a condition's."
            require(other is None, f"{group}.{key}: {other} sets {key} too. {fix}")
            places[key] = group
    return study


@dataclass(frozen=True, eq=False)
class Study:
    """A study's folder, which has, or will have, this record: what is measured in it and
    compared."""

    folder: Path
    record: SweepRecord

    @cached_property
    def config(self) -> StudyConfig:
        tree = without_gone(self.record.study, str(self.folder / RECORD), "study")
        return read_config(tree)

    @cached_property
    def bases(self) -> list[str | None]:
        """Bases of the record's jobs; [None] where a study has none."""
        words = {word for overrides in self.record.jobs.values() for word in overrides}
        return [name for name in self.config.bases if f"{BASE}={name}" in words] or [None]

    @cached_property
    def keys_of_bases(self) -> set[str]:
        """The settings of all bases."""
        return {key_of(word) for words in self.config.bases.values() for word in words}

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells in the order of the record's jobs."""
        grids: dict[tuple[str, tuple], dict[tuple, GridPoint]] = {}
        for overrides in self.record.jobs.values():
            values = dict(word.partition("=")[::2] for word in overrides)
            if values[SEED] != "0":
                continue
            arm = values[ARM]
            choices = tuple((key, values[key]) for key in self.config.conditions)
            tuned = {key: values[key] for key in self.config.tune if key in values}
            grid = grids.setdefault((arm, choices), {})
            grid.setdefault(tuple(tuned.values()), GridPoint(tuned, overrides))
        return [
            Cell(self, arm, dict(choices), list(grid.values()))
            for (arm, choices), grid in grids.items()
        ]

    @property
    def by_condition(self) -> dict[str, dict[str, Cell]]:
        """Condition -> arm -> cell."""
        cells: dict[str, dict[str, Cell]] = {}
        for cell in self.cells:
            cells.setdefault(cell.condition, {})[cell.arm] = cell
        return cells

    def comparisons(self) -> list[Comparison]:
        """Every two sides to compare."""
        return [
            Comparison(asked, *(tuple(cells[arm] for arm in side) for side in arms))
            for cells in self.by_condition.values()
            for asked, *arms in self.config.comparisons
            if {*itertools.chain(*arms)} <= cells.keys()
        ]

    @property
    def planned_contrasts(self) -> int:
        """The number of verdicts that the study's file plans, over which Holm's method corrects.
        Otherwise dropping arms could flip a verdict."""
        conditions = math.prod(map(len, self.config.conditions.values()))
        return max(len(self.comparisons()), conditions * len(self.config.comparisons))

    def missing(self) -> list[str]:
        """The folders of runs that have not ended."""
        return [name for cell in self.cells for name in cell.missing()]


def find_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    record = SweepRecord.find(folder / RECORD)
    return None if record is None or record.study is None else Study(folder, record)


@dataclass(frozen=True)
class Comparison:
    """Two sides to compare, the second minus the first. A side is one cell, or two, (a, b), whose
    difference b - a it is."""

    asked: str  # what the comparison asks
    first: tuple[Cell, ...]
    second: tuple[Cell, ...]

    @property
    def cells(self) -> list[Cell]:
        return [*self.first, *self.second]

    def sides(self, value: Callable[[Cell], T]) -> tuple[T, T]:
        """What a function of a cell gives for the first side, and for the second."""
        first, second = (
            value(side[-1]) - value(side[0]) if len(side) == 2 else value(side[0])
            for side in (self.first, self.second)
        )
        return first, second

    @property
    def has_diverged(self) -> bool:
        """Whether a compared run did."""
        return any(cell.diverged for cell in self.cells)

    def differences(self, outcome: str, base: str | None) -> np.ndarray:
        """[seeds, problems]"""
        first, second = self.sides(lambda cell: cell.values(outcome, base))
        return second - first

    def means(self, outcome: str) -> list[float]:
        """The difference of each seed; with bases, of each base; none where a compared run
        diverged."""
        if self.has_diverged:
            return []
        first, second = self.sides(lambda cell: np.array(cell.means(outcome)))
        return (second - first).tolist()

    @property
    def grid_slack(self) -> float:
        """The most by which other tuned values could lower, or raise, the difference."""
        added = [*self.second[-1:], *self.first[:-1]]
        subtracted = [*self.second[:-1], *self.first[-1:]]
        return max(sum(cell.grid_slack for cell in cells) for cells in (added, subtracted))


def name_of(side: Sequence[Cell]) -> str:
    """The arm of a side, or the difference of its two."""
    return f"({side[1].arm} - {side[0].arm})" if len(side) == 2 else side[0].arm
