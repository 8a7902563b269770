"""h = dropout(gate(z)) as one Triton kernel, and dL/dz = dL/dh mask gate'(z) / (1 - p) as another.

Both draw the mask by Philox, from the seed and an element's place, so it is never stored. Both compute in float32,
whatever the tensors hold. Only `hidden` imports this, where Triton was chosen: torch's CPU builds come without triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import FunctionCtx

BLOCK = 1024
"""Elements that one program of the grid computes."""


def hidden(z: torch.Tensor, gate: nn.Module, p: float, seed: int) -> torch.Tensor:
    """dropout(gate(z)), of z's shape and dtype.

    Args:
        z: of 16 or 32 bits, fewer than 2^31 elements.
        gate: nn.SiLU, nn.ReLU, nn.GELU (by erf) or nn.Identity.
        p: the share of units to drop.
        seed: the mask follows from it.
    """
    return _Hidden.apply(z, type(gate).__name__, p, seed)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: torch.Tensor, gate: str, p: float, seed: int) -> torch.Tensor:
        z = z.contiguous()
        ctx.save_for_backward(z)
        ctx.settings = gate, p, seed
        h = torch.empty_like(z)
        _launch(_forward, z, h, gate=gate, p=p, seed=seed)
        return h

    @staticmethod
    def backward(ctx: FunctionCtx, grad_h: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True. `once_differentiable` notices only a grad_h with a graph
            raise RuntimeError("CeRA's Triton kernels have first derivatives only: set the layers' kernels to 'torch'.")
        (z,) = ctx.saved_tensors
        gate, p, seed = ctx.settings
        grad_z = torch.empty_like(z)
        _launch(_backward, z, grad_h.contiguous(), grad_z, gate=gate, p=p, seed=seed)
        return grad_z, None, None, None


def _launch(kernel: triton.JITFunction, *tensors: torch.Tensor, gate: str, p: float, seed: int) -> None:
    """Runs a kernel over tensors of one size. It writes the last of them."""
    count = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, seed, p=p, GATE=gate, BLOCK=BLOCK)


# Without `do_not_specialize`, a seed that 16 divides would have the kernel compiled once more.
@triton.jit(do_not_specialize=["seed"])
def _forward(z_ptr, h_ptr, count, seed, p: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    z = tl.load(z_ptr + places, mask=is_inside).to(tl.float32)
    h, _ = _gate(z, GATE)
    tl.store(h_ptr + places, h * _kept(seed, places, p), mask=is_inside)


@triton.jit(do_not_specialize=["seed"])
def _backward(z_ptr, grad_h_ptr, grad_z_ptr, count, seed, p: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    z = tl.load(z_ptr + places, mask=is_inside).to(tl.float32)
    grad_h = tl.load(grad_h_ptr + places, mask=is_inside).to(tl.float32)
    _, slope = _gate(z, GATE)
    tl.store(grad_z_ptr + places, grad_h * _kept(seed, places, p) * slope, mask=is_inside)


@triton.jit
def _gate(z, GATE: tl.constexpr):
    """gate(z) and gate'(z). The compiler removes the one that is not used."""
    if GATE == "SiLU":
        sigma = tl.sigmoid(z)
        h, slope = z * sigma, sigma * (1 + z * (1 - sigma))
    elif GATE == "ReLU":
        h, slope = tl.where(z < 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)  # NaN stays NaN: the loop stops on it
    elif GATE == "GELU":  # Phi and phi of the normal distribution: 1 / sqrt(2) = 0.7071..., 1 / sqrt(2 pi) = 0.3989...
        Phi, phi = 0.5 * (1 + tl.erf(z * 0.7071067811865476)), 0.3989422804014327 * tl.exp(-0.5 * z * z)
        h, slope = z * Phi, Phi + z * phi
    else:
        tl.static_assert(GATE == "Identity", "an unknown gate")
        h, slope = z, tl.full(z.shape, 1.0, tl.float32)
    return h, slope


@triton.jit
def _kept(seed, places, p: tl.constexpr):
    """Dropout's factor for each unit: 0, or 1 / (1 - p)."""
    factor = tl.full(places.shape, 1.0, tl.float32)
    if p > 0:
        factor = tl.where(tl.rand(seed, places) < p, 0.0, 1 / (1 - p))
    return factor
