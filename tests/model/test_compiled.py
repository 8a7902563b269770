"""Compiled layers stay compiled: no number of sequences makes another graph, and gradients are as of eager layers."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable

import peft
import pytest
import torch
from conftest import make_tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cera_train.cera import CeraConfig
from cera_train.model.batches import flat_batch
from cera_train.model.lean import keep_less
from cera_train.model.loss import SupervisedLoss


def micro_batches(count: int = 12):
    numbers = random.Random(0)
    for sequences in range(1, count + 1):
        rows = [[numbers.randrange(64) for _ in range(numbers.randint(3, 9))] for _ in range(sequences)]
        yield flat_batch(rows, [[False] + [True] * (len(row) - 1) for row in rows])


def make_loss(dtype: str, dropout: float, checkpointing: bool) -> SupervisedLoss:
    model = make_tiny_llama(vocab_size=64, num_hidden_layers=9).to(getattr(torch, dtype)).requires_grad_(False)
    keep_less(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = CeraConfig(r=4, dropout=dropout, init_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    autocast = contextlib.nullcontext if dtype == "float32" else lambda: torch.autocast("cpu", torch.bfloat16)
    loss = SupervisedLoss(adapted, model, autocast)
    loss.probe()
    loss.use_flat_batches()
    return loss.train()


def shard(loss: SupervisedLoss) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in loss.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def graphs():
    """Collects the graphs of layers that `compile_layers(graphs.add)` compiled."""
    logging.disable(logging.DEBUG)  # pytest would keep thousands of torch's lines
    yield Graphs()
    logging.disable(logging.NOTSET)
    torch.compiler.reset()


class Graphs(list):
    def add(self, graph: torch.fx.GraphModule, inputs: object) -> Callable:
        self.append(graph)
        return graph.forward


def gradients(loss: SupervisedLoss, graphs: list) -> tuple[list[torch.Tensor], list[int]]:
    """The gradients of every trained weight over all micro-batches, and how many graphs there were after each."""
    counts = []
    for batch in micro_batches():
        loss(batch).backward()
        counts.append(len(graphs))
    grads = [weight.grad for weight in loss.parameters() if weight.requires_grad]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads], counts


@pytest.mark.parametrize(
    ("dtype", "dropout", "checkpointing", "is_sharded"),
    [
        ("float32", 0.0, False, False),
        ("bfloat16", 0.1, False, False),
        ("bfloat16", 0.1, True, False),
        pytest.param("float32", 0.0, True, True, marks=pytest.mark.slow),
    ],
)
def test_layers_stay_compiled_whatever_the_number_of_sequences(
    graphs, one_process, dtype, dropout, checkpointing, is_sharded
):
    compiled = make_loss(dtype, dropout, checkpointing)
    if is_sharded:
        shard(compiled)
    compiled.compile_layers(graphs.add)
    got, counts = gradients(compiled, graphs)
    assert counts == [counts[0]] * len(counts)
    assert counts[0] >= 2
    if not dropout:
        expected, _ = gradients(make_loss(dtype, dropout, checkpointing), graphs)
        for ours, eager in zip(got, expected, strict=True):
            assert (ours - eager).norm() <= 1e-6 * eager.norm()
