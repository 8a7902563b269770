"""CeRA through PEFT's own doors: building, switching, serving, saving, loading, refusing."""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
from conftest import make_tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

import cera_train.cera
from cera_train.cera import CeraConfig, CeraLayer

pytestmark = pytest.mark.filterwarnings(
    "error",
    # names that PEFT and transformers' releases do not agree on yet
    "ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning",
    # PEFT's, on saving a model that was made in memory and so has no name
    "ignore:Could not find a config file in:UserWarning",
    # torch's, on loading with PEFT's low_cpu_mem_usage
    "ignore:for .* copying from a non-meta parameter:UserWarning",
)

IDS = torch.tensor([[5, 17, 99, 4, 250, 31], [7, 7, 300, 12, 3, 8], [401, 2, 45, 45, 6, 9], [11, 500, 23, 8, 64, 77]])


def cera(**settings) -> CeraConfig:
    """A configuration whose adapters start with a random B, so that they change the model."""
    return CeraConfig(**{"r": 4, "dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM"} | settings)


def adapted(base=None, name: str = "default", **settings) -> PeftModel:
    return get_peft_model(make_tiny_llama() if base is None else base, cera(**settings), adapter_name=name).eval()


def with_two(**settings) -> PeftModel:
    """A model with the adapters "first", which is active, and "second", of another rank, gate and scale."""
    model = adapted(name="first", **settings)
    model.add_adapter("second", cera(r=6, alpha=12, activation="gelu", target_modules=["k_proj", "v_proj"]))
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def cera_layers(model: nn.Module) -> list[str]:
    """Names of the adapted projections, in the base model's own spelling."""
    found = [name for name, module in model.named_modules() if isinstance(module, CeraLayer)]
    return [name.removeprefix("base_model.model.") for name in found]


def cera_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if "cera_" in name}


