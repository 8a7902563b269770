"""Layers that keep what a call prepares: to the bit what they compute without, and nothing is left behind."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from cera_models import IDS, WARNINGS, adapted, logits
from torch import nn
from transformers.pytorch_utils import Conv1D

from cera_train.cera import CeraConfig, CeraLayer, for_inference

pytestmark = WARNINGS

BASES = {
    "linear": lambda: nn.Linear(64, 32),
    "without bias": lambda: nn.Linear(64, 32, bias=False),
    "Conv1D": lambda: Conv1D(32, 64),
    "8 bits": lambda: bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
    "4 bits": lambda: bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu"),
}
GATES = {"the paper's": {}, "scaled": {"alpha": 6}, "learned": {"mix": "learned"}}


def make_layer(base: nn.Module, name: str = "default", **settings) -> CeraLayer:
    config = CeraConfig(**{"r": 8, "init_weights": False, "dropout": 0.1} | settings)
    return CeraLayer(base.requires_grad_(False), name, config).eval()


def calls(layer: nn.Module, x: torch.Tensor, times: int = 3) -> list[torch.Tensor]:
    """The output of each of a few calls on the same input."""
    return [layer(x).clone() for _ in range(times)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", BASES)
def test_every_call_gives_what_it_gives_without(name, gate):
    layer, x = make_layer(BASES[name](), **GATES[gate]), torch.randn(2, 3, 64)
    for dtype, is_on in ((torch.float32, False), (torch.bfloat16, True)):
        if "bits" not in name:
            layer.base_layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            expected = layer(x.to(dtype))
            assert not torch.equal(expected, layer.base_layer(x.to(dtype)))
            with for_inference(layer):
                assert all(torch.equal(y, expected) for y in calls(layer, x.to(dtype)))


def test_calls_with_gradient_are_those_of_training():
    model = adapted()
    with for_inference(model):
        logits(model)
        model(input_ids=IDS).logits.sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters() if weight.requires_grad)
