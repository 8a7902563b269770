"""The LoRA nearest to a CeRA adapter.

The hidden units h = gate(z) of a branch are replaced by their best linear map of z = A x on calibration rows, h ~ M z
with M = E[h z^T] E[z z^T]^-1. What is left is a LoRA, B' = s B M.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from cera_train.adapters.build import cera_layers
from cera_train.adapters.families.base import ADAPTER


class LinearGate(nn.Module):
    """M z in place of a gate, with the M that fits the first rows that come.

    Args:
        is_token: [N], marks the rows that are no padding.
    """

    def __init__(self, gate: nn.Module, is_token: torch.Tensor) -> None:
        super().__init__()
        self.gate, self.is_token = gate, is_token
        self.M: torch.Tensor | None = None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.M is None:
            self.M = fit(*(rows.flatten(0, -2)[self.is_token] for rows in (z, self.gate(z))))
        return z @ self.M.T.to(z)


def fit(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """M of the linear map of z that is nearest to h, by least squares over the rows, [N, r] both."""
    z, h = z.double(), h.double()
    return h.T @ z @ torch.linalg.pinv(z.T @ z, hermitian=True)


@torch.no_grad()
def fit_all(model: nn.Module, forward: Callable[[], object], is_token: torch.Tensor) -> dict[str, torch.Tensor]:
    """M of every branch, from one pass over the calibration rows: each is fitted to the inputs that the maps below give
    it. The model is left as it was.

    Args:
        forward: runs the model on the calibration rows, as one batch.
        is_token: marks the positions of the batch that are no padding.
    """
    layers = cera_layers(model)
    fitted = {name: LinearGate(layer.cera_gate[ADAPTER], is_token) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.cera_gate[ADAPTER] = fitted[name]
        forward()
    finally:
        for name, layer in layers.items():
            layer.cera_gate[ADAPTER] = fitted[name].gate
    return {name: gate.M for name, gate in fitted.items()}


def write_lora(model: nn.Module, maps: dict[str, torch.Tensor], base: str, folder: Path) -> None:
    """Writes the LoRA in PEFT's format.

    Args:
        base: the base model that its config names: a Hub id or a folder.
    """
    tensors, layers = {}, cera_layers(model)
    for name, layer in layers.items():
        A, B = layer.cera_A[ADAPTER].weight, layer.cera_B[ADAPTER].weight
        place = f"base_model.model.{name}"
        tensors[f"{place}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"{place}.lora_B.weight"] = (
            (layer.scaling[ADAPTER] * B.double() @ maps[name]).float().cpu().contiguous()
        )
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    LoraConfig(
        r=r,
        lora_alpha=r,  # a scale of 1: s is in B
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
