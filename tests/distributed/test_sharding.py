"""Sharded weights and moments become whole one tensor at a time, and stay in one process only."""

import weakref

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import AdamW

from cera_train.distributed.sharding import optimizer_state, trainable_weights


@pytest.fixture
def sharded():
    """A model whose weights are sharded over a team of one, and its optimizer after a step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for layer in model:
        for name, weight in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(distribute_tensor(weight.detach(), mesh)))
    optimizer = AdamW(model.parameters())
    model(distribute_tensor(torch.ones(2, 4), mesh, [Replicate()])).sum().backward()
    optimizer.step()
    yield model, optimizer
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_the_gpu(monkeypatch) -> list[int]:
    """How many whole tensors were on the GPU at once, each time that one more came; a copy stands for the CPU's."""
    alive, counts = weakref.WeakSet(), []
    collect = DTensor.full_tensor

    def full_tensor(self):
        whole = collect(self).clone()
        alive.add(whole)
        counts.append(len(alive))
        return whole

    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    return counts


@pytest.mark.parametrize("keep", [True, False])
def test_one_whole_tensor_at_a_time_is_on_the_gpu(sharded, on_the_gpu, keep):
    model, optimizer = sharded
    weights, state = trainable_weights(model, keep=keep), optimizer_state(optimizer, keep=keep)
    assert on_the_gpu == [1] * 12  # two weights and two biases, and two moments of each
    kept = [*weights.values(), *(moment for moments in state["state"].values() for moment in moments.values())]
    assert len(kept) == 16  # with the step count of each
    assert {type(tensor) for tensor in kept} == {torch.Tensor if keep else type(None)}
