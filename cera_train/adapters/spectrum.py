"""How many directions an adapter uses: the singular values of its branch's centred output on a
fixed probe.

The branch's output is h B^T with h of width r. Its singular values are the square roots of the
eigenvalues of N (B^T B)^(1/2) Cov(h) (B^T B)^(1/2), an r x r problem, instead of an SVD of tokens x
d_out: one definition for every method with hidden units. What A, the gate and B are stands in
builders.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cera_train.adapters.builders import BUILDERS, Branch
from cera_train.cera.gates import LearnedGate

SUMMARISED = ("effective_rank", "manifold_dimension", "linear_share")
"""Figures of a module whose mean and maximum a run logs."""


@dataclass
class ModuleSpectrum:
    """One adapted projection."""

    singular_values: torch.Tensor
    """Of the centred branch output, descending, float64, [min(r, d_out)]."""
    linear_share: float | None = None
    """Share of the branch's variance that the best affine map of z = A x explains; 1 without a
    gate, None where the output does not vary."""
    gamma: float | None = None
    """The learned share of the gate; None where it is not learned."""

    @property
    def effective_rank(self) -> float:
        """exp of the Shannon entropy of the singular values over their sum (Roy & Vetterli 2007); 0
        for no output."""
        total = self.singular_values.sum()
        if total == 0:
            return 0.0
        p = self.singular_values / total
        return math.exp(-torch.special.xlogy(p, p).sum().item())

    @property
    def manifold_dimension(self) -> int:
        """The fewest directions that explain 90 % of the variance."""
        variance = self.singular_values.square()
        if not variance.any():
            return 0
        explained = variance.cumsum(0) / variance.sum()
        return int((explained < 0.9).sum()) + 1

    def figures(self) -> dict[str, float]:
        """The figures by name, without those that the method does not have."""
        figures = {name: getattr(self, name) for name in (*SUMMARISED, "gamma")}
        return {name: value for name, value in figures.items() if value is not None}


class _Moments:
    """Sums over the rows of a branch, in float64: their number, sum and second moment. A row holds
    the hidden units h and, where there is a gate, z = A x."""

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        width = branch.r if branch.gate is None else branch.r + len(branch.A.weight)
        self.all = torch.zeros(
            1 + width + width**2, dtype=torch.float64, device=branch.A.weight.device
        )
        self.count, self.sum, second = self.all.split([1, width, width**2])  # views
        self.second = second.view(width, width)
        self.root_gram: torch.Tensor | None = None
        """(s^2 B^T B)^(1/2), from the first call."""
        self.gamma: float | None = None

    def take_weights(self) -> None:
        """Computes what depends on weights alone. Called in the model's forward: sharded weights
        are whole only there."""
        branch = self.branch
        B = branch.B().double()
        values, vectors = torch.linalg.eigh(branch.scaling**2 * B.T @ B)
        self.root_gram = vectors * values.clamp(min=0).sqrt() @ vectors.T
        self.gamma = branch.gate.gamma.item() if isinstance(branch.gate, LearnedGate) else None

    def add(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Adds the rows of these inputs, [B, T, d_in], without padding; or of a head's inputs, [N,
        d_in]."""
        A = self.branch.A.weight
        gate = self.branch.gate
        has_padding = attention_mask is not None and x.ndim > 2
        x = x[attention_mask.bool()] if has_padding else x.flatten(0, -2)
        z_NR = nn.functional.linear(x.to(A.dtype), A).float()
        h_NR = z_NR if gate is None else gate(z_NR)
        rows = (h_NR if gate is None else torch.cat([h_NR, z_NR], -1)).double()
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.second += rows.T @ rows

    def spectrum(self) -> ModuleSpectrum:
        r = self.branch.r
        scatter = self.second - torch.outer(self.sum, self.sum) / self.count  # N Cov of the rows
        eigenvalues = torch.linalg.eigvalsh(self.root_gram @ scatter[:r, :r] @ self.root_gram)
        singular_values = eigenvalues.clamp(min=0).sqrt().flip(0)
        # h B^T has at most d_out directions: with r above that, the rest is rounding.
        values = singular_values[: self.branch.out_features].cpu()
        return ModuleSpectrum(values, self._linear_share(scatter), self.gamma)

    def _linear_share(self, scatter: torch.Tensor) -> float | None:
        """tr G Cov(h, z) Cov(z)^-1 Cov(z, h) / tr G Cov(h), with G = s^2 B^T B; where B is still
        zero, with G = 1."""
        r = self.branch.r
        gram = self.root_gram @ self.root_gram
        if not gram.any():
            gram = torch.eye(r, dtype=gram.dtype, device=gram.device)
        variance = (gram * scatter[:r, :r]).sum()
        if self.branch.gate is None or variance == 0:
            return 1.0 if variance else None
        h_z = scatter[:r, r:]
        z_z = scatter[r:, r:]
        explained = h_z @ torch.linalg.pinv(z_z, hermitian=True) @ h_z.T
        return ((gram * explained).sum() / variance).item()


def find_branches(model: nn.Module) -> dict[str, Branch]:
    """Module name (as in the base model) -> the adapter's branch there, for every module that has
    hidden units."""
    branches = {}
    for name, module in model.named_modules():
        for kind in BUILDERS.values():
            branch = kind.branch(module)
            if branch is not None:
                branches[name.removeprefix("base_model.model.")] = branch
    return branches


@torch.no_grad()
def measure_spectra(
    model: nn.Module,
    forward: Callable[[Any], object],
    probe: Iterable[tuple[Any, bool]],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> dict[str, ModuleSpectrum]:
    """The spectrum of every adapted projection, by its name in the base model. In eval mode; empty
    without branches.

    Args:
        forward: runs the model on a batch.
        probe: the probe's micro-batches, and whether each counts; where several processes share the
            probe, this one's part. Padding does not count.
        reduce: sums a tensor over the processes that share the probe.
    """
    moments_of = {name: _Moments(branch) for name, branch in find_branches(model).items()}
    if not moments_of:
        return {}
    batch: Any
    counts: bool

    def watch(moments: _Moments) -> Callable[..., None]:
        # Not a hook on A itself: DoRA calls A once more, on the identity, for the norm of its
        # weight.
        def hook(module: nn.Module, args: tuple) -> None:
            if moments.root_gram is None:
                moments.take_weights()
            if counts:
                moments.add(args[0], batch.attention_mask)

        return hook

    hooks = [
        moments.branch.layer.register_forward_pre_hook(watch(moments))
        for moments in moments_of.values()
    ]
    was_training = model.training
    model.eval()
    try:
        for batch, counts in probe:  # noqa: B007 - the hooks read both
            forward(batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for moments in moments_of.values():
        moments.all.copy_(reduce(moments.all))
        if moments.root_gram is None and moments.count:  # an expert that ran elsewhere alone
            moments.take_weights()
    # A module that never ran has no spectrum.
    return {name: moments.spectrum() for name, moments in moments_of.items() if moments.count}


def spectrum_metrics(spectra: dict[str, ModuleSpectrum]) -> dict[str, float]:
    """Mean and maximum over the modules, by the names of the log; empty without spectra."""
    metrics = {}
    for kind in SUMMARISED:
        values = [getattr(spectrum, kind) for spectrum in spectra.values()]
        if values := [value for value in values if value is not None]:
            metrics |= {
                f"spectrum/{kind}/mean": sum(values) / len(values),
                f"spectrum/{kind}/max": max(values),
            }
    if gammas := [spectrum.gamma for spectrum in spectra.values() if spectrum.gamma is not None]:
        metrics["adapter/gamma"] = sum(gammas) / len(gammas)
    return metrics
