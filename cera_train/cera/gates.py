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


class InputGate(nn.Module):
    """u sigmoid(v), where A has 2 r rows and A x = (u, v): each hidden unit has a gate of its own,
    computed from x. v starts at zero, and u / 2 is silu's linear part; silu is v = u."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        u, v = z.chunk(2, -1)
        return u * torch.sigmoid(v)


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


class AnnealedGate(nn.Module):
    """In training, dropout(z + gamma (2 gate(z) - z)) for branches at half of CeRA's scale, for a
    gate that is z / 2 + an even term; otherwise z."""

    def __init__(self, gate: nn.Module, dropout: float) -> None:
        super().__init__()
        self.gate = gate
        self.dropout = nn.Dropout(dropout)
        # A tensor, so that a compiled layer sees it change; nothing saves it.
        self.register_buffer("gamma", torch.ones(()), persistent=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.dropout(z + self.gamma * (2 * self.gate(z) - z))

    def in_training(self, A: nn.Module, _: tuple[torch.Tensor], z: torch.Tensor) -> torch.Tensor:
        """As a forward hook of A."""
        return self(z) if A.training else z


GATED = "gated"


def make_gate(name: str) -> nn.Module:
    return InputGate() if name == GATED else GATES[name]()
