"""The gradient of an adapter over 4-bit weights against that over the same weights dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional

from cera_train.adapters.build import build
from cera_train.cera import CeraLayer
from cera_train.model.weights import load_model
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import ModelConfig, Quantization


def gradients_after_an_evaluation(model, device: torch.device) -> torch.Tensor:
    adapted = build(model, AdapterConfig(r=4, dropout=0.0))
    torch.manual_seed(1)
    for layer in adapted.modules():
        if isinstance(layer, CeraLayer):
            torch.nn.init.normal_(layer.cera_A["default"].weight)
            torch.nn.init.normal_(layer.cera_B["default"].weight)
    ids = torch.arange(20, device=device)[None]
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=ids)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([value.grad.flatten() for value in adapted.parameters() if value.requires_grad])


def assert_nf4_gradients_are_right(folder: Path, device: torch.device) -> None:
    quantised = load_model(ModelConfig(path=str(folder), quantization=Quantization.nf4), device)
    dequantised = load_model(ModelConfig(path=str(folder)), device)
    for name, module in quantised.named_modules():
        if hasattr(module, "weight") and getattr(module.weight, "quant_state", None) is not None:
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dequantised.get_submodule(name).weight.data = weight.to(dequantised.dtype)
    got, expected = (gradients_after_an_evaluation(model, device) for model in (quantised, dequantised))
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=0)
    assert cosine > 0.999
    assert got.norm() == pytest.approx(expected.norm().item(), rel=0.02)
