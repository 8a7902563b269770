"""The gates that have parameters: h = z + gamma (gate(z) - z), and r x r residual steps before it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

from .config import CeraConfig
from .hidden import GATES


def make_gate(config: CeraConfig, dtype: torch.dtype) -> nn.Module:
    """The gate of one projection, [..., r] -> [..., r]."""
    return LearnedGate(config, dtype) if config.has_learned_gate else GATES[config.activation]()


class LearnedGate(nn.Module):
    """n steps z <- z + W_out silu(W_in rms_norm(z)) / n, then h = z + gamma (gate(z) - z).

    W_out and gamma start at zero: at the start there are no steps, and the branch is linear. Without `mix=learned`,
    h = gate(z).
    """

    def __init__(self, config: CeraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = GATES[config.activation]()
        self.steps = config.recurrent_steps
        self.gamma = self.W_in = self.W_out = None
        if config.mix == "learned":
            self.gamma = nn.Parameter(torch.empty(1, dtype=dtype))  # not a scalar: FSDP shards by dimension 0
        if self.steps:
            self.W_in = nn.Parameter(torch.empty(config.r, config.r, dtype=dtype))
            self.W_out = nn.Parameter(torch.empty(config.r, config.r, dtype=dtype))

    def reset_parameters(self, config: CeraConfig) -> None:
        """Draws W_in as A is drawn; gamma and W_out start at zero, unless `init_weights=False`."""
        if self.gamma is not None:
            nn.init.zeros_(self.gamma) if config.init_weights else nn.init.normal_(self.gamma)
        if self.steps:
            draw_matrix(self.W_in, config.init)
            nn.init.zeros_(self.W_out) if config.init_weights else draw_matrix(self.W_out, config.init)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            inner = silu(linear(rms_norm(z, z.shape[-1:]), self.W_in.to(z.dtype)))
            z = z + linear(inner, self.W_out.to(z.dtype)) / self.steps
        return self.gate(z) if self.gamma is None else z + self.gamma.to(z.dtype) * (self.gate(z) - z)


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
