"""Weights in the layout of oneDNN's products: in 16 bits on a CPU, torch otherwise rearranges the
whole weight at every call, which takes longer than multiplying a few rows by it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

SHARE_OF_MEMORY = 0.5
"""Packed copies take at most this share of the memory that is available."""


# inductor's operations: oneDNN's product has no public one


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A packed copy of a weight, [d_out, d_in]."""
    # The number of rows that the layout suits best; others are as exact.
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias, of a packed weight: [..., d_in] -> [..., d_out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def add_product(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """result + x W^T, of a packed weight, rounded once."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, result, weight, None, "add")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight is one of bfloat16 on a CPU that multiplies it."""
    return (
        type(weight) in (torch.Tensor, nn.Parameter)  # not sharded, nor quantised
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Linear):
    """A linear projection with a second copy of its weight, for calls without gradient."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or input.dtype != self.packed.dtype:
            return super().forward(input)
        return product(input, self.packed, self.bias)


@contextmanager
def pack_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Packs the linear projections among these modules, where that is faster and there is memory
    for it. Their weights must not change inside."""
    linears = [
        module for module in modules if type(module) is nn.Linear and can_pack(module.weight)
    ]
    size = sum(linear.weight.nbytes for linear in linears)
    if size > SHARE_OF_MEMORY * psutil.virtual_memory().available:
        linears = []
    try:
        for linear in linears:
            linear.packed = packed(linear.weight.detach())
            linear.__class__ = PackedLinear
        yield
    finally:
        for linear in linears:
            if type(linear) is PackedLinear:
                linear.__class__ = nn.Linear
                del linear.packed
