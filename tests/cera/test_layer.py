"""One CeRA layer against its equation, written out by hand, on every kind of base layer that needs no loading."""

from __future__ import annotations

import math

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cera_train.cera import CeraConfig, CeraLayer

pytestmark = pytest.mark.filterwarnings("error")

GATES = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "relu": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "identity": lambda z: z,
}


def make_layer(base: nn.Module | None = None, name: str = "default", **settings) -> CeraLayer:
    """A layer with random A and B over a float64 linear of 6 inputs and 5 outputs."""
    base = nn.Linear(6, 5, dtype=torch.float64) if base is None else base
    return CeraLayer(base.requires_grad_(False), name, CeraConfig(**{"r": 3, "init_weights": False} | settings))


def weights(layer: CeraLayer, name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    return layer.cera_A[name].weight, layer.cera_B[name].weight


def x_of(rows: int = 4, d_in: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, 7, d_in, dtype=dtype)


# --- the equation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (12, 4.0), (1.5, 0.5)])
@pytest.mark.parametrize("activation", GATES)
def test_output_and_gradients_equal_the_equation(activation, alpha, scale):
    layer = make_layer(activation=activation, alpha=alpha, dropout=0.0).train()
    x = x_of().requires_grad_()
    A, B = weights(layer)

    y = layer(x)
    expected = (
        x @ layer.base_layer.weight.T + layer.base_layer.bias + scale * GATES[activation](x @ A.T) @ B.T
    )  # y = W0 x + s B gate(A x)

    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, A, B], upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, A, B], upstream))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_over_8_bits_and_a_bias_the_output_may_be_a_view_that_autograd_lets_nobody_write_to():
    base = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    base.load_state_dict(nn.Linear(64, 32).state_dict())
    layer = make_layer(base.to("cpu"), r=4, dropout=0.0).train()
    x = x_of(d_in=64, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert base(x)._is_view()
        y = layer(x)
        expected = base(x) + layer.branch(x, "default")
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    upstream, leaves = torch.randn_like(y), [x, *weights(layer)]
    for one, other in zip(*(torch.autograd.grad(value, leaves, upstream) for value in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("matrix", ["cera_A", "cera_B"])
def test_a_matrix_that_is_there_only_while_it_is_called_is_called(matrix):
    """As FSDP1, ZeRO-3 and offloading bring it."""
    layer, x = make_layer(dropout=0.0), x_of()
    expected = layer(x)
    linear = getattr(layer, matrix)["default"]
    weight = linear.weight.detach().clone()
    nn.init.zeros_(linear.weight)

    def bring(module: nn.Linear, _) -> None:
        module.weight.data.copy_(weight)

    linear.register_forward_pre_hook(bring)
    torch.testing.assert_close(layer(x), expected)


# --- number formats --------------------------------------------------------------------------------------------------


def test_under_autocast_the_branch_takes_and_gives_16_bits():
    layer, seen = make_layer(nn.Linear(6, 5, dtype=torch.bfloat16)), []
    layer.cera_gate["default"].register_forward_hook(
        lambda module, args, output: seen.append((args[0].dtype, output.dtype))
    )
    x = x_of(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    layer(x)
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]


# --- base layers -----------------------------------------------------------------------------------------------------


def test_over_conv1d_equals_over_the_linear_of_its_transpose():
    conv = Conv1D(5, 6)  # outputs first
    linear = nn.Linear(6, 5)
    linear.load_state_dict({"weight": conv.weight.T, "bias": torch.randn(5)})
    conv.load_state_dict({"weight": conv.weight, "bias": linear.bias})
    over_conv, over_linear = make_layer(conv).eval(), make_layer(linear).eval()
    assert (over_conv.in_features, over_conv.out_features) == (6, 5)
    over_linear.load_state_dict(over_linear.state_dict() | dict(cera_tensors(over_conv)))
    x = x_of(dtype=torch.float32)
    torch.testing.assert_close(over_conv(x), over_linear(x))


def cera_tensors(layer: CeraLayer) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in layer.state_dict().items() if key.startswith("cera_")]


@pytest.mark.parametrize(
    "base",
    [nn.Embedding(9, 6), nn.Conv1d(6, 5, 1), nn.Conv2d(6, 5, 1), nn.LayerNorm(6), nn.MultiheadAttention(6, 2)],
    ids=lambda base: type(base).__name__,
)
def test_what_is_no_linear_projection_is_refused_by_name(base):
    with pytest.raises(TypeError, match=rf"linear projections .*not {type(base).__name__}\."):
        make_layer(base)


def test_a_projection_whose_weight_is_read_past_it_is_refused():
    attention = nn.MultiheadAttention(6, 2)
    assert isinstance(attention.out_proj, nn.Linear)
    with pytest.raises(TypeError, match="MultiheadAttention reads this weight"):
        make_layer(attention.out_proj)


# --- the rest --------------------------------------------------------------------------------------------------------
