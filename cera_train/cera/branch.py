"""y + s B hidden(A drop(x)) as one step of autograd: the numbers of the plain formula, less memory.

From forward to backward it keeps x, which the base's graph mostly holds anyway, and z = A drop(x). The gate and the
dropout masks are computed again; no tensor d_out wide is allocated, since B's product is added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import FunctionCtx


def add_branch(
    result: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    hidden: Callable[..., torch.Tensor],
    parameters: Sequence[torch.Tensor] = (),
    drop: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """result + s B hidden(A drop(x)), written into `result`.

    Args:
        result: [..., d_out], contiguous, of x's dtype.
        x: [..., d_in].
        A: [r, d_in]. B: [d_out, r].
        hidden: gate and dropout, ([N, r], *parameters) -> [N, r]; the same input gives the same output at every call.
        parameters: the gate's, which get gradients.
        drop: multiplies [N, d_in] by a mask, the same at every call.
    """
    if torch.is_grad_enabled():
        return _AddBranch.apply(result, x, A, B, scaling, hidden, drop, *parameters)
    z = drop(_rows(x)) @ A.T
    result.view(-1, len(B)).addmm_(hidden(z, *parameters), B.T, alpha=scaling)  # result += s hidden(z) B^T
    return result


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        result: torch.Tensor,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        hidden: Callable[..., torch.Tensor],
        drop: Callable[[torch.Tensor], torch.Tensor],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        z = drop(_rows(x)) @ A.T
        result.view(-1, len(B)).addmm_(hidden(z, *parameters), B.T, alpha=scaling)
        ctx.save_for_backward(x, z, A, B, *parameters)
        ctx.scaling, ctx.hidden, ctx.drop = scaling, hidden, drop
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, A, B, *parameters = ctx.saved_tensors
        is_differentiated = torch.is_grad_enabled()  # create_graph=True: this gradient is differentiated once more
        if is_differentiated:
            z = ctx.drop(_rows(x)) @ A.T  # the saved one has no graph
        with torch.enable_grad():
            z, *parameters = (_leaf(value, is_differentiated) for value in (z, *parameters))
            h = ctx.hidden(z, *parameters)
        grad_branch = _rows(grad_output)
        grad_h = (grad_branch @ B) * ctx.scaling
        grad_z, *grad_parameters = torch.autograd.grad(h, (z, *parameters), grad_h, create_graph=is_differentiated)
        # A mask multiplies the gradient of x as it multiplied x.
        grad_x = ctx.drop(grad_z @ A).view_as(x) if ctx.needs_input_grad[1] else None
        grad_A = grad_z.T @ ctx.drop(_rows(x)) if ctx.needs_input_grad[2] else None
        grad_B = grad_branch.T @ (h * ctx.scaling) if ctx.needs_input_grad[3] else None
        return grad_output, grad_x, grad_A, grad_B, None, None, None, *grad_parameters


def _leaf(value: torch.Tensor, has_graph: bool) -> torch.Tensor:
    """`value` to differentiate by: with its graph, or as a leaf."""
    return value if has_graph and value.requires_grad else value.detach().requires_grad_()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] -> [N, d]."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class PreparedBranch:
    """x -> s B hidden(A x), with weights that are cast once and reused across calls."""

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


def seeded_dropout(h: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Dropout whose mask follows from the seed: computed again in backward instead of kept.

    A hidden unit is dropped where 16 random bits, as a number, are below p: one draw of 64 bits serves four units,
    where `nn.Dropout` on a CPU draws for each. p, and with it the scale of the kept units, is rounded to 1/65,536.
    """
    dropped = min(round(p * BITS), BITS - 1)
    generator = None if h.is_meta else torch.Generator(h.device).manual_seed(seed)  # meta has none
    bits = torch.empty(-(-h.numel() // 4), dtype=torch.int64, device=h.device).random_(
        -(2**63), None, generator=generator
    )
    is_kept = bits.view(torch.int16)[: h.numel()].view_as(h) >= dropped - BITS // 2
    return (h * is_kept).mul_(BITS / (BITS - dropped))  # in 16 bits, the factor alone would be rounded too


BITS = 2**16
