"""CeRA in a PEFT model: against LoRA, several adapters at once, saving and loading, registration,
and what a non-linear branch cannot do."""

import itertools

import pytest
import torch
from cera_models import (
    WARNINGS,
    adapted,
    cera_dtypes,
    gradients,
    logits,
    with_two,
)
from commands import command
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = WARNINGS


def test_identity_without_dropout_is_lora_in_outputs_and_gradients():
    model = adapted(activation="identity", alpha=16, target_modules="all-linear")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(make_tiny_llama(), config)
    tensors = {
        key.replace("cera_", "lora_"): value
        for key, value in model.state_dict().items()
        if "cera_" in key
    }
    assert not lora.load_state_dict(tensors, strict=False).unexpected_keys
    torch.testing.assert_close(logits(model), logits(lora.eval()))
    ours = {key.replace("cera_", "lora_"): value for key, value in gradients(model).items()}
    assert len(ours) == 2 * 7 * 2  # A and B of seven projections in two layers
    torch.testing.assert_close(ours, gradients(lora))


def test_adapters_switch_add_up_and_turn_off():
    base = logits(make_tiny_llama())
    model = with_two()
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    for one, other in itertools.combinations((base, first, second, both), 2):
        assert not torch.allclose(one, other, atol=1e-3)

    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize(
    "merge", [lambda model: model.merge_and_unload(), lambda model: model.merge_adapter()]
)
def test_merge_is_refused_with_a_reason_and_changes_nothing(merge):
    model = adapted(modules_to_save=["embed_tokens"])
    before = logits(model)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="CeRA cannot be merged: its branch is non-linear in x"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules


def test_an_adapter_for_each_row_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="all rows of a batch run through the active adapters"):
        logits(with_two(), adapter_names=["first", "second", "first", "first"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_over_a_16_bit_base_does_not_round_the_adapter(tmp_path, low_cpu_mem_usage):
    model = adapted(make_tiny_llama().bfloat16())
    model.save_pretrained(tmp_path)
    expected = logits(model)

    def load(**settings) -> PeftModel:
        settings |= {"low_cpu_mem_usage": low_cpu_mem_usage}
        return PeftModel.from_pretrained(make_tiny_llama().bfloat16(), tmp_path, **settings)

    loaded = load()
    assert cera_dtypes(loaded) == {torch.float32}
    assert torch.equal(logits(loaded), expected)
    assert cera_dtypes(load(autocast_adapter_dtype=False)) == {torch.bfloat16}


IMPORTS = {
    "cera_train first": """
import importlib.util, sys
import cera_train
assert importlib.util.find_spec("peft")  # as libraries look for PEFT without importing it
assert not {"torch", "peft"} & sys.modules.keys(), "import cera_train is not light"
import peft
""",
    "a Trainer, which imports PEFT halfway": """
import cera_train
from transformers import TrainingArguments
import peft
""",
    "peft first": "import peft, cera_train",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_importing_cera_train_registers_cera_in_any_order(imports, tmp_path):
    script = f"{imports}\nprint(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType('CERA')].__name__)"
    done = command("python", "-c", script, cwd=tmp_path)
    assert done.stdout == "CeraConfig\n", done.stderr
    if imports.startswith("import cera_train"):  # in time to quiet what PEFT imports
        assert done.stderr == ""
