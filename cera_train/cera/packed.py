"""Frozen projections in the layout of oneDNN's products: in 16 bits on a CPU, torch otherwise
rearranges the whole weight at every call, which takes longer than multiplying a few rows by it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

SHARE_OF_MEMORY = 0.5
"""Packed copies take at most this share of the memory that is available."""


class PackedLinear(nn.Linear):
    """A linear projection with a second copy of its weight, for calls without gradient."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or input.dtype != self.packed.dtype:
            return super().forward(input)
        # inductor's operations: oneDNN's product has no public one.
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


@contextmanager
def pack_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Packs the linear projections among these modules, where that is faster and there is memory
    for it. Their weights must not change inside."""
    linears = [module for module in modules if can_pack(module)]
    size = sum(linear.weight.nbytes for linear in linears)
    if size > SHARE_OF_MEMORY * psutil.virtual_memory().available:
        linears = []
    try:
        for linear in linears:
            # The number of rows that the layout suits best; others are as exact.
            linear.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 64)
            linear.__class__ = PackedLinear
        yield
    finally:
        for linear in linears:
            if type(linear) is PackedLinear:
                linear.__class__ = nn.Linear
                del linear.packed


def can_pack(module: nn.Module) -> bool:
    """Whether a module is a linear projection in bfloat16 on a CPU that multiplies it."""
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter  # not sharded, nor quantised
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
