"""Every row once, and shares and micro-batches that partition them."""

import random
from itertools import chain
from types import SimpleNamespace

import pyarrow
import pytest
import torch

from cera_train.data.prepare import TokenizedRows, table_of
from cera_train.data.reader import Example
from cera_train.model.batches import (
    OVERHEAD_TOKENS,
    MicroBatches,
    RowOrder,
    flat_batch,
    micro_batches,
    padded_batch,
    shares,
)


def random_lengths(seed: int, count: int, longest: int = 300) -> list[int]:
    return random.Random(seed).choices(range(1, longest + 1), k=count)


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (9, 3), (1, 4), (7, 1)])
def test_an_epoch_has_every_row_exactly_once(rows, batch_size):
    order = RowOrder(rows, batch_size, seed=0)
    for epoch in range(3):
        first = epoch * order.updates_per_epoch
        updates = [
            order.sequences(update) for update in range(first, first + order.updates_per_epoch)
        ]
        assert sorted(chain.from_iterable(updates)) == list(range(rows))
        assert all(len(update) == batch_size for update in updates[:-1])
        assert len(updates[-1]) == (rows % batch_size or batch_size)


@pytest.mark.parametrize("processes", [1, 3, 5])
@pytest.mark.parametrize("count", [0, 2, 64])
def test_shares_partition_the_rows_and_differ_by_at_most_one_sequence(processes, count):
    for seed in range(5):
        lengths = random_lengths(seed, 100)
        rows = random.Random(seed).sample(range(100), count)
        shared = shares(rows, lengths, processes)
        assert sorted(chain.from_iterable(shared)) == sorted(rows)
        tokens = [sum(lengths[row] for row in rows) for rows in shared]
        assert max(tokens) - min(tokens) <= max((lengths[row] for row in rows), default=0)
        assert shares(rows[::-1], lengths, processes) == shared


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 300, 1000, 10**6])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_micro_batches_partition_the_rows_within_the_bound(is_flat, max_tokens, count):
    for seed in range(5):
        lengths = random_lengths(seed, 100)
        rows = random.Random(seed).sample(range(100), count)
        groups = micro_batches(rows, lengths, max_tokens, is_flat)
        assert sorted(chain.from_iterable(groups)) == sorted(rows)
        assert micro_batches(rows[::-1], lengths, max_tokens, is_flat) == groups
        for group in groups:
            tokens = sum(lengths[row] for row in group)
            padded = len(group) * max(lengths[row] for row in group)
            assert len(group) == 1 or (tokens if is_flat else padded) <= max_tokens
            assert is_flat or padded - tokens <= OVERHEAD_TOKENS


def split_of(lengths: list[int]) -> TokenizedRows:
    """Rows whose tokens are 1000 times their number."""
    examples = [
        Example(
            [1000 * row + place for place in range(length)], [place > 0 for place in range(length)]
        )
        for row, length in enumerate(lengths)
    ]
    return TokenizedRows(table_of(examples))


@pytest.mark.parametrize(("is_flat", "make"), [(True, flat_batch), (False, padded_batch)])
def test_a_loaded_micro_batch_equals_one_built_from_lists(is_flat, make):
    split = split_of([3, 1, 9, 9, 2])
    # In two chunks, as files are written.
    split.table = pyarrow.concat_tables([split.table.slice(0, 2), split.table.slice(2)])
    for group in ([4, 0, 2], [2, 3], [1]):
        rows = [split.table.to_pylist()[row] for row in group]
        expected = make([row["input_ids"] for row in rows], [row["loss_mask"] for row in rows])
        loaded = MicroBatches(split, is_flat, 100, torch.device("cpu")).load(group)
        torch.testing.assert_close(vars(loaded), vars(expected), rtol=0, atol=0)  # dtypes too


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("count", [1, 2, 9, 25])
def test_passes_take_every_row_once_and_run_in_step_if_required(in_step, count):
    batches = MicroBatches(
        split_of(random_lengths(0, 30, longest=50)), True, 70, torch.device("cpu")
    )
    rows = list(range(3, 3 + count))
    accelerators = [
        SimpleNamespace(num_processes=4, process_index=process, is_fsdp2=in_step)
        for process in range(4)
    ]
    of_all = [batches.of_process(accelerator, rows) for accelerator in accelerators]
    assert (
        sorted(row for passes in of_all for group, counts in passes if counts for row in group)
        == rows
    )
    assert all(passes for passes in of_all)
    assert all(set(group) <= set(rows) for passes in of_all for group, _ in passes)
    if in_step:
        assert len({len(passes) for passes in of_all}) == 1
    else:
        assert sum(not counts for passes in of_all for _, counts in passes) == max(0, 4 - count)