def gradients(model: nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """The gradients of the loss in train mode (without dropout, this is a function of the weights alone)."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        key.replace(".base_layer", "").removeprefix("base_model.model."): value.clone()
        for key, value in model.state_dict().items()
        if "cera_" not in key
    }


# --- the start, and LoRA as the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "identity"])
def test_step_zero_equals_the_base_model(tiny_llama, activation):
    expected = logits(tiny_llama)
    model = adapted(tiny_llama, activation=activation, dropout=0.1, alpha=8, init_weights=True)
    assert torch.equal(logits(model.eval()), expected)
    assert torch.equal(logits(model.train()), expected)


def lora_twin(model: PeftModel, base: nn.Module, **settings) -> PeftModel:
    """A LoRA with the same A and B on another copy of the base."""
    lora = get_peft_model(base, LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **settings))
    tensors = {key.replace("cera_", "lora_"): value for key, value in model.state_dict().items() if "cera_" in key}
    unexpected = lora.load_state_dict(tensors, strict=False).unexpected_keys
    assert tensors
    assert not unexpected
    return lora


@pytest.mark.parametrize(("alpha", "lora_alpha"), [(None, 4), (4, 4), (16, 16)])
def test_identity_without_dropout_is_lora_in_outputs_and_gradients(alpha, lora_alpha):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(activation="identity", alpha=alpha, target_modules=targets)
    lora = lora_twin(model, make_tiny_llama(), r=4, lora_alpha=lora_alpha, target_modules=targets)

    torch.testing.assert_close(logits(model), logits(lora.eval()))
    of_cera, of_lora = gradients(model), gradients(lora)
    assert len(of_cera) == 2 * len(targets) * 2  # A and B, two layers
    torch.testing.assert_close({key.replace("cera_", "lora_"): value for key, value in of_cera.items()}, of_lora)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, loss_type="ForCausalLM"
    )
    return GPT2LMHeadModel(config).eval()


def test_conv1d_of_gpt2_is_lora_in_outputs_and_gradients():
    targets = ["c_attn", "c_proj", "c_fc"]
    base = logits(tiny_gpt2())
    model = adapted(tiny_gpt2(), activation="identity", target_modules=targets)
    lora = lora_twin(model, tiny_gpt2(), r=4, lora_alpha=4, target_modules=targets, fan_in_fan_out=True)

    assert not torch.allclose(logits(model), base)
    torch.testing.assert_close(logits(model), logits(lora.eval()))
    for module in (model, lora):
        module.config.resid_pdrop = 0.0
        for dropout in (part for part in module.modules() if isinstance(part, nn.Dropout)):
            dropout.p = 0.0
    of_cera, of_lora = gradients(model), gradients(lora)
    assert of_cera
    torch.testing.assert_close({key.replace("cera_", "lora_"): value for key, value in of_cera.items()}, of_lora)


@pytest.mark.parametrize(("r", "expected"), [(64, 27_262_976), (512, 218_103_808)])
def test_trainable_parameters_of_llama_3_8b_are_the_papers(r, expected):
    config = LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), CeraConfig(r=r, task_type="CAUSAL_LM"))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == expected
    assert total - trainable == 8_030_261_248
    assert len(cera_layers(model)) == 64


# --- base models in 16, 8 and 4 bits ---------------------------------------------------------------------------------


def test_adapters_are_fp32_over_a_bf16_base_unless_told_otherwise():
    base = make_tiny_llama().bfloat16()
    model = adapted(base)
    assert cera_dtypes(model) == {torch.float32}
    assert logits(model).dtype == torch.bfloat16

    model = get_peft_model(make_tiny_llama().bfloat16(), cera(), autocast_adapter_dtype=False)
    assert cera_dtypes(model) == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    model.add_adapter("second", cera())
    model.set_adapter("second")
    assert {layer.cera_A["second"].weight.dtype for layer in model.modules() if isinstance(layer, CeraLayer)} == {
        torch.float32
    }


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
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert any(isinstance(module, layer_class) for module in quantized.modules())
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
    assert distance(logits(twin, ids), logits(adapted(original), ids)) > 0
    ours, expected = gradients(model, ids), gradients(twin, ids)
    assert ours.keys() == expected.keys()
    assert len(ours) == 8
    for name, gradient in ours.items():
        assert distance(gradient, expected[name]) < 2 * tolerance, name
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), ids), before)


def distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """|values - expected| / |expected|"""
    return ((values.float() - expected.float()).norm() / expected.float().norm()).item()


# --- which modules ---------------------------------------------------------------------------------------------------

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def names(projections: list[str], layers: tuple[int, ...] = (0, 1)) -> set[str]:
    return {
        f"model.layers.{layer}.{'mlp' if projection in MLP else 'self_attn'}.{projection}"
        for layer in layers
        for projection in projections
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, names(["q_proj", "v_proj"])),
        ({"target_modules": {"o_proj", "up_proj"}}, names(["o_proj", "up_proj"])),
        ({"target_modules": r".*\.1\..*(k_proj|down_proj)"}, names(["k_proj", "down_proj"], (1,))),
        ({"target_modules": "all-linear"}, names(ATTENTION + MLP)),
        ({"target_modules": "all-linear", "exclude_modules": MLP}, names(ATTENTION)),
        ({"exclude_modules": ["v_proj"]}, names(["q_proj"])),
        ({"target_modules": ATTENTION, "exclude_modules": r".*layers\.0.*"}, names(ATTENTION, (1,))),
        ({"layers_to_transform": 1}, names(["q_proj", "v_proj"], (1,))),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, names(["q_proj", "v_proj"], (0,))),
        ({"layers_to_transform": [1], "target_modules": "all-linear"}, names(ATTENTION + MLP, (1,))),
        ({"layers_to_transform": [0], "target_modules": sorted(names(["q_proj"]))}, names(["q_proj"], (0,))),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}, names(["q_proj"], (0,))),
    ],
)
def test_the_right_modules_are_adapted_now_and_after_loading(tiny_llama, tmp_path, settings, expected):
    model = adapted(tiny_llama, **settings)
    assert set(cera_layers(model)) == expected
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert set(cera_layers(PeftModel.from_pretrained(make_tiny_llama(), tmp_path))) == expected


def test_a_target_that_is_no_projection_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' cannot be adapted\. .*not Embedding"):
        adapted(target_modules=["embed_tokens"])
    image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'0' cannot be adapted\. .*not Conv2d"):
        get_peft_model(image, CeraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"'model\.norm' cannot be adapted\. .*not LlamaRMSNorm"):
        adapted(target_modules=["norm"])


def test_a_projection_that_mamba_reads_past_its_module_is_refused():
    model = nn.ModuleDict({"out_proj": nn.Linear(4, 4), "in_proj": nn.Linear(4, 4)})
    model.config = LlamaConfig()
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        get_peft_model(model, CeraConfig(target_modules=["out_proj"]))


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(target_modules=["no_such_proj"])
    with pytest.raises(ValueError, match="q_proj"):
        adapted(tiny_gpt2())  # the default targets are the paper's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": -3}, "r must be a positive integer"),
        ({"r": 8.0}, "r must be a positive integer, got 8.0"),
        ({"alpha": -1}, "alpha must be positive"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"dropout": 1}, "dropout must be at least 0 and less than 1, got 1"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"activation": "swish"}, "activation must be one of silu, relu, gelu, identity, got 'swish'"),
        ({"layers_pattern": "layers"}, "layers_pattern has a meaning only with layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "cannot be combined with a regular expression"),
        ({"task_type": "CAUSAL"}, "Invalid task type"),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_with_a_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        CeraConfig(**settings)


def test_scaling_is_alpha_over_r_and_one_without_alpha():
    assert CeraConfig(r=64).scaling == 1.0
    assert CeraConfig(r=64, alpha=32).scaling == 0.5
    assert CeraConfig(r=4, alpha=32).scaling == 8.0


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


def test_two_active_adapters_add_their_branches_in_every_projection():
    model = with_two()
    v_proj = model.base_model.model.model.layers[0].self_attn.v_proj  # has both
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj  # has "first" alone
    model.base_model.set_adapter(["first", "second"])
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(v_proj(x), v_proj.base_layer(x) + v_proj.branch(x, "first") + v_proj.branch(x, "second"))
    torch.testing.assert_close(q_proj(x), q_proj.base_layer(x) + q_proj.branch(x, "first"))


def test_an_added_adapter_is_neither_active_nor_trainable_until_it_is_set():
    model = with_two()

    def trainable() -> set[str]:
        return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert model.active_adapters == ["first"]
    assert trainable() == {"first"}
    model.set_adapter("second")
    assert trainable() == {"second"}
    model.base_model.set_adapter(["first", "second"])
    assert trainable() == {"first", "second"}


def test_an_adapter_added_to_a_model_in_eval_does_not_drop():
    model = adapted()
    model.add_adapter("second", cera(dropout=0.9))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(model))


def test_a_deleted_adapter_is_gone_and_the_other_takes_over():
    model = adapted(name="first")
    model.add_adapter("second", cera(r=6))
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("first")
    with pytest.warns(UserWarning, match="first was active which is now deleted. Setting active adapter to second"):
        model.delete_adapter("first")
    assert list(model.peft_config) == model.active_adapters == ["second"]
    assert torch.equal(logits(model), expected)
    assert not any(".first" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="first does not exist"):
        model.delete_adapter("first")


def test_pefts_status_report_understands_the_layers():
    status = with_two().get_model_status()
    assert status.adapter_model_type == "CeraModel"
    assert status.peft_types == {"first": "CERA", "second": "CERA"}
    assert status.enabled is True
    assert status.active_adapters == ["first"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["first", "second"]
    assert status.num_adapter_layers == 6
    assert status.requires_grad == {"first": True, "second": False}


# --- a different adapter for each row --------------------------------------------------------------------------------

ROWS = ["second", "__base__", "first", "second"]


def alone(model: PeftModel, row: int, call):
    """What a row gives when it runs alone, with its adapter active."""
    if ROWS[row] == "__base__":
        with model.disable_adapter():
            return call(IDS[row : row + 1])
    model.set_adapter(ROWS[row])
    return call(IDS[row : row + 1])


def test_every_row_equals_running_alone_with_its_adapter():
    model = with_two()
    mixed = logits(model, adapter_names=ROWS)
    for row in range(4):
        torch.testing.assert_close(mixed[row : row + 1], alone(model, row, lambda ids: logits(model, ids)))
    assert not torch.allclose(mixed, logits(model), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [({}, 1), ({"num_beams": 3}, 1), ({"num_beams": 3, "num_return_sequences": 2}, 2)],
    ids=["greedy", "beams", "beams-returned"],
)
def test_every_row_generates_what_it_generates_alone(settings, copies):
    model = with_two()

    def generate(ids: torch.Tensor, **kwargs) -> torch.Tensor:
        mask = torch.ones_like(ids)
        settings_ = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | settings
        return model.generate(input_ids=ids, attention_mask=mask, **settings_, **kwargs)

    mixed = generate(IDS, adapter_names=ROWS)
    assert len(mixed) == 4 * copies
    for row in range(4):
        assert torch.equal(mixed[row * copies : (row + 1) * copies], alone(model, row, generate))
    model.set_adapter("first")
    assert not torch.equal(mixed, generate(IDS))


def test_beams_from_a_generation_config_repeat_the_names_too():
    model, mask = with_two(), torch.ones_like(IDS)
    expected = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=ROWS, num_beams=2, max_new_tokens=4)
    config = copy.deepcopy(model.generation_config)
    config.update(num_beams=2, max_new_tokens=4)
    given = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=ROWS, generation_config=config)
    assert torch.equal(given, expected)
    model.generation_config.num_beams = 2
    given = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=ROWS, max_new_tokens=4)
    assert torch.equal(given, expected)


def test_sampled_sequences_of_a_row_run_through_its_adapter():
    model, mask = with_two(), torch.ones_like(IDS)
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    sampled = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=ROWS, **settings)
    greedy = model.generate(
        input_ids=IDS, attention_mask=mask, adapter_names=ROWS, do_sample=False, max_new_tokens=4, min_new_tokens=4
    )
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


def test_names_of_rows_are_refused_in_training_unknown_or_in_a_wrong_number():
    model = with_two()
    with pytest.raises(ValueError, match=r"adapter_names has other; the adapters of this model are first, second"):
        logits(model, adapter_names=["first", "other", "first", "first"])
    for count in (2, 3, 5, 8):  # two names for four rows could pass for beams
        with pytest.raises(ValueError, match=f"expected 4 names, got {count}"):
            logits(model, adapter_names=["first"] * count)
    settings = {"attention_mask": torch.ones_like(IDS), "num_beams": 3, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"expected 12 names, got 6"):
        model.generate(input_ids=IDS, adapter_names=["first"] * 2, **settings)
    with pytest.raises(ValueError, match=r"inference only: call model.eval\(\) first"):
        logits(model.train(), adapter_names=ROWS)


def test_names_of_rows_do_not_outlive_their_call_even_if_it_fails():
    model = with_two()
    before = logits(model)
    with pytest.raises(ValueError, match="expected 4 names"):
        logits(model, adapter_names=["second"] * 3)
    logits(model, adapter_names=["second"] * 4)
    assert torch.equal(logits(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_heads_saved_with_adapters_follow_the_rows_too():
    """ "first" has a head of its own, "second" has none, "third" has another."""
    model = adapted(name="first", modules_to_save=["lm_head"])
    model.add_adapter("second", cera())
    model.add_adapter("third", cera(modules_to_save=["lm_head"]))
    for name in ("first", "third"):
        model.base_model.model.lm_head.modules_to_save[name].weight.data.normal_(std=0.2)
    rows = ["third", "second", "first", "__base__"]
    mixed = logits(model, adapter_names=rows)
    for row, name in enumerate(rows[:3]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, IDS[row : row + 1])[0])
    torch.testing.assert_close(mixed[3], logits(make_tiny_llama(), IDS[3:])[0])

    for active in ("first", "second", "third"):
        model.set_adapter(active)
        torch.testing.assert_close(logits(model, adapter_names=rows), mixed)


# --- what a branch that is no matrix cannot do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    ],
    ids=["merge_and_unload", "merge_adapter", "layer"],
)
def test_merge_is_refused_with_a_reason_and_changes_nothing(merge):
    model = adapted(modules_to_save=["embed_tokens"])
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="CeRA cannot be merged: its branch is non-linear in x"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules


def test_a_weighted_sum_of_adapters_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="cannot be combined into one"):
        with_two().add_weighted_adapter(["first", "second"], [0.5, 0.5], "third")


def test_conversion_to_lora_is_refused():
    assert not adapted().supports_lora_conversion()


def test_unload_gives_the_base_model_back():
    expected, weights = logits(make_tiny_llama()), make_tiny_llama().state_dict()
    base = with_two(modules_to_save=["lm_head"]).unload()
    assert type(base) is type(make_tiny_llama())
    assert not cera_layers(base)
    assert torch.equal(logits(base), expected)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A saved adapter over the tiny model's folder, and the logits it gives."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(3)
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), alpha=8, target_modules="all-linear")
    model.save_pretrained(folder)
    return folder, logits(model, IDS % 256)


def test_a_saved_adapter_is_safetensors_and_json_and_says_what_it_is(saved):
    folder, _ = saved
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "CERA"
    assert {key: config[key] for key in ("r", "alpha", "dropout", "activation", "inference_mode")} == {
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "activation": "silu",
        "inference_mode": True,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert "base_model.model.model.layers.1.mlp.up_proj.cera_A.weight" in tensors
    assert isinstance(PeftConfig.from_pretrained(str(folder)), CeraConfig)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_gives_the_same_logits_to_the_bit(saved, tiny_folder, low_cpu_mem_usage):
    folder, expected = saved
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, IDS % 256), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = AutoPeftModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, IDS % 256), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_over_a_16_bit_base_does_not_round_the_adapter(tmp_path, low_cpu_mem_usage):
    model = adapted(make_tiny_llama().bfloat16())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(make_tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert cera_dtypes(loaded) == {torch.float32}
    assert torch.equal(logits(loaded), expected)
    in_16_bits = PeftModel.from_pretrained(
        make_tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
    )
    assert cera_dtypes(in_16_bits) == {torch.bfloat16}


def test_a_loaded_adapter_can_go_on_training(saved, tiny_folder):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, saved[0], is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28
    assert all("cera_" in name for name in trainable)
    assert gradients(model, IDS % 256).keys() == trainable


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_second_adapter_loads_beside_the_first(saved, tiny_folder, low_cpu_mem_usage):
    folder, expected = saved
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), name="first")
    before = logits(model, IDS % 256)
    model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, IDS % 256), before)
    model.set_adapter("second")
    assert torch.equal(logits(model, IDS % 256), expected)
    assert torch.equal(logits(model, IDS % 256, adapter_names=["second"] * 4), expected)


def test_each_of_several_adapters_is_saved_in_its_own_folder(tmp_path):
    model = with_two()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "first/adapter_model.safetensors").is_file()
    for name in ("first", "second"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))


def test_modules_saved_with_the_adapter_come_back_with_it(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    assert "base_model.model.lm_head.modules_to_save.default.weight" in gradients(model)
    model.eval().save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(make_tiny_llama(), tmp_path)), logits(model))


FRESH = """
import hashlib, importlib, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
order, folder, base, out = sys.argv[1:]
for name in order.split(","):
    module = importlib.import_module(name)
    if name == "cera_train":
        importlib.reload(module)
import peft
import torch
from transformers import AutoModelForCausalLM

def digest(model):
    with torch.no_grad():
        return hashlib.sha256(model(input_ids=ids).logits.numpy().tobytes()).hexdigest()

ids = torch.tensor(IDS) % 256
plain = lambda: AutoModelForCausalLM.from_pretrained(base)
models = [
    peft.PeftModel.from_pretrained(plain(), folder),
    peft.PeftModel.from_pretrained(plain(), folder, low_cpu_mem_usage=True),
    peft.AutoPeftModelForCausalLM.from_pretrained(folder),
]
print(*[digest(model) for model in models])
models[0].save_pretrained(out)

import cera_train
importlib.reload(cera_train)
importlib.reload(cera_train.cera)
assert [kind for kind in peft.PeftType if kind == "CERA"] == [peft.PeftType.CERA]
assert len(peft.PeftType) == len(set(peft.PeftType))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "cera_train,peft",
        "peft,cera_train",
        "cera_train,transformers.trainer,peft",  # transformers looks for the spec of PEFT before it imports PEFT
    ],
)
def test_a_fresh_process_that_imports_cera_train_loads_and_saves_the_same_bytes(saved, tiny_folder, tmp_path, order):
    folder, expected = saved
    hash_seed = str(sum(map(ord, order)) % 1000)  # the order of sets of strings follows from it
    done = subprocess.run(
        [sys.executable, "-c", FRESH.replace("IDS", repr(IDS.tolist())), order, folder, tiny_folder, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) == {hashlib.sha256(expected.numpy().tobytes()).hexdigest()}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_order_of_a_set_of_targets_does_not_reach_the_file(tmp_path):
    targets = ["v_proj", "o_proj", "q_proj", "k_proj"]
    texts = set()
    for number, order in enumerate([targets, targets[::-1]]):
        config = CeraConfig(target_modules=set(order), exclude_modules=set(order))
        config.save_pretrained(tmp_path / str(number))
        texts.add((tmp_path / str(number) / "adapter_config.json").read_text())
    assert len(texts) == 1
    saved = json.loads(texts.pop())
    assert saved["target_modules"] == saved["exclude_modules"] == sorted(targets)
    assert CeraConfig(target_modules=targets).to_dict()["target_modules"] == targets  # a list stays as given


# --- checkpoints that do not fit -------------------------------------------------------------------------------------


def with_changed_tensors(folder: Path, target: Path, change) -> Path:
    """A copy of a saved adapter with other tensors."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


FIRST = "base_model.model.model.layers.0.mlp.down_proj.cera_A.weight"


def only_the_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors["base_model.model.model.embed_tokens.weight"] = make_tiny_llama().model.embed_tokens.weight[:300].clone()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), r"1 tensors missing \(first: .*down_proj\.cera_A"),
        (lambda tensors: tensors.update(junk=torch.ones(1)), r"0 tensors missing, 1 without a place .*\(first: junk\)"),
        (
            lambda tensors: tensors.update({FIRST.replace(".0.", ".7."): torch.ones(4, 64)}),
            r"1 without a place in the model \(first: .*layers\.7",
        ),
        (lambda tensors: tensors.clear(), "28 tensors missing"),
        (lambda tensors: tensors.update({FIRST: tensors[FIRST][:2].clone()}), "size mismatch for .*down_proj.cera_A"),
        (
            lambda tensors: tensors.update({key.replace("cera_", "lora_"): tensors.pop(key) for key in list(tensors)}),
            "28 tensors missing .* 28 without a place",
        ),
    ],
    ids=["missing", "extra", "extra-layer", "empty", "misshapen", "lora"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, tiny_folder, tmp_path, change, message, low_cpu_mem_usage):
    folder = with_changed_tensors(saved[0], tmp_path / "changed", change)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), name="first")
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_checkpoint_with_a_head_but_no_branch_is_refused(tmp_path):
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "whole")

    def keep_the_head(tensors):
        for key in [key for key in tensors if "cera_" in key]:
            del tensors[key]

    folder = with_changed_tensors(tmp_path / "whole", tmp_path / "head", keep_the_head)
    with pytest.raises(ValueError, match="8 tensors missing"):
        PeftModel.from_pretrained(make_tiny_llama(), folder)
    folder = with_changed_tensors(
        tmp_path / "whole", tmp_path / "headless", lambda tensors: tensors.pop("base_model.model.lm_head.weight")
    )
    with pytest.raises(KeyError, match="lm_head"):
        PeftModel.from_pretrained(make_tiny_llama(), folder)


def test_an_adapter_of_another_rank_is_refused(saved, tiny_folder, tmp_path):
    folder = with_changed_tensors(saved[0], tmp_path / "changed", lambda tensors: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)


def test_a_saved_config_with_a_bad_field_is_refused(saved, tiny_folder, tmp_path):
    folder = with_changed_tensors(saved[0], tmp_path / "changed", lambda tensors: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"activation": "tanh"}))
    with pytest.raises(ValueError, match="activation must be one of"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)


def test_a_state_dict_of_the_whole_model_loads_strictly():
    model, other = with_two(), with_two()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(model), logits(other))


# --- the registration, copies, gradient checkpointing ----------------------------------------------------------------


def test_registering_twice_is_harmless():
    before, count = PeftType.CERA, len(PeftType)
    importlib.reload(cera_train)
    importlib.reload(cera_train.cera)
    assert PeftType.CERA is before is PeftType("CERA") is PeftType["CERA"]
    assert len(PeftType) == count
    assert [kind.value for kind in PeftType].count("CERA") == 1
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CERA] is CeraConfig is cera_train.cera.CeraConfig


def test_the_new_member_behaves_like_a_member():
    member = PeftType.CERA
    assert isinstance(member, PeftType)
    assert member == "CERA"
    assert (member.name, member.value, hash(member)) == ("CERA", "CERA", hash(PeftType("CERA")))
    assert member in PeftType
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"CERA"'
    assert repr(member) == "<PeftType.CERA: 'CERA'>"
    assert list(PeftType)[-1] is member
    assert vars(member).keys() == vars(PeftType.LORA).keys()
    assert member._sort_order_ == list(PeftType).index(member)
    if sys.version_info >= (3, 12):
        assert "CERA" in PeftType


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_gives_the_same_and_goes_its_own_way(copied):
    model = with_two()
    expected = logits(model, adapter_names=ROWS)
    twin = copied(model)
    assert torch.equal(logits(twin, adapter_names=ROWS), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, adapter_names=ROWS), expected)


def test_a_saved_model_state_survives_torch_save():
    model, file = adapted(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = adapted()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(dropout, use_reentrant):
    model = adapted(dropout=dropout, target_modules="all-linear")
    torch.manual_seed(5)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(5)
    found = gradients(model)
    assert len(expected) == 28
    torch.testing.assert_close(found, expected)


def test_training_moves_the_adapter_alone():
    model = adapted(init_weights=True, dropout=0.1).train()
    base, start = base_weights(model), {k: v.clone() for k, v in model.state_dict().items() if "cera_" in k}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(value, base[key]) for key, value in base_weights(model).items())
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in start.items())
