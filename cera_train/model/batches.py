"""The rows of an update -> a share for each process -> micro-batches of a bounded number of tokens.
The loss is a sum over supervised tokens, so neither shares nor micro-batches change the result."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

OVERHEAD_TOKENS = 96
"""Overhead of a micro-batch, in tokens (SmolLM2-135M on two cores): padding fewer tokens than this
is cheaper than another pass."""


@dataclass(frozen=True)
class RowOrder:
    """Which of the `rows` training rows each update takes, in batches of `batch_size`. An epoch is
    a permutation that follows from the seed and the update, so resuming needs no state, and all
    processes agree."""

    rows: int
    batch_size: int
    seed: int
    sequences_per_row: int = 1  # two of a preference

    @property
    def updates_per_epoch(self) -> int:
        """Updates of an epoch. The last takes the rows that remain, so an epoch has every row
        once."""
        return math.ceil(self.rows / self.batch_size)

    def sequences(self, update: int) -> list[int]:
        epoch, number = divmod(update, self.updates_per_epoch)
        order = epoch_order(self.rows, self.seed * 1_000_003 + epoch)
        start = number * self.batch_size
        rows = order[start : start + self.batch_size].tolist()
        return [
            row * self.sequences_per_row + number
            for row in rows
            for number in range(self.sequences_per_row)
        ]


# Takes milliseconds for many rows, and every update needs it.
@functools.lru_cache(maxsize=16)
def epoch_order(rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def shares(rows: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The rows of an update that each process takes, balanced by tokens. `lengths` holds the tokens
    of every row of the data set."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    # Longest first, each to the process with the fewest tokens.
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        process = tokens.index(min(tokens))
        shares[process].append(row)
        tokens[process] += lengths[row]
    return shares


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], max_tokens: int, is_flat: bool
) -> list[list[int]]:
    """Groups of rows, longest first, with at most `max_tokens` tokens, padding included: the next
    row begins a group where it would exceed that, or where padding would cost more than another
    pass."""
    groups: list[list[int]] = []
    tokens = 0  # of the last group
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        tokens += lengths[row]
        size = tokens
        if groups and not is_flat:
            longest = groups[-1][0]
            size = lengths[longest] * (len(groups[-1]) + 1)
        if not groups or size > max_tokens or size - tokens > OVERHEAD_TOKENS:
            groups.append([])
            tokens = lengths[row]
        groups[-1].append(row)
    return groups


@dataclass
class Batch:
    """One micro-batch of shape [B, T]. Flat: B is 1, and positions restart with each sequence."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor  # true where the token's prediction counts
    predicted: torch.Tensor  # [N] the places of these tokens in input_ids.flatten()
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    sequence_lengths: list[int] | None = None  # flat: the tokens of each sequence

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of a transformers model."""
        inputs = {
            name: getattr(self, name) for name in ("input_ids", "position_ids", "attention_mask")
        }
        return {name: value for name, value in inputs.items() if value is not None}

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def flat_batch(input_ids: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[bool]]) -> Batch:
    """Sequences end to end in one row, without padding."""
    lengths = [len(ids) for ids in input_ids]
    loss_mask = torch.cat([torch.as_tensor(mask) for mask in loss_masks])[None]
    return Batch(
        torch.cat([torch.as_tensor(ids, dtype=torch.int64) for ids in input_ids])[None],
        loss_mask,
        predicted_places(loss_mask),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        sequence_lengths=lengths,
    )


def padded_batch(input_ids: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[bool]]) -> Batch:
    """One sequence a row, padded on the right with token 0, which nothing attends to or
    predicts."""
    rows = [torch.as_tensor(ids, dtype=torch.int64) for ids in input_ids]
    pad = functools.partial(pad_sequence, batch_first=True)
    loss_mask = pad([torch.as_tensor(mask) for mask in loss_masks])
    batch = Batch(pad(rows), loss_mask, predicted_places(loss_mask))
    # Rows of one length need no mask: attention takes its fast causal path.
    if len(set(map(len, rows))) > 1:
        batch.attention_mask = pad([torch.ones_like(ids) for ids in rows])
    return batch


def predicted_places(loss_mask: torch.Tensor) -> torch.Tensor:
    """[N] where a mask [B, T] is true, except at the first token of a row, which nothing predicts.
    Found on the CPU: selecting by a mask would wait for a GPU to count."""
    rows, columns = loss_mask[:, 1:].nonzero().unbind(1)
    return rows * loss_mask.shape[1] + columns + 1


class MicroBatches:
    """Micro-batches of at most `max_tokens` tokens, padding included, of the rows of a tokenised
    split."""

    def __init__(self, rows: Any, is_flat: bool, max_tokens: int, device: torch.device) -> None:
        self.rows = rows
        self.is_flat = is_flat
        self.max_tokens = max_tokens
        self.device = device
        # tokens of a row, and those predicted
        self.lengths = rows.lengths
        self.supervised = rows.supervised

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of each micro-batch."""
        return micro_batches(rows, self.lengths, self.max_tokens, self.is_flat)

    def load(self, group: Sequence[int]) -> Batch:
        """One micro-batch, on the device."""
        # Arrow's `to_numpy` would import pandas, for a third of a second. DLPack has no packed
        # bits, so masks are cast.
        ids = [torch.from_dlpack(self.rows.tokens("input_ids", row)) for row in group]
        bits = [self.rows.tokens("loss_mask", row) for row in group]
        masks = [torch.from_dlpack(mask.cast(pyarrow.uint8())).bool() for mask in bits]
        return (flat_batch if self.is_flat else padded_batch)(ids, masks).to(self.device)

    def of_process(
        self, accelerator: Accelerator, rows: Sequence[int]
    ) -> list[tuple[list[int], bool]]:
        """The micro-batches that this process runs for its share of these rows, and whether each
        counts in the loss.

        A process without rows runs one that does not count, since the others wait for its gradient.
        Under FSDP all processes run the same number, since they gather sharded weights together.
        """
        process_rows = shares(rows, self.lengths, accelerator.num_processes)
        groups = self.groups(process_rows[accelerator.process_index])
        count = max(1, len(groups))
        if accelerator.is_fsdp2:
            count = max(len(self.groups(share)) for share in process_rows)
        counted = [(group, True) for group in groups]
        return counted + [(list(rows[:1]), False)] * (count - len(groups))

    def first(self, max_tokens: int) -> list[int]:
        """The longest prefix of the rows with at most `max_tokens` tokens in total; at least one
        row."""
        count = bisect.bisect_right(list(itertools.accumulate(self.lengths)), max_tokens)
        return list(range(max(1, count)))
