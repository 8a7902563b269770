"""Whole runs on a GPU: they resume bit for bit, compile, and adapt experts."""

import pytest
import torch
from cera_models import gradients
from moe_models import adapted_mixture, plain_experts
from tiny_runs import assert_resumes_to_the_byte, losses_of

from cera_train.training.train import train

pytestmark = pytest.mark.gpu


def test_a_bf16_run_resumes_bit_for_bit(tiny_config, bf16):
    assert_resumes_to_the_byte(tiny_config, "model.dtype=bfloat16", "adapter.dropout=0.3")


@pytest.mark.parametrize("adapter", ["cera", "lora"])
def test_compiled_layers_give_the_losses_of_eager_ones(tiny_config, adapter):
    settings = [f"adapter={adapter}", "adapter.dropout=0", "train.max_updates=6"]
    eager, compiled = (
        tiny_config(f"train.compile={on}", f"name={on}", *settings) for on in ("false", "true")
    )
    train(eager)
    train(compiled)
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_adapted_experts_equal_a_plain_loop(device, model_type):
    model = adapted_mixture(model_type).to(device)
    ids = torch.arange(3, 43, device=device).view(2, 20)
    slopes = gradients(model, ids)
    with plain_experts():
        expected = gradients(model, ids)
    assert slopes.keys() == expected.keys()
    for name, slope in slopes.items():
        assert (slope - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6
