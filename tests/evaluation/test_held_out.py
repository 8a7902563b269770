"""Losses of held-out tokens: those of one token at a time, in the order of the rows, whoever computes them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy
import peft
import pytest
import torch
from torch.nn.functional import log_softmax

from cera_train.cera import CeraConfig
from cera_train.data.prepare import Example, TokenizedRows, table_of
from cera_train.evaluation.held_out import HeldOut
from cera_train.model.loss import SupervisedLoss, perplexity


@pytest.fixture
def rows() -> TokenizedRows:
    """Nine rows of 3 to 20 tokens, about half of them supervised."""
    numbers, examples = random.Random(0), []
    for _ in range(9):
        ids = [numbers.randrange(512) for _ in range(numbers.randint(3, 20))]
        mask = [False] + [numbers.random() < 0.6 for _ in ids[2:]] + [True]
        examples.append(Example(ids, mask, "key"))
    return TokenizedRows(table_of(examples))


def make_loss(model, **changes) -> SupervisedLoss:
    config = CeraConfig(r=4, init_weights=False, task_type="CAUSAL_LM", **changes)
    loss = SupervisedLoss(peft.get_peft_model(model, config), model)
    loss.probe()
    return loss


def team_of(processes: int, process: int, is_sharded: bool, parts: list[torch.Tensor]) -> SimpleNamespace:
    """One process at a time: a sum over them is taken of what is in `parts` at the end."""
    return SimpleNamespace(
        processes=processes,
        process=process,
        is_sharded=is_sharded,
        device=torch.device("cpu"),
        passes=lambda passes: [(one, False) for one in passes],
        reduce=lambda tensor: parts.append(tensor) or sum(parts),
    )


@torch.no_grad()
def one_at_a_time(model, rows: TokenizedRows) -> list[float]:
    losses = []
    for row in range(len(rows)):
        ids, mask = (rows.tokens(name, row).to_pylist() for name in ("input_ids", "loss_mask"))
        for position in range(1, len(ids)):
            if mask[position]:
                logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
                losses.append(-log_softmax(logits, -1)[ids[position]].item())
    return losses


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize(("processes", "is_sharded"), [(1, False), (2, False), (4, True)])
def test_losses_are_those_of_one_token_at_a_time_row_by_row(tiny_llama, rows, is_flat, processes, is_sharded):
    """Four sharded processes run as many micro-batches as the one with most: some do not count."""
    loss = make_loss(tiny_llama, dropout=0.0)
    expected = one_at_a_time(loss.model, rows)
    if is_flat:
        loss.use_flat_batches()
    parts: list[torch.Tensor] = []
    for process in range(processes):
        team = team_of(processes, process, is_sharded, parts)
        losses = HeldOut(loss.model, loss, rows, team, micro_batch_tokens=24, probe_tokens=8).token_losses()
    assert losses.tokens.tolist() == rows.column("supervised")
    assert (losses.tokens.dtype, losses.losses.dtype) == (numpy.int64, numpy.float32)
    assert losses.losses == pytest.approx(expected, rel=1e-5)
    assert losses.mean == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert perplexity(losses.mean) == pytest.approx(perplexity(sum(expected) / len(expected)), rel=1e-5)


def test_losses_are_taken_without_dropout_and_leave_training_mode(tiny_llama, rows):
    loss = make_loss(tiny_llama, dropout=0.5).train()
    held_out = HeldOut(loss.model, loss, rows, team_of(1, 0, False, []), 64, 8)
    first = held_out.token_losses()
    held_out.team = team_of(1, 0, False, [])
    assert first.losses.tolist() == held_out.token_losses().losses.tolist()
    assert loss.training
