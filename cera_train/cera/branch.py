"""The parts of a branch, and y + s B dropout(gate(A x)) as one step of autograd: the numbers of the
plain formula in less memory.

From forward to backward it keeps x, which the base's graph mostly holds anyway, and z = A x. The
gate and the dropout masks are computed again; no tensor d_out wide is allocated, since B's product
is added in place. It has no second derivative: the plain formula, which torch.func takes, has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .config import CeraConfig
from .gates import LearnedGate


def start_branch(A: torch.Tensor, B: torch.Tensor, gate: nn.Module, config: CeraConfig) -> None:
    """Draws A: [..., r, d_in], with a variance of 2 / d_in for kaiming_normal and 1 / (3 d_in) for
    kaiming_uniform, times init_scale^2. B and gamma start at zero: update 0 is the base model."""
    # The rows of all experts as one matrix: what is drawn depends on a row's length alone.
    A, B = (matrix.detach().flatten(0, -2) for matrix in (A, B))
    if config.init == "kaiming_normal":
        nn.init.kaiming_normal_(A, nonlinearity="relu")
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if config.init_scale != 1:
        A.mul_(config.init_scale)

    gammas = [gate.gamma] if isinstance(gate, LearnedGate) else []
    if config.init_weights:
        for weight in (B, *gammas):
            nn.init.zeros_(weight)
    else:
        nn.init.kaiming_normal_(B, nonlinearity="linear")
        for gamma in gammas:
            nn.init.normal_(gamma)


# --- dropout --------------------------------------------------------------------------------------

BITS = 2**16


def seeded_dropout(h: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Dropout whose mask follows from the seed: computed again in backward instead of kept.

    A unit is dropped where 16 random bits, as a number, are below p: one draw of 64 bits serves
    four units, where `nn.Dropout` on a CPU draws for each. p, and with it the scale of the kept
    units, is rounded to 1/65,536.
    """
    if not p:
        return h
    dropped = min(round(p * BITS), BITS - 1)
    generator = None  # the meta device has none
    if not h.is_meta:
        generator = torch.Generator(h.device).manual_seed(seed)
    draws = math.ceil(h.numel() / 4)
    bits = torch.empty(draws, dtype=torch.int64, device=h.device)
    bits.random_(-(2**63), None, generator=generator)
    is_kept = bits.view(torch.int16)[: h.numel()].view_as(h) >= dropped - BITS // 2
    # The mask first: as a 16-bit tensor, the factor would be rounded before it multiplies.
    return (h * is_kept).mul_(BITS / (BITS - dropped))


# --- the branch -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden:
    """The gate and the dropout of one call, whose masks backward draws again."""

    gate: nn.Module
    p: float  # probability of dropping a hidden unit
    p_x: float  # probability of dropping an element of x
    seed: int

    @classmethod
    def of_call(cls, gate: nn.Module, dropout_x: nn.Dropout, dropout: nn.Dropout) -> Hidden:
        """For a new call, with new masks."""
        p_x, p = (part.p if part.training else 0.0 for part in (dropout_x, dropout))
        # The CPU's generator draws the seed: reading a GPU's would wait for the GPU.
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if p_x or p else 0
        return cls(gate, p, p_x, seed)

    def drop_x(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x, or its gradient, by the mask: [..., d_in] -> [N, d_in]."""
        return seeded_dropout(_rows(x), self.p_x, self.seed)

    def __call__(self, z: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """dropout(gate(z)), [N, r] -> [N, r]."""
        return seeded_dropout(self.gate(z, *parameters), self.p, self.seed)


@dataclass(frozen=True)
class FusedBranch:
    """s B dropout(gate(A x)), to be added to a projection's output in one step."""

    A: torch.Tensor  # [r, d_in]
    B: torch.Tensor  # [d_out, r]
    scaling: float
    hidden: Hidden
    overwrites: bool  # whether the sum takes the output's memory

    def add_to(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """result + s B dropout(gate(A x)).

        Args:
            result: [..., d_out], contiguous, of the dtype of A and B.
            x: [..., d_in].
        """
        if not self.overwrites:
            result = result.clone()
        x = x.to(result.dtype)
        hidden = self.hidden
        if torch.is_grad_enabled():
            parameters = hidden.gate.parameters()
            return _AddBranch.apply(result, x, self.A, self.B, self.scaling, hidden, *parameters)
        h = hidden(hidden.drop_x(x) @ self.A.T)
        result.view(-1, len(self.B)).addmm_(h, self.B.T, alpha=self.scaling)  # result += s h B^T
        return result


class _AddBranch(torch.autograd.Function):
    """`FusedBranch.add_to`, where gradients are wanted."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        result: torch.Tensor,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        hidden: Hidden,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        z = hidden.drop_x(x) @ A.T
        result.view(-1, len(B)).addmm_(hidden(z, *parameters), B.T, alpha=scaling)
        ctx.save_for_backward(x, z, A, B, *parameters)
        ctx.scaling = scaling
        ctx.hidden = hidden
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, A, B, *parameters = ctx.saved_tensors
        hidden = ctx.hidden
        with torch.enable_grad():
            z, *parameters = (value.detach().requires_grad_() for value in (z, *parameters))
            h = hidden(z, *parameters)
        grad_branch = _rows(grad_output)
        grad_h = (grad_branch @ B) * ctx.scaling
        grad_z, *grad_parameters = torch.autograd.grad(h, (z, *parameters), grad_h)
        grad_x = hidden.drop_x(grad_z @ A).view_as(x) if ctx.needs_input_grad[1] else None
        grad_A = grad_z.T @ hidden.drop_x(x) if ctx.needs_input_grad[2] else None
        grad_B = grad_branch.T @ (h * ctx.scaling) if ctx.needs_input_grad[3] else None
        return grad_output, grad_x, grad_A, grad_B, None, None, *grad_parameters


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] -> [N, d]."""
    return x.reshape(-1, x.shape[-1])
