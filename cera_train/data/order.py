"""Which rows an epoch has, and which of them each update takes.

Of a mix, a part's rows are its weight's share of the epoch, by largest remainder. A part that has fewer is repeated in
whole passes; of one that has more, and of a last pass that is not whole, the seed draws the rows. An epoch is a
permutation that follows from (seed, update), so resuming needs no state, and all processes find the same.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# --- the rows of an epoch ---------------------------------------------------------------------------------------------


def rows_of_parts(available: Sequence[int], weights: Sequence[float | None], total: int | None) -> list[int]:
    """How many rows of each part an epoch has.

    Args:
        available: rows that each part has.
        weights: of each part, in any unit; or None for all, and every part gives the rows that it has.
        total: rows of the epoch; by default as many as repeat no part.
    """
    if None in weights:
        weights, total = available, min(total or sum(available), sum(available))
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 counts as seven tenths
    shares = [weight / sum(exact) for weight in exact]
    if total is None:
        total = min(int(rows / share) for rows, share in zip(available, shares, strict=True) if share)
    quotas = [share * total for share in shares]
    rows = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(rows)), key=lambda part: (rows[part] - quotas[part], part))
    for part in by_remainder[: total - sum(rows)]:
        rows[part] += 1
    return rows


def drawn_rows(available: int, count: int, seed: str) -> list[int]:
    """The numbers of `count` rows of a part: whole passes over it, then rows drawn without replacement."""
    passes, rest = divmod(count, available)
    return [*range(available)] * passes + sorted(random.Random(seed).sample(range(available), rest))


def interleaved(parts: Sequence[Sequence[int]]) -> list[int]:
    """The rows of all parts as one list, over which each part is spread evenly: its first rows represent all parts."""
    places = (
        ((place + 0.5) / len(rows), part, row) for part, rows in enumerate(parts) for place, row in enumerate(rows)
    )
    return [row for *_, row in sorted(places)]


# --- the rows of an update --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowOrder:
    """Which of the `rows` training rows each update takes, in batches of `batch_size`."""

    rows: int
    batch_size: int
    seed: int
    together: int = 1  # sequences of a row: two of a preference

    @property
    def updates_per_epoch(self) -> int:
        """Updates of an epoch. The last takes the rows that remain, so an epoch has every row once."""
        return math.ceil(self.rows / self.batch_size)

    def epoch(self, update: int) -> int:
        return update // self.updates_per_epoch

    def sequences(self, update: int) -> list[int]:
        order = epoch_order(self.rows, self.seed * 1_000_003 + self.epoch(update))
        start = update % self.updates_per_epoch * self.batch_size
        rows = order[start : start + self.batch_size].tolist()
        return [row * self.together + number for row in rows for number in range(self.together)]


@functools.lru_cache(maxsize=16)  # takes milliseconds where there are many rows, and every update needs it
def epoch_order(rows: int, seed: int) -> torch.Tensor:
    import torch

    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
