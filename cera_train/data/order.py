"""Which rows each update takes: of rows that are all at hand, a permutation for each epoch; of a stream, the next ones.

Both follow from (seed, update), so resuming needs no state, and all processes find the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.data.rows import PlacedRow, Source

if TYPE_CHECKING:
    import pyarrow
    import torch


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
