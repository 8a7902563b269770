"""Figures of a spectrum by hand; test_families.py has the spectrum of every method against an
SVD."""

import math

import peft
import pytest
import torch
from branches import MASKS, ROWS, forward_of
from conftest import make_tiny_llama

from cera_train.adapters.spectrum import ModuleSpectrum, measure_spectra, spectrum_metrics
from cera_train.cera import CeraConfig
from cera_train.model.batches import flat_batch


def test_the_linear_share_of_a_fresh_adapter_falls_with_the_scale_of_A():
    shares = []
    for scale in (1, 30):
        model = peft.get_peft_model(
            make_tiny_llama(), CeraConfig(r=6, init_scale=scale, task_type="CAUSAL_LM")
        )
        spectra = measure_spectra(
            model, forward_of(model), [(flat_batch(ROWS, MASKS), True)]
        ).values()
        assert {(each.effective_rank, each.manifold_dimension) for each in spectra} == {(0.0, 0)}
        shares.append(max(each.linear_share for each in spectra))
    assert 1 > shares[0] > shares[1] > 0


def test_the_linear_share_is_what_a_regression_on_z_explains():
    config = CeraConfig(r=6, alpha=12, dropout=0.5, init_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_tiny_llama(), config).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    inputs = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    spectra = measure_spectra(model, forward_of(model), [(flat_batch(ROWS, MASKS), True)])
    A, B = (part["default"].weight.double() for part in (layer.cera_A, layer.cera_B))
    z = inputs[0].double() @ A.T
    output = torch.nn.functional.silu(z) @ B.T
    columns = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    residual = output - columns @ torch.linalg.lstsq(columns, output).solution
    expected = 1 - residual.square().sum() / (output - output.mean(0)).square().sum()
    share = spectra["model.layers.0.self_attn.q_proj"].linear_share
    assert 0 < share < 1
    assert share == pytest.approx(expected.item(), rel=1e-4)
    metrics = spectrum_metrics(spectra)
    ranks = [spectrum.effective_rank for spectrum in spectra.values()]
    assert metrics["spectrum/effective_rank/mean"] == pytest.approx(sum(ranks) / 4)
    assert metrics["spectrum/effective_rank/max"] == max(ranks) <= 6


def test_effective_rank_and_manifold_dimension_by_hand():
    alike = ModuleSpectrum(torch.ones(4, dtype=torch.float64))
    assert alike.effective_rank == pytest.approx(4)
    assert alike.manifold_dimension == 4  # three of four explain 75 %
    alone = ModuleSpectrum(torch.tensor([3.0, 0, 0], dtype=torch.float64))
    assert (alone.effective_rank, alone.manifold_dimension) == (pytest.approx(1), 1)
    mixed = ModuleSpectrum(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert mixed.effective_rank == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert mixed.manifold_dimension == 1  # 9 / 10 is 90 %
