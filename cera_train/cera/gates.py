"""The gates between A and B."""

import torch
from torch import nn

GATES = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
"""The gates between A and B by name. `identity` makes the branch linear: LoRA with its dropout
moved."""


class LearnedGate(nn.Module):
    """z + gamma (gate(z) - z). gamma starts at zero: at the start the branch is linear."""

    def __init__(self, gate: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = gate
        # One element and no scalar: FSDP shards by dimension 0.
        self.gamma = nn.Parameter(torch.empty(1, dtype=dtype))

    def forward(self, z: torch.Tensor, gamma: torch.Tensor | None = None) -> torch.Tensor:
        gamma = self.gamma if gamma is None else gamma
        return z + gamma.to(z.dtype) * (self.gate(z) - z)
