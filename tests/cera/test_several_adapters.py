"""Adapters in a model: LoRA as the oracle, several at once, and what a branch that is no matrix cannot do."""

from __future__ import annotations

import pytest
import torch
from cera_models import IDS, WARNINGS, adapted, cera, cera_layers, gradients, logits, with_two
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model

from cera_train.cera import CeraLayer

pytestmark = WARNINGS


@pytest.mark.parametrize(("alpha", "lora_alpha"), [(None, 4), (16, 16)])
def test_identity_without_dropout_is_lora_in_outputs_and_gradients(alpha, lora_alpha):
    model = adapted(activation="identity", alpha=alpha, target_modules="all-linear")
    config = LoraConfig(r=4, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(make_tiny_llama(), config)
    tensors = {key.replace("cera_", "lora_"): value for key, value in model.state_dict().items() if "cera_" in key}
    assert not lora.load_state_dict(tensors, strict=False).unexpected_keys
    torch.testing.assert_close(logits(model), logits(lora.eval()))
    ours = {key.replace("cera_", "lora_"): value for key, value in gradients(model).items()}
    assert len(ours) == 2 * 7 * 2  # A and B of seven projections in two layers
    torch.testing.assert_close(ours, gradients(lora))


# --- several adapters ------------------------------------------------------------------------------------------------


def test_adapters_switch_add_up_and_turn_off():
    base = logits(make_tiny_llama())
    model = with_two()
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    for one, other in [(first, base), (second, base), (first, second), (both, first), (both, second)]:
        assert not torch.allclose(one, other, atol=1e-3)

    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)


def test_an_adapter_over_a_model_in_eval_mode_answers_the_same_every_time():
    model = get_peft_model(make_tiny_llama().eval(), cera(dropout=0.9))
    assert torch.equal(logits(model), logits(model))
    model.add_adapter("second", cera(dropout=0.9, target_modules=["k_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_all_linear_means_the_same_for_every_adapter():
    model = adapted(name="first", target_modules=["q_proj"])
    model.add_adapter("second", cera(target_modules="all-linear"))
    model.add_adapter("third", cera(target_modules="all-linear"))
    expected = set(cera_layers(adapted(target_modules="all-linear")))
    for name in ("second", "third"):
        found = {key for key, layer in model.named_modules() if isinstance(layer, CeraLayer) and name in layer.cera_A}
        assert {key.removeprefix("base_model.model.") for key in found} == expected, name
        model.set_adapter(name)
        changed = logits(model)
        with model.disable_adapter():
            assert not torch.allclose(changed, logits(model))


def test_a_model_on_the_meta_device_runs():
    with torch.device("meta"):
        model = get_peft_model(make_tiny_llama(), cera(dropout=0.1)).train()
    output = model(input_ids=IDS.to("meta"), labels=IDS.to("meta"))
    output.loss.backward()
    assert output.logits.is_meta
    assert all(p.grad.is_meta for name, p in model.named_parameters() if "cera_" in name)


# --- what a branch that is no matrix cannot do -----------------------------------------------------------------------


@pytest.mark.parametrize("merge", [lambda model: model.merge_and_unload(), lambda model: model.merge_adapter()])
def test_merge_is_refused_with_a_reason_and_changes_nothing(merge):
    model = adapted(modules_to_save=["embed_tokens"])
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="CeRA cannot be merged: its branch is non-linear in x"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules


def test_mixing_adapters_is_refused_with_a_reason():
    model = with_two()
    with pytest.raises(ValueError, match="cannot be combined into one"):
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "third")
    with pytest.raises(ValueError, match="all rows of a batch run through the active adapters"):
        logits(model, adapter_names=["first", "second", "first", "first"])


def test_unload_gives_the_base_model_back():
    expected, weights = logits(make_tiny_llama()), make_tiny_llama().state_dict()
    base = with_two(modules_to_save=["lm_head"]).unload()
    assert type(base) is type(make_tiny_llama())
    assert not cera_layers(base)
    assert torch.equal(logits(base), expected)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())
