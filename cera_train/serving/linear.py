"""The LoRA nearest to a CeRA adapter.

The hidden units h = gate(z) of a branch are replaced by their best affine map of z = A x on calibration rows,
h ~ M z + c with M = Cov(h, z) Cov(z)^-1 and c = E h - M E z. What is left is a LoRA, B' = s B M, with a bias s B c.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from cera_train.adapters.families.base import ADAPTER
from cera_train.cera import CeraLayer


class AffineGate(nn.Module):
    """M z + c in place of a gate."""

    def __init__(self, M: torch.Tensor, c: torch.Tensor) -> None:
        super().__init__()
        self.M, self.c = M, c

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.M.T.to(z) + self.c.to(z)


class FittedGate(nn.Module):
    """A gate that fits its affine map to the first rows it gets.

    Args:
        gate: what is fitted.
        is_passed_on: whether the layers above see the affine map, and so are fitted to what it gives them.
        has_bias: whether c may differ from zero.
        is_kept: [N], which rows count; None: all.
    """

    def __init__(self, gate: nn.Module, is_passed_on: bool, has_bias: bool, is_kept: torch.Tensor | None) -> None:
        super().__init__()
        self.gate, self.is_passed_on, self.has_bias, self.is_kept = gate, is_passed_on, has_bias, is_kept
        self.affine: AffineGate | None = None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.gate(z)
        if self.affine is None:
            rows = slice(None) if self.is_kept is None else self.is_kept
            self.affine = fit(z.flatten(0, -2)[rows], h.flatten(0, -2)[rows], self.has_bias)
        return self.affine(z) if self.is_passed_on else h


def fit(z: torch.Tensor, h: torch.Tensor, has_bias: bool) -> AffineGate:
    """The affine map of z that is nearest to h, by least squares over the rows, [N, r] both."""
    z, h = z.double(), h.double()
    mean_z, mean_h = (z.mean(0), h.mean(0)) if has_bias else (torch.zeros_like(z[0]), torch.zeros_like(h[0]))
    z, h = z - mean_z, h - mean_h
    M = h.T @ z @ torch.linalg.pinv(z.T @ z, hermitian=True)
    return AffineGate(M, mean_h - M @ mean_z)


def branches(model: nn.Module) -> Iterator[tuple[str, CeraLayer]]:
    """Every CeRA layer of the adapter, by its name in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, CeraLayer) and ADAPTER in module.r:
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def fit_all(
    model: nn.Module, forward: Callable[[], object], layer_by_layer: bool, has_bias: bool, is_kept: torch.Tensor | None
) -> dict[str, AffineGate]:
    """The affine map of every branch, from one forward pass over the calibration rows. The model is left as it was.

    Args:
        forward: runs the model on the calibration rows, as one batch.
        layer_by_layer: whether each is fitted to the inputs that the maps below give it, or to those of the adapter.
        is_kept: which positions of the batch are no padding.
    """
    gates = gates_of(model)
    fitted = {name: FittedGate(gate, layer_by_layer, has_bias, is_kept) for name, gate in gates.items()}
    try:
        replace_gates(model, fitted)
        forward()
    finally:
        replace_gates(model, gates)
    return {name: gate.affine for name, gate in fitted.items()}


def gates_of(model: nn.Module) -> dict[str, nn.Module]:
    """The gate of every branch, by the name of its projection."""
    return {name: layer.cera_gate[ADAPTER] for name, layer in branches(model)}


def replace_gates(model: nn.Module, gates: dict[str, nn.Module]) -> None:
    for name, layer in branches(model):
        layer.cera_gate[ADAPTER] = gates[name]


def write_lora(model: nn.Module, gates: dict[str, AffineGate], has_bias: bool, base: str, folder: Path) -> None:
    """Writes the LoRA in PEFT's format.

    Args:
        base: the base model that its config names: a Hub id or a folder.
    """
    tensors, ranks = {}, {}
    for name, layer in branches(model):
        A, B, affine = layer.cera_A[ADAPTER].weight, layer.cera_B[ADAPTER].weight.double(), gates[name]
        place, s = f"base_model.model.{name}", layer.scaling[ADAPTER]
        tensors[f"{place}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{place}.lora_B.weight"] = (s * B @ affine.M).float().contiguous()
        if has_bias:
            tensors[f"{place}.lora_B.bias"] = (s * B @ affine.c).float().contiguous()
        ranks[name] = layer.r[ADAPTER]
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    targets = sorted({name.rpartition(".")[2] for name in ranks})
    is_everywhere = all(name in ranks for name in _linear_names(model) if name.rpartition(".")[2] in targets)
    LoraConfig(
        r=r,
        lora_alpha=r,  # a scale of 1: s is in B
        lora_bias=has_bias,
        target_modules=targets if is_everywhere else sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def _linear_names(model: nn.Module) -> Iterator[str]:
    """The projections of the base model, adapted or not."""
    for name, module in model.named_modules():
        if (hasattr(module, "weight") and not name.endswith("base_layer")) or isinstance(module, CeraLayer):
            yield name.removeprefix("base_model.model.")


@contextlib.contextmanager
def explained(model: nn.Module, gates: dict[str, AffineGate]) -> Iterator[Callable[[], dict[str, float]]]:
    """Watches the branches while the model runs. What is yielded returns, for each, the share of its variance that the
    map explains: 1 - E |B (h - M z - c)|^2 / E |B (h - E h)|^2."""
    sums = {name: [0.0, 0.0, 0.0, 0] for name in gates}
    hooks = []

    def watch(name: str, layer: CeraLayer) -> Callable[..., None]:
        B = layer.cera_B[ADAPTER].weight.double()

        def hook(gate: nn.Module, args: tuple[torch.Tensor], h: torch.Tensor) -> None:
            z, h = args[0].flatten(0, -2).double(), h.flatten(0, -2).double()
            residual, output = (h - gates[name](z)) @ B.T, h @ B.T
            held = sums[name]
            held[0] += residual.square().sum()
            held[1] += output.square().sum()
            held[2] += output.sum(0)
            held[3] += len(z)

        return hook

    for name, layer in branches(model):
        hooks.append(layer.cera_gate[ADAPTER].register_forward_hook(watch(name, layer)))

    def shares() -> dict[str, float]:
        return {
            name: float(1 - residual / (square - total.square().sum() / count))
            for name, (residual, square, total, count) in sums.items()
        }

    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
