"""Which rows an epoch has, and which of them each update takes.

Of a mix, a part's rows are its weight's share of the epoch, by largest remainder. A part that has fewer is repeated in
whole passes; of one that has more, and of a last pass that is not whole, the seed draws the rows. An epoch is a
permutation; a stream gives its next rows. Both follow from (seed, update), so resuming needs no state, and all
processes find the same.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.data.rows import PlacedRow, Source

if TYPE_CHECKING:
    import pyarrow
    import torch


# --- the rows of an epoch ---------------------------------------------------------------------------------------------

Weights = Sequence[float | None]
"""One for each part, in any unit, or None for all: every part then gives the rows that it has."""


def rows_of_parts(available: Sequence[int], weights: Weights, total: int | None) -> list[int]:
    """How many rows of each part an epoch has.

    Args:
        available: rows that each part has.
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


# --- the rows of an update --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowOrder:
    """Which of the `rows` training rows each update takes, in batches of `batch_size` sequences."""

    rows: int
    batch_size: int
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        """Updates of an epoch. The last takes the sequences that remain, so an epoch has every row once."""
        return math.ceil(self.rows / self.batch_size)

    def epoch(self, update: int) -> int:
        return update // self.updates_per_epoch

    def sequences(self, update: int) -> list[int]:
        order = epoch_order(self.rows, self.seed * 1_000_003 + self.epoch(update))
        start = update % self.updates_per_epoch * self.batch_size
        return order[start : start + self.batch_size].tolist()


@functools.lru_cache(maxsize=16)  # takes milliseconds where there are many rows, and every update needs it
def epoch_order(rows: int, seed: int) -> torch.Tensor:
    """The rows in the order of an epoch."""
    import torch

    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


class StreamedRows:
    """Training rows that are read once and tokenised when an update takes them: `data.streaming`.

    Blocks of `data.shuffle_buffer` rows are shuffled, each by the seed and its number, and an update takes the next
    `train.batch_size` rows; it has fewer sequences where some have no answer. A resumed run skips the rows before.

    Args:
        tokenize: makes `TokenizedRows` of rows, each given after its place.
        buffer: rows that are shuffled at a time.
        digest: a digest of the source, the tokenizer and the settings that change tokens.
    """

    updates_per_epoch = math.inf

    def __init__(self, source: Source, tokenize: Callable[[list[PlacedRow]], Any], buffer: int, digest: str) -> None:
        self.source, self.tokenize, self.buffer, self.digest = source, tokenize, buffer, digest

    def order(self, batch_size: int, seed: int) -> StreamedRows:
        """The order of the rows, as of `TokenizedRows`: this stream itself, at its start."""
        self.batch_size, self.seed = batch_size, seed
        self._update, self._rest = -1, self._shuffled(0)
        return self

    def epoch(self, update: int) -> int:
        return 0

    def sequences(self, update: int) -> Sequence[int]:
        """Takes the rows of an update from the stream; their numbers among these."""
        if update != self._update:
            if update != self._update + 1:
                self._rest = self._shuffled(update * self.batch_size)
            rows = list(itertools.islice(self._rest, self.batch_size))
            if not rows:
                mend = f"Set train.max_updates={update} or less, or add rows."
                raise UserError(f"{self.source.name}: its rows are used up after {update} updates. {mend}")
            self._update, self._tokenized = update, self.tokenize(rows)
            if not self._tokenized:
                mend = "Look at them, or raise train.batch_size or data.max_length."
                raise UserError(f"{rows[0][0]}: no row of update {update + 1} has an answer to train on. {mend}")
            self.lengths, self.supervised = self._tokenized.lengths, self._tokenized.supervised
        return range(len(self._tokenized))

    def tokens(self, name: str, row: int) -> pyarrow.Array:
        return self._tokenized.tokens(name, row)

    def _shuffled(self, start: int) -> Iterator[PlacedRow]:
        """The shuffled stream from row `start` on."""
        number, inside = divmod(start, self.buffer)
        rows = iter(self.source.between(number * self.buffer, None).located())
        while block := list(itertools.islice(rows, self.buffer)):
            order = epoch_order(len(block), self.seed * 1_000_003 + number).tolist()
            yield from (block[row] for row in order[inside:])
            number, inside = number + 1, 0

    def describe(self) -> str:
        return f"read as it trains, {self.buffer:,} shuffled at a time; rows without an answer are dropped"
