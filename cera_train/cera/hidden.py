"""h = dropout(gate(z)), the element-wise part of a branch: torch's operations, or on CUDA a Triton kernel each way.

torch's, unless a training run had `choose_kernels` measure that the kernels are faster: importing this chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from .branch import seeded_dropout
from .config import CeraConfig

GATES = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "identity": nn.Identity}

Hidden = Callable[[torch.Tensor, nn.Module, float, int], torch.Tensor]

TOKENS, REPEATS = 4096, 60
"""Of the measurement: a micro-batch as it is by default, so many times."""

_fused: Hidden | None = None
"""`kernels.hidden`, where it was chosen."""


def hidden(z: torch.Tensor, gate: nn.Module, p: float, seed: int) -> torch.Tensor:
    """dropout(gate(z)) with a share p dropped, as the seed says: [N, r] -> [N, r]."""
    if _fused is not None and z.is_cuda and z.dtype.itemsize <= 4 and z.numel() < 2**31:
        return _fused(z, gate, p, seed)
    return hidden_by_torch(z, gate, p, seed)


def hidden_by_torch(z: torch.Tensor, gate: nn.Module, p: float, seed: int) -> torch.Tensor:
    """The same by torch's operations, of any dtype on any device."""
    return seeded_dropout(gate(z), p, seed) if p else gate(z)


def choose_kernels(device: torch.device, config: CeraConfig, is_compiled: bool = False) -> str:
    """Takes the Triton kernels from now on if, for this adapter on this device, they are right and clearly faster.

    It changes which units dropout drops, as the size of a micro-batch does, since the kernels have a generator of their
    own: a run that goes on where the other choice is made draws other masks from there. Each process chooses for its
    own device; the first time on a machine, the kernels are compiled, which takes seconds.

    Args:
        config: the gate, r and dropout that are measured.
        is_compiled: torch.compile makes kernels of the branch itself.

    Returns:
        What was chosen and why, such as "Triton kernels (0.08 ms, torch 0.21)" or "no Triton kernels on a CPU".
    """
    global _fused
    _fused = None
    if device.type != "cuda":
        return f"no Triton kernels on a {device.type.upper()}"
    if is_compiled:
        return "no Triton kernels beside compiled layers"
    try:
        from . import kernels

        gate, p = GATES[config.activation](), config.dropout
        # No random numbers: they are the run's own.
        z = torch.linspace(-4, 4, TOKENS * config.r, device=device).bfloat16().view(TOKENS, config.r)
        pairs = zip(_both_ways(kernels.hidden, z, gate, 0.0), _both_ways(hidden_by_torch, z, gate, 0.0), strict=True)
        if not all(torch.allclose(one, other, rtol=2e-2, atol=1e-3) for one, other in pairs):
            return "no Triton kernels (they differ from torch's formula here)"
        fused, by_torch = (_milliseconds(one, z, gate, p) for one in (kernels.hidden, hidden_by_torch))
    except ModuleNotFoundError as error:
        return f"no Triton kernels ({error.name} is not installed)"
    except Exception as error:  # no compiler for the launcher, a GPU that is too old, ...: training goes on without
        reason = (str(error).splitlines() or [""])[0]
        return f"no Triton kernels ({type(error).__name__}: {reason})"
    if not is_faster(fused, by_torch):
        return f"no Triton kernels ({median(fused):.3f} ms, torch {median(by_torch):.3f})"
    _fused = kernels.hidden
    return f"Triton kernels ({median(fused):.3f} ms, torch {median(by_torch):.3f})"


def is_faster(times: list[float], than: list[float]) -> bool:
    """By a tenth at least, so that a run that is started again chooses the same."""
    return median(times) < 0.9 * median(than)


def _both_ways(hidden: Hidden, z: torch.Tensor, gate: nn.Module, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """h and dL/dz for some dL/dh, as a branch's backward pass needs them."""
    z = z.detach().requires_grad_()
    h = hidden(z, gate, p, 1)
    (of_z,) = torch.autograd.grad(h, z, z.detach())
    return h.detach(), of_z


def _milliseconds(hidden: Hidden, z: torch.Tensor, gate: nn.Module, p: float) -> list[float]:
    """Of each repeat, launches included: of tensors as narrow as these they are the larger part."""
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _both_ways(hidden, z, gate, p)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times[REPEATS // 3 :]  # the first ones compile and warm up
