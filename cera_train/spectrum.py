"""How many directions an adapter uses: the singular values of its branch's centred output on a fixed probe.

The branch's output is h B^T with h of width r. Its singular values are the square roots of the eigenvalues of
N (B^T B)^(1/2) Cov(h) (B^T B)^(1/2), an r x r problem, instead of an SVD of tokens x d_out: one definition for CeRA,
LoRA and DoRA. DoRA also rescales the rows of W0 + s B A to a learned magnitude m. Its branch is s B A x times
m / |W0 + s B A|; the rescaled W0 x is of full rank whatever the adapter learns, and would drown it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from cera_train.cera import CeraLayer
from cera_train.data.batches import Batch

ADAPTER = "default"


@dataclass
class ModuleSpectrum:
    """One adapted projection."""

    singular_values: torch.Tensor
    """Of the centred branch output, descending, float64, [min(r, d_out)]."""
    dead_units: float | None
    """Share of hidden units whose gate is closed (A x <= 0) on every probe token; None where there is no gate."""

    @property
    def effective_rank(self) -> float:
        """exp of the Shannon entropy of the singular values over their sum (Roy & Vetterli 2007); 0 for no output."""
        p = self.normalized
        return math.exp(-torch.special.xlogy(p, p).sum().item()) if p.any() else 0.0

    @property
    def manifold_dimension(self) -> int:
        """The fewest directions that explain 90 % of the variance."""
        variance = self.singular_values.square()
        if not variance.any():
            return 0
        explained = variance.cumsum(0) / variance.sum()
        return int((explained < 0.9).sum()) + 1

    @property
    def normalized(self) -> torch.Tensor:
        """Singular values over their sum."""
        total = self.singular_values.sum()
        return self.singular_values / total if total > 0 else self.singular_values


class _Moments:
    """Streaming count, sum and second moment of rows, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: torch.Tensor | float = 0.0
        self.second: torch.Tensor | float = 0.0
        self.ever_positive: torch.Tensor | None = None

    def add(self, rows_NR: torch.Tensor) -> None:
        rows_NR = rows_NR.double()
        self.count += len(rows_NR)
        self.sum = self.sum + rows_NR.sum(0)
        self.second = self.second + rows_NR.T @ rows_NR

    def see_gate(self, z_NR: torch.Tensor) -> None:
        positive = (z_NR > 0).any(0)
        self.ever_positive = positive if self.ever_positive is None else self.ever_positive | positive

    def scatter(self) -> torch.Tensor:
        """N Cov: the sum of outer products of the centred rows, [R, R]."""
        return self.second - torch.outer(self.sum, self.sum) / self.count


@torch.no_grad()
def measure_spectra(
    model: nn.Module, forward: Callable[[Batch], object], probe: Iterable[Batch]
) -> dict[str, ModuleSpectrum]:
    """The spectrum of every adapted projection, in eval mode.

    Args:
        model: a model with one active adapter, "default".
        forward: runs the model on a batch.
        probe: the probe's micro-batches. Padding does not count.

    Returns:
        Module name (as in the base model) -> spectrum.
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, (CeraLayer, LoraLayer)) and ADAPTER in module.r
    }
    moments = {name: _Moments() for name in layers}
    batch: Batch

    def watch(layer: nn.Module, moments: _Moments) -> Callable[..., None]:
        A, gate = (layer.cera_A, layer.cera_gate[ADAPTER]) if isinstance(layer, CeraLayer) else (layer.lora_A, None)

        def hook(module: nn.Module, args: tuple) -> None:
            # Not a hook on A itself: DoRA calls A once more, on the identity, for the norm of its weight.
            x = args[0].reshape(-1, args[0].shape[-1])
            is_padded = batch.attention_mask is not None and args[0].ndim > 2  # a head gets [N, d_in], without padding
            if is_padded:
                x = x[batch.attention_mask.reshape(-1).bool()]
            z_NR = nn.functional.linear(x.to(A[ADAPTER].weight.dtype), A[ADAPTER].weight).float()
            if gate is not None:
                moments.see_gate(z_NR)
            moments.add(z_NR if gate is None else gate(z_NR))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(layer, moments[name])) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        for batch in probe:
            forward(batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: _spectrum(layer, moments[name]) for name, layer in layers.items()}


def _spectrum(layer: nn.Module, moments: _Moments) -> ModuleSpectrum:
    dead_units = None
    if isinstance(layer, CeraLayer):
        B = layer.cera_B[ADAPTER].weight.double()
        if not isinstance(layer.cera_gate[ADAPTER], nn.Identity):
            dead_units = 1 - moments.ever_positive.double().mean().item()
    else:
        B = layer.lora_B[ADAPTER].weight.double()
        if layer.use_dora[ADAPTER]:
            B = _dora_scale(layer)[:, None] * B
    root = _psd_root(layer.scaling[ADAPTER] ** 2 * B.T @ B)
    singular_values = torch.linalg.eigvalsh(root @ moments.scatter() @ root).clamp(min=0).sqrt().flip(0)
    # h B^T has at most d_out directions: with r above that, the rest is rounding.
    return ModuleSpectrum(singular_values[: layer.out_features].cpu(), dead_units)


def _dora_scale(layer: LoraLayer) -> torch.Tensor:
    """m / |W0 + s B A|, [d_out]: what DoRA multiplies the rows of its weight by."""
    magnitude = layer.lora_magnitude_vector[ADAPTER]
    update = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    weight = dequantize_module_weight(layer.get_base_layer()).to(update.dtype)
    return (magnitude.weight / magnitude.get_weight_norm(weight, update, layer.scaling[ADAPTER])).double()


def _psd_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def spectrum_metrics(spectra: dict[str, ModuleSpectrum]) -> dict[str, float]:
    """Named numbers for the log: mean and max over modules, then every module."""
    columns = {
        "effective_rank": {name: spectrum.effective_rank for name, spectrum in spectra.items()},
        "manifold_dimension": {name: spectrum.manifold_dimension for name, spectrum in spectra.items()},
        "dead_units": {
            name: spectrum.dead_units for name, spectrum in spectra.items() if spectrum.dead_units is not None
        },
    }
    metrics = {}
    for kind, values in columns.items():
        if values:
            metrics[f"spectrum/{kind}/mean"] = sum(values.values()) / len(values)
            metrics[f"spectrum/{kind}/max"] = max(values.values())
    for kind, values in columns.items():
        metrics |= {f"spectrum/{kind}/{name}": value for name, value in values.items()}
    return metrics


def module_spectra(spectra: dict[str, ModuleSpectrum]) -> dict[str, dict]:
    """Every module's spectrum as plain numbers, for spectrum.json."""
    return {
        name: {
            "effective_rank": spectrum.effective_rank,
            "manifold_dimension": spectrum.manifold_dimension,
            "dead_units": spectrum.dead_units,
            "singular_values": spectrum.singular_values.tolist(),
        }
        for name, spectrum in spectra.items()
    }


def mean_spectrum(spectra: dict[str, ModuleSpectrum]) -> list[float]:
    """Normalised singular values averaged over modules, as the paper draws them; shorter spectra end in zeros."""
    longest = max(len(spectrum.singular_values) for spectrum in spectra.values())
    rows = [nn.functional.pad(s.normalized, (0, longest - len(s.normalized))) for s in spectra.values()]
    return torch.stack(rows).mean(0).tolist()
