"""Several adapters on the experts of one model, and their files. test_several_adapters.py has a different one for each
row."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from cera_models import ROWS, WARNINGS, gradients, logits
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


def test_a_deleted_adapter_is_gone():
    model = mixture_with_two()
    model.set_adapter("second")
    expected = logits(model)
    model.delete_adapter("first")
    assert torch.equal(logits(model), expected)
    assert not any(".first" in name for name, _ in model.named_modules())


def test_unload_gives_the_base_model_back():
    model = mixture_with_two()
    base = model.unload()
    expected = make_mixture()
    assert not experts_of(base)
    assert base.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(logits(base), logits(expected))
    assert base.model.layers[0].mlp.experts.config is base.config
    assert torch.equal(logits(get_peft_model(base, expert_config(init_weights=True))), logits(expected))


def test_a_copy_is_a_model_of_its_own():
    model = adapted_mixture()
    other = copy.deepcopy(model)
    for layer in experts_of(other):
        layer.cera_B["default"]["down_proj"].weight.data.zero_()
    assert not torch.equal(logits(other), logits(model))


def test_a_merge_is_refused():
    with pytest.raises(ValueError, match="CeRA cannot be merged"):
        adapted_mixture().merge_and_unload()


def test_a_wrong_number_of_names_is_refused():
    model = mixture_with_two()
    for count in (1, 2, 3, 8):  # the tokens of four rows divide by all of them
        with pytest.raises(ValueError, match=f"expected 4 names, got {count}"):
            logits(model, adapter_names=["first"] * count)


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


def test_gates_that_learn_are_saved(tmp_path):
    model = adapted_mixture(mix="learned", init="kaiming_uniform")
    assert len(gradients(model)) == 2 * 2 * (2 + 1)
    model.eval().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.cera_gate.down_proj.gamma" in tensors
    loaded = PeftModel.from_pretrained(make_mixture(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path):
    model = mixture_with_two()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mixture(), tmp_path / "first", adapter_name="first").eval()
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded, adapter_names=ROWS), logits(model.eval(), adapter_names=ROWS))


def test_a_checkpoint_without_some_expert_is_refused(tmp_path):
    adapted_mixture().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.1.mlp.experts.cera_A.down_proj.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors missing .*experts.cera_A.default.down_proj.weight"):
        PeftModel.from_pretrained(make_mixture(), tmp_path)
