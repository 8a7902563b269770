"""Sharded weights and moments are gathered one tensor at a time, and kept by one process only.
Replicas share the memory of frozen weights."""

import weakref
from pathlib import Path

import pytest
import torch
from built_runs import build_run
from tiny_runs import folder_of
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from cera_train.distributed.sharding import optimizer_state, trainable_weights
from cera_train.model.weights import load_model
from cera_train.settings.model import ModelConfig


@pytest.fixture
def sharded(team_of_one):
    """A model whose weights are sharded, and its optimizer after a step."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for layer in model:
        for name, weight in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(distribute_tensor(weight.detach(), mesh)))
    optimizer = AdamW(model.parameters())
    model(distribute_tensor(torch.ones(2, 4), mesh, [Replicate()])).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def on_the_gpu(monkeypatch) -> list[int]:
    """The number of unsharded tensors on the GPU each time that one more was gathered; a copy
    stands in for the CPU's."""
    alive = weakref.WeakSet()
    counts = []
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
def test_only_one_unsharded_tensor_at_a_time_is_on_the_gpu(sharded, on_the_gpu, keep):
    model, optimizer = sharded
    weights = trainable_weights(model, keep=keep)
    state = optimizer_state(optimizer, keep=keep)
    assert on_the_gpu == [1] * 12  # two weights and two biases, and two moments of each
    kept = [
        *weights.values(),
        *(moment for moments in state["state"].values() for moment in moments.values()),
    ]
    assert len(kept) == 16  # with the step count of each
    assert {type(tensor) for tensor in kept} == {torch.Tensor if keep else type(None)}


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
def test_replicas_share_the_memory_mapped_frozen_weights(tiny_config, team_of_one, monkeypatch):
    """The processes of a machine share these pages until one writes to them."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    config = tiny_config("train.max_updates=1")
    run = build_run(config, folder_of(config))
    assert isinstance(run.model.wrapped, DistributedDataParallel)
    assert written_of_mapped_weights() == {"0 kB"}


def test_processes_that_will_shard_a_model_hold_it_in_host_memory_once(tiny_folder):
    """All of them map the file in the dtype that it stores: FSDP moves a layer at a time."""
    config = ModelConfig(path=str(tiny_folder), dtype="float32")
    model = load_model(config, torch.device("cpu"), will_be_sharded=True)
    assert written_of_mapped_weights() == {"0 kB"}
    maps = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    for weight in model.parameters():
        assert any(start <= weight.data_ptr() < end for start, end in maps)


def written_of_mapped_weights() -> set[str]:
    """How much of each mapping of weights this process has copied by writing to it."""
    mappings = Path("/proc/self/smaps").read_text().split("model.safetensors\n")[1:]
    written = [
        next(line for line in mapping.splitlines() if "Anonymous" in line) for mapping in mappings
    ]
    return {line.split(":")[1].strip() for line in written}
