"""Epoch order -> the sequences of an update -> a share for each process -> micro-batches of a bounded number of tokens.

All of it follows from (seed, update), so resuming needs no data-loader state; and since the loss is a sum over
supervised tokens, none of it changes the result.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow
import torch
from torch.nn.utils.rnn import pad_sequence

OVERHEAD_TOKENS = 96
"""What one more micro-batch costs beyond its tokens, in tokens (SmolLM2-135M on two cores): padding less than this is
cheaper than another pass."""


@dataclass(frozen=True)
class RowOrder:
    """How `rows` training rows become updates of `batch_size` sequences."""

    rows: int
    batch_size: int
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        """The last update of an epoch takes the sequences that are left, so an epoch has every row once."""
        return math.ceil(self.rows / self.batch_size)

    def epoch(self, update: int) -> int:
        """The epoch, from 0, that update number `update` (from 0) belongs to."""
        return update // self.updates_per_epoch

    def sequences(self, update: int) -> list[int]:
        """The rows of one update."""
        order = epoch_order(self.rows, self.seed * 1_000_003 + self.epoch(update))
        start = update % self.updates_per_epoch * self.batch_size
        return order[start : start + self.batch_size].tolist()


@functools.lru_cache(maxsize=1)  # of many rows it takes milliseconds, which every update of the epoch would wait for
def epoch_order(rows: int, seed: int) -> torch.Tensor:
    """The rows in the order of an epoch."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def shares(rows: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Every process's rows of an update, so that all get about the same number of tokens.

    Args:
        rows: the rows of the update.
        lengths: tokens of every row of the data set.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):  # longest first, to whoever has least
        least = tokens.index(min(tokens))
        shares[least].append(row)
        tokens[least] += lengths[row]
    return shares


def flat_micro_batches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups of at most `max_tokens` tokens, to be laid end to end: as few as best-fit-decreasing finds."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens that a group still takes, and the group; sorted
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        place = bisect.bisect_left(room, (lengths[row], 0))
        if place < len(room):
            left, group = room.pop(place)
        else:
            left, group = max_tokens, len(groups)
            groups.append([])
        groups[group].append(row)
        bisect.insort(room, (left - lengths[row], group))
    return groups


def padded_micro_batches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups of near-equal length with at most `max_tokens` tokens, padding included: the cheapest cut of the rows
    in order of length, counting each group's padded tokens and its overhead."""
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    cost = [0.0] + [math.inf] * len(ordered)  # cost[end]: the best cut of ordered[:end]
    start_of = [0] * (len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        longest = lengths[ordered[end - 1]]
        for start in range(end - 1, -1, -1):
            tokens = (end - start) * longest
            if tokens > max_tokens and end - start > 1:
                break
            if cost[start] + tokens + OVERHEAD_TOKENS < cost[end]:
                cost[end], start_of[end] = cost[start] + tokens + OVERHEAD_TOKENS, start
    groups, end = [], len(ordered)
    while end:
        groups.append(ordered[start_of[end] : end])
        end = start_of[end]
    return groups[::-1]


@dataclass
class Batch:
    """One micro-batch of shape [B, T]. Flat: B is 1, positions restart with each sequence, no attention mask."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    """True where the token's prediction counts."""
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    sequence_lengths: list[int] | None = None
    """Flat: the tokens of each sequence."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a transformers model is called with."""
        places = {"position_ids": self.position_ids, "attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids} | {name: value for name, value in places.items() if value is not None}

    def to(self, device: torch.device) -> Batch:
        places = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **places)


def flat_batch(input_ids: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[bool]]) -> Batch:
    """Sequences end to end in one row: no padding at all."""
    return Batch(
        torch.cat([torch.as_tensor(ids, dtype=torch.int64) for ids in input_ids])[None],
        torch.cat([torch.as_tensor(mask) for mask in loss_masks])[None],
        torch.cat([torch.arange(len(ids)) for ids in input_ids])[None],
        None,
        [len(ids) for ids in input_ids],
    )


def padded_batch(input_ids: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[bool]]) -> Batch:
    """Sequences one a row, padded on the right. Token 0 stands for padding, which nothing attends to or predicts."""
    rows = [torch.as_tensor(ids, dtype=torch.int64) for ids in input_ids]
    needs_mask = len(set(map(len, rows))) > 1
    pad = functools.partial(pad_sequence, batch_first=True)
    return Batch(
        pad(rows),
        pad([torch.as_tensor(mask) for mask in loss_masks]),
        None,
        # All of one length: without a mask, attention takes its fast causal path.
        pad([torch.ones_like(ids) for ids in rows]) if needs_mask else None,
    )


class MicroBatches:
    """Cuts rows of a tokenised split into micro-batches and loads them.

    Args:
        rows: the split.
        is_flat: sequences end to end instead of one a row.
        max_tokens: of a micro-batch, padding included.
        device: where the batches go.
    """

    def __init__(self, rows: Any, is_flat: bool, max_tokens: int, device: torch.device) -> None:
        self.rows, self.is_flat, self.max_tokens, self.device = rows.rows, is_flat, max_tokens, device
        self.lengths: list[int] = rows.column("length")
        self.supervised: list[int] = rows.column("supervised")

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of each micro-batch."""
        cut = flat_micro_batches if self.is_flat else padded_micro_batches
        return cut(rows, self.lengths, self.max_tokens)

    def load(self, group: Sequence[int]) -> Batch:
        """One micro-batch, on the device."""
        # By DLPack, which has no packed bits: Arrow's `to_numpy` would first import pandas, for a third of a second.
        ids = [torch.from_dlpack(self.rows["input_ids"][row].values) for row in group]
        bits = [self.rows["loss_mask"][row].values for row in group]
        masks = [torch.from_dlpack(mask.cast(pyarrow.uint8())).bool() for mask in bits]
        return (flat_batch if self.is_flat else padded_batch)(ids, masks).to(self.device)

    def passes(self, rows: Sequence[int], processes: int, process: int, in_step: bool) -> list[tuple[list[int], bool]]:
        """The micro-batches that a process runs for its share of these rows, and whether each counts. It runs at least
        one, since the others wait for its gradient.

        Args:
            in_step: every process runs as many, since each holds a part of the weights that the others need; those
                with fewer of their own run one that does not count.
        """
        own_rows = shares(rows, self.lengths, processes)
        own = self.groups(own_rows[process])
        count = max(len(self.groups(share)) for share in own_rows) if in_step else max(1, len(own))
        return [(group, True) for group in own] + [(list(rows[:1]), False)] * (count - len(own))

    def first(self, max_tokens: int) -> list[int]:
        """The first rows that have at most `max_tokens` together; at least one."""
        rows, tokens = [0], self.lengths[0]
        while len(rows) < len(self.lengths) and tokens + self.lengths[len(rows)] <= max_tokens:
            tokens += self.lengths[len(rows)]
            rows.append(len(rows))
        return rows
