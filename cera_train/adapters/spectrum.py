"""How many directions an adapter uses: the singular values of its branch's centred output on a fixed probe.

The branch's output is h B^T with h of width r. Its singular values are the square roots of the eigenvalues of
N (B^T B)^(1/2) Cov(h) (B^T B)^(1/2), an r x r problem, instead of an SVD of tokens x d_out: one definition for every
method with hidden units. What A, the gate and B are stands in families/.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cera_train.adapters.family import Branch, families
from cera_train.data.batches import Batch


@dataclass
class ModuleSpectrum:
    """One adapted projection."""

    singular_values: torch.Tensor
    """Singular values of the centred branch output, descending, float64, [min(r, d_out)]."""
    dead_units: float | None
    """Share of hidden units whose gate is closed (A x <= 0) on every probe token; None where no gate closes."""
    gamma: float | None = None
    """The learned share of the gate; None where it is not learned."""

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
    """Streaming count, sum and second moment of hidden rows, in float64; the passes in which a gate was open; and the
    root of s^2 B^T B."""

    def __init__(self, branch: Branch) -> None:
        r, device = branch.r, branch.A.weight.device
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.sum = torch.zeros(r, dtype=torch.float64, device=device)
        self.second = torch.zeros(r, r, dtype=torch.float64, device=device)
        self.open = torch.zeros(r, dtype=torch.float64, device=device)
        self.root: torch.Tensor | None = None
        self.gamma: float | None = None

    def add(self, rows_NR: torch.Tensor) -> None:
        rows_NR = rows_NR.double()
        self.count += len(rows_NR)
        self.sum += rows_NR.sum(0)
        self.second += rows_NR.T @ rows_NR

    def reduce(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Adds up the moments of all processes."""
        parts = (self.count, self.sum, self.second.flatten(), self.open)
        sums = reduce(torch.cat(parts)).split([len(part) for part in parts])
        self.count, self.sum, self.second, self.open = sums[0], sums[1], sums[2].view_as(self.second), sums[3]

    def scatter(self) -> torch.Tensor:
        """N Cov: the sum of outer products of the centred rows, [R, R]."""
        return self.second - torch.outer(self.sum, self.sum) / self.count


def find_branches(model: nn.Module) -> dict[str, Branch]:
    """Module name (as in the base model) -> the adapter's branch there, for every module that has hidden units."""
    found = {}
    for name, module in model.named_modules():
        branches = next(filter(None, (family.branches(module) for family in families())), {})
        found |= {name.removeprefix("base_model.model.") + end: branch for end, branch in branches.items()}
    return found


def why_no_spectrum(model: nn.Module) -> str | None:
    """The reason why a model's spectrum cannot be taken; None where it can."""
    if find_branches(model):
        return None
    return next(family for family in families() if family.made(model)).why_no_spectrum(model)


@torch.no_grad()
def measure_spectra(
    model: nn.Module,
    forward: Callable[[Batch], object],
    probe: Iterable[tuple[Batch, bool]],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> dict[str, ModuleSpectrum]:
    """The spectrum of every adapted projection, in eval mode. Empty where `why_no_spectrum` has a reason.

    Args:
        model: a model with one active adapter, "default".
        forward: runs the model on a batch.
        probe: the probe's micro-batches, and whether each counts; where several processes share the probe, this one's
            part. Padding does not count.
        reduce: sums a tensor over the processes that share the probe.

    Returns:
        Module name (as in the base model) -> spectrum.
    """
    branches = find_branches(model)
    if not branches:
        return {}
    moments = {name: _Moments(branch) for name, branch in branches.items()}
    batch: Batch
    counts: bool

    def watch(branch: Branch, moments: _Moments) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if moments.root is None:  # taken here: where weights are sharded, they are whole inside a forward only
                moments.root = _psd_root(branch.gram())
                moments.gamma = branch.gamma() if branch.gamma else None
            if not counts:
                return
            # Not a hook on A itself: DoRA calls A once more, on the identity, for the norm of its weight.
            x = branch.rows(args, None if batch.attention_mask is None else batch.attention_mask.reshape(-1).bool())
            z_NR = nn.functional.linear(x.to(branch.A.weight.dtype), branch.A.weight).float()
            h_NR = z_NR if branch.gate is None else branch.gate(z_NR)
            moments.open += (h_NR > 0).any(0)
            moments.add(h_NR)

        return hook

    hooks = [branch.layer.register_forward_pre_hook(watch(branch, moments[name])) for name, branch in branches.items()]
    was_training = model.training
    model.eval()
    try:
        for batch, counts in probe:  # noqa: B007 - the hooks read both
            forward(batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for part in moments.values():
        part.reduce(reduce)
    # An expert may have got no token of the probe.
    return {name: _spectrum(branch, moments[name]) for name, branch in branches.items() if moments[name].count}


def _spectrum(branch: Branch, moments: _Moments) -> ModuleSpectrum:
    dead_units = 1 - (moments.open > 0).double().mean().item() if branch.closes else None
    root = moments.root
    singular_values = torch.linalg.eigvalsh(root @ moments.scatter() @ root).clamp(min=0).sqrt().flip(0)
    # h B^T has at most d_out directions: with r above that, the rest is rounding.
    return ModuleSpectrum(singular_values[: branch.out_features].cpu(), dead_units, moments.gamma)


def _psd_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def spectrum_metrics(spectra: dict[str, ModuleSpectrum]) -> dict[str, float]:
    """Named numbers for the log: mean and max over modules, then every module; mean and max over a layer's experts in
    place of every one. None of them for no spectra."""
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
        experts = defaultdict(list)
        for name, value in values.items():
            stem, _, last = name.rpartition(".")
            if last.isdigit():
                experts[stem].append(value)
            else:
                metrics[f"spectrum/{kind}/{name}"] = value
        for name, of_experts in experts.items():
            metrics[f"spectrum/{kind}/{name}/mean"] = sum(of_experts) / len(of_experts)
            metrics[f"spectrum/{kind}/{name}/max"] = max(of_experts)
    gammas = [spectrum.gamma for spectrum in spectra.values() if spectrum.gamma is not None]
    return metrics | ({"adapter/gamma": sum(gammas) / len(gammas)} if gammas else {})


def module_spectra(spectra: dict[str, ModuleSpectrum]) -> dict[str, dict]:
    """Every module's spectrum as plain numbers, for spectrum.json."""
    return {
        name: {
            "effective_rank": spectrum.effective_rank,
            "manifold_dimension": spectrum.manifold_dimension,
            "dead_units": spectrum.dead_units,
            "gamma": spectrum.gamma,
            "singular_values": spectrum.singular_values.tolist(),
        }
        for name, spectrum in spectra.items()
    }


def mean_spectrum(spectra: dict[str, ModuleSpectrum]) -> list[float]:
    """Normalised singular values averaged over modules, as the paper draws them; shorter spectra end in zeros.
    Empty for no spectra."""
    if not spectra:
        return []
    longest = max(len(spectrum.singular_values) for spectrum in spectra.values())
    rows = [nn.functional.pad(s.normalized, (0, longest - len(s.normalized))) for s in spectra.values()]
    return torch.stack(rows).mean(0).tolist()
