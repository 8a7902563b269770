"""Several adapters on the experts of one model, and their files. test_several_adapters.py has a different one for each
row."""

from __future__ import annotations

import json

import pytest
import torch
from cera_models import WARNINGS, logits
from moe_models import (
    MIXTURES,
    PARAMETERS,
    adapted_mixture,
    expert_config,
    experts_of,
    make_mixture,
    mixture_with_two,
    plain_experts,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

pytestmark = WARNINGS

# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_adapters_switch_add_up_and_turn_off(model_type):
    base, model = logits(make_mixture(model_type)), mixture_with_two(model_type)
    found = {}
    for names in (["first"], ["second"], ["first", "second"]):
        model.base_model.set_adapter(names)
        found[tuple(names)] = logits(model)
        with plain_experts():
            torch.testing.assert_close(found[tuple(names)], logits(model), rtol=1e-4, atol=1e-4)
    values = [base, *found.values()]
    for i, one in enumerate(values):
        assert all((one - other).abs().max() > 1e-3 for other in values[:i])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    trainable = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"first", "second"}


def test_unload_gives_the_base_model_back():
    model = mixture_with_two()
    base = model.unload()
    expected = make_mixture()
    assert not experts_of(base)
    assert base.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(logits(base), logits(expected))
    assert base.model.layers[0].mlp.experts.config is base.config
    assert torch.equal(logits(get_peft_model(base, expert_config(init_weights=True))), logits(expected))


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_plain_peft_loads_what_it_saved(model_type, low_cpu_mem_usage, tmp_path):
    model = adapted_mixture(model_type, expert_r=3, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == PARAMETERS
    assert config["expert_r"] == 3
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 + 4)
    assert "base_model.model.model.layers.1.mlp.experts.cera_A.down_proj.weight" in tensors
    loaded = PeftModel.from_pretrained(make_mixture(model_type), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_checkpoint_without_some_expert_is_refused(tmp_path):
    adapted_mixture().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.1.mlp.experts.cera_A.down_proj.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors missing .*experts.cera_A.default.down_proj.weight"):
        PeftModel.from_pretrained(make_mixture(), tmp_path)
