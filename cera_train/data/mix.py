"""Several data sets as one: how many rows of each part an epoch has, which, and in what order.

A part's rows are its weight's share of the epoch, by largest remainder. One that has fewer is repeated in whole passes;
of one that has more, and of a last pass that is not whole, the seed draws the rows. Nothing here imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Weights = Sequence[float | None]
"""One for each part, in any unit; None in all: as many rows as each part has."""


def rows_of_parts(available: Sequence[int], weights: Weights, total: int | None) -> list[int]:
    """How many rows of each part an epoch has.

    Args:
        available: rows that each part has.
        total: rows of the epoch. None: as many as repeat no part.
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
    """`count` rows of a part: whole passes over it, then rows drawn without replacement."""
    passes, rest = divmod(count, available)
    return [*range(available)] * passes + sorted(random.Random(seed).sample(range(available), rest))


def interleaved(parts: Sequence[Sequence[int]]) -> list[int]:
    """The rows of all parts as one list, over which each part is spread evenly: its first rows stand for all."""
    places = (
        ((place + 0.5) / len(rows), part, row) for part, rows in enumerate(parts) for place, row in enumerate(rows)
    )
    return [row for *_, row in sorted(places)]


@dataclass(frozen=True)
class PartRows:
    """What a part gives to a mix."""

    title: str
    available: int
    """Rows that it has to train on."""
    rows: int
    """Its rows in an epoch."""
    tokens: float
    """Its tokens in an epoch."""
    eval_rows: int


def describe_parts(parts: Sequence[PartRows]) -> list[str]:
    """A line for each part: its rows and tokens, and their shares of an epoch."""
    rows, tokens = sum(part.rows for part in parts), sum(part.tokens for part in parts)
    return [
        f"{part.title}: {part.rows:,} rows an epoch, of {part.available:,} ({part.rows / rows:.2%}), "
        f"{part.tokens:,.0f} tokens ({part.tokens / tokens:.2%}); {part.eval_rows:,} rows evaluate"
        for part in parts
    ]
