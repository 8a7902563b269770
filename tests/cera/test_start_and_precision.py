"""LoRA as the oracle, and bases in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from cera_models import (
    IDS,
    WARNINGS,
    adapted,
    cera_dtypes,
    cera_layers,
    distance,
    gradients,
    logits,
    lora_twin,
)
from conftest import make_tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = WARNINGS


@pytest.mark.parametrize(("alpha", "lora_alpha"), [(None, 4), (16, 16)])
def test_identity_without_dropout_is_lora_in_outputs_and_gradients(alpha, lora_alpha):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(activation="identity", alpha=alpha, target_modules=targets)
    lora = lora_twin(model, make_tiny_llama(), r=4, lora_alpha=lora_alpha, target_modules=targets)

    torch.testing.assert_close(logits(model), logits(lora.eval()))
    cera_gradients, lora_gradients = gradients(model), gradients(lora)
    assert len(cera_gradients) == 2 * len(targets) * 2  # A and B, two layers
    torch.testing.assert_close(
        {key.replace("cera_", "lora_"): value for key, value in cera_gradients.items()}, lora_gradients
    )


QUANTIZED = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


def quantized_and_dequantized(folder: Path, kind: str) -> tuple[nn.Module, nn.Module]:
    """The tiny model in 4 or 8 bits, and in 32 bits with the numbers that those bits stand for."""
    config = BitsAndBytesConfig(**QUANTIZED[kind])
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # a kernel without a backward pass, on CPUs with AVX512-BF16
            module.support_avx512bf16_for_cpu = False
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = module.weight.data * module.weight.SCB[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(weight)
    return quantized, plain


@pytest.mark.parametrize(
    ("kind", "layer_class", "tolerance"),
    [("nf4", bitsandbytes.nn.Linear4bit, 1e-4), ("int8", bitsandbytes.nn.Linear8bitLt, 0.05)],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_over_quantized_weights_equals_over_the_numbers_they_stand_for(tiny_folder, kind, layer_class, tolerance):
    # int8 multiplies in 8 bits too, so it rounds the inputs of the base
    quantized, plain = quantized_and_dequantized(tiny_folder, kind)
    before = logits(quantized, IDS[:, :4] % 256)

    model, twin = adapted(quantized), adapted(plain)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "cera_" in k}, strict=False)
    assert all(
        isinstance(model.get_submodule(f"base_model.model.{n}.base_layer"), layer_class) for n in cera_layers(model)
    )
    assert cera_dtypes(model) == {torch.float32}

    ids = IDS[:, :4] % 256
    assert distance(logits(model, ids), logits(twin, ids)) < tolerance
    assert distance(logits(model, ids), before) > 2 * tolerance
    ours, expected = gradients(model, ids), gradients(twin, ids)
    assert ours.keys() == expected.keys()
    assert len(ours) == 8
    for name, gradient in ours.items():
        assert distance(gradient, expected[name]) < 2 * tolerance, name
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), ids), before)
