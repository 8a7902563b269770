"""The gate, and h = dropout(gate(z)): torch's operations, or on CUDA a Triton kernel each way.

The two draw different dropout masks, so which one computes is a setting with a value (`choose_kernels`), never the
outcome of a measurement. Where `fits_one_kernel`, Triton computes the products beside it in the same kernel (`fused`),
with the same masks.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from .branch import seeded_dropout
from .config import CeraConfig

GATES = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "identity": nn.Identity}
"""The module of every name in `config.ACTIVATIONS`."""

Gate = Callable[[torch.Tensor], torch.Tensor]


def make_gate(config: CeraConfig, dtype: torch.dtype) -> nn.Module:
    """The gate of one projection, [..., r] -> [..., r]."""
    gate = GATES[config.activation]()
    return LearnedGate(gate, dtype) if config.mix == "learned" else gate


class LearnedGate(nn.Module):
    """z + gamma (gate(z) - z). gamma starts at zero: at the start the branch is linear."""

    def __init__(self, gate: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = gate
        self.gamma = nn.Parameter(torch.empty(1, dtype=dtype))  # not a scalar: FSDP shards by dimension 0

    def forward(self, z: torch.Tensor, gamma: torch.Tensor | None = None) -> torch.Tensor:
        gamma = self.gamma if gamma is None else gamma
        return z + gamma.to(z.dtype) * (self.gate(z) - z)


def start_branch(A: torch.Tensor, B: torch.Tensor, gate: nn.Module, config: CeraConfig) -> None:
    """Draws A: [r, d_in], with a variance of 2 / d_in for kaiming_normal and 1 / (3 d_in) for kaiming_uniform. B and
    gamma start at zero, so update 0 is the base model."""
    if config.init == "kaiming_normal":
        nn.init.kaiming_normal_(A, nonlinearity="relu")
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B) if config.init_weights else nn.init.kaiming_normal_(B, nonlinearity="linear")
    if isinstance(gate, LearnedGate):
        nn.init.zeros_(gate.gamma) if config.init_weights else nn.init.normal_(gate.gamma)


def hidden(z: torch.Tensor, gate: Gate, p: float, seed: int, kernels: str = "torch") -> torch.Tensor:
    """dropout(gate(z)), [N, r] -> [N, r]. A share p is dropped, and the mask follows from the seed.

    Args:
        kernels: torch or triton. Triton falls back to torch for a tensor it cannot take: one on a CPU, of 64 bits, or
            of 2^31 elements and more; and for a gate that is none of `GATES`.
    """
    if kernels == "triton" and fits_triton(z, z.numel(), gate):
        from . import kernels as triton_kernels

        return triton_kernels.hidden(z, gate, p, seed)
    return hidden_by_torch(z, gate, p, seed)


def hidden_by_torch(z: torch.Tensor, gate: Gate, p: float, seed: int) -> torch.Tensor:
    """The same by torch's operations, for any dtype on any device."""
    return seeded_dropout(gate(z), p, seed) if p else gate(z)


def fits_triton(like: torch.Tensor, units: int, gate: Gate) -> bool:
    """Whether Triton can compute the gate and dropout of so many units, in a tensor's dtype and on its device."""
    return like.is_cuda and like.dtype.itemsize <= 4 and units < 2**31 and type(gate) in GATES.values()


def fits_one_kernel(x: torch.Tensor, r: int, gate: Gate) -> bool:
    """Whether one Triton kernel each way can compute the whole branch of x: [..., d_in]."""
    if not fits_triton(x, x.numel() // max(1, x.shape[-1]) * r, gate):
        return False
    from .fused import largest_r

    return r <= largest_r(x.device)


def choose_kernels(wanted: str, device: torch.device, is_compiled: bool = False) -> str:
    """torch or triton. One machine always chooses the same.

    Args:
        wanted: auto, torch or triton. auto is triton on CUDA where Triton can build its kernels, else torch.
        is_compiled: torch.compile fuses gate and dropout itself, and never calls these kernels.

    Raises:
        ValueError: triton is wanted and cannot run here.
    """
    if wanted == "torch":
        return wanted
    reason = _why_not_triton(device, is_compiled)
    if wanted == "triton" and reason is not None:
        raise ValueError(reason)
    return "triton" if reason is None else "torch"


def _why_not_triton(device: torch.device, is_compiled: bool) -> str | None:
    """What keeps Triton's kernels from running here; None where nothing does."""
    if device.type != "cuda":
        return f"Triton kernels need a GPU, and this is {device.type}"
    if is_compiled:
        return "compiled layers never call Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "the Python package triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "Triton needs a C compiler, such as gcc, for the launcher of a kernel"
    return None
