"""Flat rows for models that carry a state: where their kernels are given the places of the sequences."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from architectures import ARCHITECTURES

from cera_train.adapters.build import build
from cera_train.model.batches import flat_batch, padded_batch
from cera_train.model.loss import SupervisedLoss, choose_layout
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import BatchLayout

ROWS = [[5, 17, 99, 4, 250, 31, 8, 60], [7, 7, 300, 12, 3], [401, 2, 45, 46, 6, 9, 120]]
MASKS = [[False, True, True] + [True] * (len(row) - 3) for row in ROWS]
KERNELS = {"causal_conv1d_fn": -1, "mamba2_chunk_scan": 1, "torch_chunk_gated_delta_rule": 1}
"""Functions of transformers that a kernel replaces, and the dimension of their tokens."""

TAKE_PLACES = (
    *("bamba", "falcon_h1", "zamba2", "granitemoehybrid", "nemotron_h", "lfm2"),
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid"),
)


def one_by_one(reference, dim: int):
    """A kernel that starts anew at each sequence, by torch's own function on each."""
    names = list(inspect.signature(reference).parameters)

    def kernel(*args, seq_idx=None, cu_seqlens=None, **kwargs):
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in kwargs if name in names}
        if seq_idx is not None:
            lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        else:
            lengths = [given[names[0]].shape[dim]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        tokens = sum(lengths)
        outputs = []
        for number in range(len(lengths)):
            part = {
                name: value.split(lengths, dim)[number]
                if isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[dim] == tokens
                else value
                for name, value in given.items()
            }
            outputs.append(reference(**part))
        if isinstance(outputs[0], tuple):
            return torch.cat([output[0] for output in outputs], dim), None
        return torch.cat(outputs, dim)

    return kernel


@pytest.fixture
def with_kernels(monkeypatch):
    """with_kernels(model): its layers have kernels that take the places of sequences."""

    def install(model) -> None:
        modules = {sys.modules[type(module).__module__] for module in model.modules()}
        for module in modules:
            for name, dim in KERNELS.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, one_by_one(getattr(module, name).__wrapped__, dim))
            if hasattr(module, "mamba2_split_conv1d_scan_combined"):
                monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: None)

    return install


def gradients(supervised: SupervisedLoss, batch) -> list[torch.Tensor]:
    loss = supervised.train()(batch)
    return [loss.detach(), *torch.autograd.grad(loss, [w for w in supervised.parameters() if w.requires_grad])]


@pytest.mark.parametrize("name", TAKE_PLACES)
def test_with_kernels_that_take_places_rows_are_flat_and_equal_padded_ones(name, with_kernels):
    family = ARCHITECTURES[name]
    base = family.model()
    model = build(base, AdapterConfig(r=4, dropout=0.0, target_modules=list(family.targets)))
    for parameter, weight in model.named_parameters():
        if "cera_B" in parameter:
            weight.data.normal_(std=0.3)
    supervised = SupervisedLoss(model, base)
    assert not supervised.probe().flattens  # without kernels
    expected = gradients(supervised, padded_batch(ROWS, MASKS))
    with_kernels(base)
    choose_layout(BatchLayout.flat, supervised, torch.device("cpu"))
    assert supervised.is_flat
    assert supervised.allowed.takes_places
    got = gradients(supervised, flat_batch(ROWS, MASKS))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_model_without_states_gets_no_places():
    model = ARCHITECTURES["llama"].model()
    supervised = SupervisedLoss(model, model)
    assert supervised.probe().flattens
    assert not supervised.allowed.takes_places
    assert "seq_idx" not in supervised._inputs(flat_batch(ROWS, MASKS))


def test_a_kernel_that_drops_the_places_is_found_out(with_kernels, monkeypatch):
    """A package of another version may take fewer arguments, which transformers then leaves out."""
    from transformers.models.bamba import modeling_bamba

    base = ARCHITECTURES["bamba"].model()
    with_kernels(base)
    convolve = modeling_bamba.causal_conv1d_fn
    dropping = lambda *args, seq_idx=None, **kwargs: convolve(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(modeling_bamba, "causal_conv1d_fn", dropping)
    assert not SupervisedLoss(base, base).probe().flattens
