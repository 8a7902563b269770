"""The gate, and the one that learns its share: h = z + gamma (gate(z) - z)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .config import CeraConfig
from .hidden import GATES


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

    def reset_parameters(self, config: CeraConfig) -> None:
        nn.init.zeros_(self.gamma) if config.init_weights else nn.init.normal_(self.gamma)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.gamma.to(z.dtype) * (self.gate(z) - z)


def with_parameters(gate: nn.Module, parameters: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gate as a function of z alone that computes with these in place of its parameters."""
    if not parameters:
        return gate
    names = (name for name, _ in gate.named_parameters())
    return functools.partial(torch.func.functional_call, gate, dict(zip(names, parameters, strict=True)))


def draw_matrix(weight: torch.Tensor, init: str) -> None:
    """Draws a matrix [r, d]: kaiming_normal has a variance of 2 / d; kaiming_uniform, PEFT's for LoRA, 1 / (3 d)."""
    if init == "kaiming_normal":
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
