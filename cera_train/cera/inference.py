"""Inference on weights that stay: what one call prepares serves the next ones.

A branch of one token takes no time to compute and some to prepare: what may be fused is found out, A and B are cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@contextmanager
def for_inference(model: nn.Module) -> Iterator[None]:
    """Lets the CeRA layers of a model in eval mode keep what their calls without gradient prepare.

        with torch.no_grad(), for_inference(model):
            model.generate(**inputs)

    Adapters may be switched inside. Their weights may not change, nor may what autocast casts to. The results are the
    same to the bit, or up to rounding where one Triton kernel computes a branch outside. Every active adapter takes its
    weights' memory once more in the precision that it computes in.
    """
    from .layer import CeraLayer  # which imports this module

    layers = [layer for layer in model.modules() if isinstance(layer, CeraLayer)]
    for layer in layers:
        layer.prepared = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.prepared = None


@dataclass(frozen=True)
class PreparedBranch:
    """x -> s B hidden(A x), of which nothing is left to find out but whether it fits."""

    A_T: torch.Tensor
    """[d_in, r]."""
    B_T: torch.Tensor
    """[r, d_out], of A's dtype."""
    scaling: float
    hidden: Callable[[torch.Tensor], torch.Tensor]
    """The gate, [N, r] -> [N, r]."""
    may_write: bool
    """Nobody else holds the base layer's output."""

    @classmethod
    def of(cls, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype, *more: Any) -> PreparedBranch:
        """Copies the matrices: sharded ones are whole only during the call."""
        A_T, B_T = (matrix.detach().to(dtype, copy=True).T for matrix in (A, B))
        return cls(A_T, B_T, *more)

    def fits(self, result: torch.Tensor) -> bool:
        """Whether the branch may be added in place, in its precision and without gradient."""
        return not torch.is_grad_enabled() and result.dtype == self.B_T.dtype and result.is_contiguous()

    def add_to(self, result: torch.Tensor, x: torch.Tensor, is_ours: bool) -> torch.Tensor:
        """result + the branch of x, written into `result` where it is ours, or nobody else's."""
        if not (is_ours or self.may_write):
            result = result.clone()
        d_in, d_out = self.A_T.shape[0], self.B_T.shape[1]
        h = self.hidden(x.to(self.A_T.dtype).reshape(-1, d_in) @ self.A_T)
        result.view(-1, d_out).addmm_(h, self.B_T, alpha=self.scaling)
        return result
