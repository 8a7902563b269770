"""Activations are what autograd really holds on this CPU; operations are those of a closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_models import MIXTURES, SIZES
from test_parameters import save_config
from transformers import AutoConfig, AutoModelForCausalLM

from cera_train.adapters.build import build
from cera_train.model.attention import BY_SEQUENCE
from cera_train.model.batches import flat_batch, padded_batch
from cera_train.model.lean import keep_less
from cera_train.model.loss import Allowed, SupervisedLoss, choose_layout
from cera_train.planning.count import build_base, read_config
from cera_train.planning.measure import (
    MicroBatch,
    Saved,
    abilities,
    in_all_layers,
    layer_kinds,
    measure,
    storage_of,
)
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import BatchLayout
from cera_train.settings.model import ModelConfig

ROWS, LENGTH = 4, 32
BATCH = MicroBatch(ROWS, LENGTH, 0.5, is_flat=True, has_mask=False, autocast=None, on_gpu=False)
Q_AND_V = AdapterConfig(r=4)

PLACES_FOR_A_MASK = 2 * 8 * ROWS * LENGTH // 2
"""Bytes: a fake batch has two indices for every token whose prediction counts, a real one a mask."""


def really_saved(model: ModelConfig, adapter: AdapterConfig, autocast: bool, layout: str) -> tuple[int, MicroBatch]:
    """Bytes that autograd holds after the loss of a real model on this CPU, and the micro-batch as it was computed."""
    config = read_config(model)
    base = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, model.dtype), attn_implementation=model.attn_implementation
    ).requires_grad_(False)
    keep_less(base)  # as load_model does
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = build(base, adapter).train()
    loss = SupervisedLoss(adapted, base, lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast))
    choose_layout(BatchLayout(layout), loss, torch.device("cpu"))
    rows = [[(7 * token + row) % 128 for token in range(LENGTH)] for row in range(ROWS)]
    masks = [[False] * (LENGTH // 2) + [True] * (LENGTH // 2)] * ROWS
    weights = {storage_of(tensor) for tensor in (*adapted.parameters(), *adapted.buffers())}
    with Saved([]) as saved:
        value = loss.train()((flat_batch if loss.is_flat else padded_batch)(rows, masks))
    assert value.requires_grad
    has_mask = model.attn_implementation == "eager" or (loss.is_flat and loss.allowed.attention is None)
    used = replace(BATCH, is_flat=loss.is_flat, has_mask=has_mask, autocast="bfloat16" if autocast else None)
    return saved.bytes_without(weights), used


@pytest.mark.parametrize(
    ("kinds", "adapter", "model", "layout"),
    [
        ("cera lora dora", {}, {}, "auto"),
        ("cera lora", {"dropout": 0.0, "target_modules": "all-linear"}, {"dtype": "float32"}, "auto"),
        ("cera dora", {"target_modules": ["o_proj", "down_proj"], "layers": [2, 4]}, {}, "padded"),
        ("lora", {}, {"attn_implementation": "eager"}, "flat"),
        ("cera", {}, {"gradient_checkpointing": True}, "auto"),
        ("cera dora", {}, {"dtype": "float32", "autocast": True}, "auto"),
        ("lora", {"target_modules": ["q_proj", "lm_head"]}, {"dtype": "float32"}, "auto"),
    ],
    ids=str,
)
def test_activations_are_what_autograd_saves(tmp_path, kinds, adapter, model, layout):
    autocast = model.get("autocast", model.get("dtype") != "float32")
    settings = {name: value for name, value in model.items() if name != "autocast"}
    model = replace(save_config("llama", tmp_path), **settings)
    for kind in kinds.split():
        own = AdapterConfig(kind=kind, r=4, **adapter)
        saved, batch = really_saved(model, own, autocast, layout)
        measured = measure(model, own, batch, True).saved_bytes
        assert measured == pytest.approx(saved, abs=PLACES_FOR_A_MASK), kind


@pytest.mark.parametrize(
    ("model_type", "can"),
    [
        ("qwen3", Allowed(chunks_head=True, attention=BY_SEQUENCE)),
        ("gemma3_text", Allowed(chunks_head=True, attention=BY_SEQUENCE)),
        ("cohere", Allowed(chunks_head=True, attention=BY_SEQUENCE)),  # scales its logits
        ("stablelm", Allowed(chunks_head=True)),
        ("mixtral", Allowed(chunks_head=True, attention=BY_SEQUENCE)),
        ("gpt2", Allowed(chunks_head=True, attention=BY_SEQUENCE)),
    ],
)
def test_other_architectures_save_what_was_measured(tmp_path, model_type, can):
    model = save_config(model_type, tmp_path)
    adapter = AdapterConfig(r=4, target_modules=["c_attn"] if model_type == "gpt2" else ["q_proj", "v_proj"])
    assert abilities(model) == can
    saved, batch = really_saved(model, adapter, True, "auto")
    assert batch.is_flat == (can.attention is not None)
    assert measure(model, adapter, batch, True).saved_bytes == pytest.approx(saved, rel=0.003)


def test_what_eager_attention_or_a_model_of_another_kind_can(tmp_path):
    model = replace(save_config("llama", tmp_path), attn_implementation="eager")
    assert abilities(model) == Allowed(chunks_head=True)


def test_operations_by_hand(tmp_path):
    """Two for a multiply and add: frozen linears cost four a token (forward, and backward for their inputs), A and B
    six, but for the first layer's, whose input needs no gradient."""
    model = replace(save_config("llama", tmp_path, attention_bias=False, mlp_bias=False), dtype="float32")
    cost, tokens, supervised = measure(model, Q_AND_V, BATCH), ROWS * LENGTH, ROWS * LENGTH // 2
    qkv, rest = 32 * 32 + 2 * 32 * 16, 32 * 32 + 3 * 32 * 48
    adapter = 4 * (32 + 32) + 4 * (32 + 16)
    attention = 4 * 32 * LENGTH * LENGTH // 2 * ROWS
    head = 2 * 128 * 32 * supervised
    layers = 6 * (2 * (qkv + rest + adapter) * tokens + attention)
    rotary = cost.evaluation - layers - head
    assert rotary in (0, 2 * 8 * LENGTH * 2)  # older releases of transformers compute it as a product
    assert cost.forward == layers + 2 * head + rotary
    first_inputs = 2 * (qkv + adapter // 2 - 4 * 8) * tokens  # dL/dx of the first layer
    whole = 6 * (2 * (qkv + rest) * tokens + 4 * adapter * tokens + attention * 5 // 2)
    assert cost.backward == pytest.approx(whole - first_inputs, rel=0.03)


def test_checkpointing_costs_one_more_forward_of_the_layers(tmp_path):
    model = save_config("llama", tmp_path)
    plain, again = (measure(replace(model, gradient_checkpointing=flag), Q_AND_V, BATCH) for flag in (False, True))
    head = 2 * 128 * 32 * ROWS * LENGTH // 2
    recomputed = again.backward - plain.backward
    assert again.forward == plain.forward
    assert recomputed == pytest.approx(plain.evaluation - head, rel=0.15)  # not the last product of each layer
    assert again.saved_bytes < plain.saved_bytes / 3
    assert plain.layer_bytes == pytest.approx(plain.saved_bytes / 6, rel=0.1)


def test_the_backward_pass_ends_at_the_first_adapted_layer(tmp_path):
    model = save_config("llama", tmp_path)
    whole = measure(model, Q_AND_V, BATCH)
    last = measure(model, replace(Q_AND_V, layers=[5]), BATCH)
    assert last.saved_bytes < whole.saved_bytes / 4
    assert last.backward < whole.backward / 4


@pytest.mark.parametrize("layers", [None, [1, 4], [5]], ids=str)
def test_a_few_layers_stand_for_all(tmp_path, layers):
    """One of each kind and one more give to the number what all layers give."""
    from cera_train.planning.measure import Runner

    model, adapter = save_config("qwen3", tmp_path, num_hidden_layers=9), replace(Q_AND_V, layers=layers)
    runner, runs = Runner(model, adapter), []
    whole = runner.run(BATCH)

    def run():
        runs.append(runner.run(BATCH))
        return runs[-1]

    assert in_all_layers(runner.base, run)._replace(layer_bytes=0.0) == whole
    assert len(runs) <= 4


def test_layers_of_other_windows_are_of_another_kind(tmp_path):
    model = save_config("gemma3_text", tmp_path, layer_types=["sliding_attention"] * 4 + ["full_attention"] * 2)
    kinds = layer_kinds(list(build_base(model).model.layers))
    assert len(set(kinds)) == 2


def test_a_gpu_keeps_dropouts_masks_in_bytes_and_the_output_of_attention(tmp_path):
    model = save_config("llama", tmp_path, num_hidden_layers=2)
    lora = AdapterConfig(kind="lora", r=4, target_modules=["o_proj"])

    def saved(adapter: AdapterConfig, on_gpu: bool) -> float:
        return measure(model, adapter, replace(BATCH, autocast="bfloat16", on_gpu=on_gpu)).saved_bytes

    tokens = ROWS * LENGTH
    without = replace(lora, dropout=0.0)
    masks = {on_gpu: saved(lora, on_gpu) - saved(without, on_gpu) for on_gpu in (True, False)}
    # The input of the first o_proj needs no gradient, so only one mask is kept: 32 bytes a token, or as many float32.
    assert masks[False] - masks[True] == tokens * 32 * (4 - 1)
    assert saved(replace(Q_AND_V, dropout=0.0), True) - saved(replace(Q_AND_V, dropout=0.0), False) == pytest.approx(
        2 * tokens * (2 * 32 + 4 * 4), rel=0.01
    )


def test_8_bit_linears_keep_what_they_read(tmp_path):
    model = save_config("llama", tmp_path)
    saved = {q: measure(replace(model, quantization=q), Q_AND_V, BATCH).saved_bytes for q in ("none", "int8")}
    assert saved["int8"] - saved["none"] >= 6 * ROWS * LENGTH * 2 * (32 + 48)


def test_a_model_that_needs_values_is_refused_in_one_line(tmp_path):
    """JetMoE splits tokens by the number that each expert got."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
    }
    AutoConfig.for_model("jetmoe", **settings, intermediate_size=48, pad_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot run a model of type jetmoe without its weights .Runtime") as e:
        measure(ModelConfig(path=str(tmp_path), dtype="float32"), replace(Q_AND_V, target_modules=["kv_proj"]), BATCH)
    assert "\n" not in str(e.value)


# --- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("expert_r", [4, 8])  # 8 and 16 bytes a row in bfloat16: two kinds of grouped product
@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_save_what_was_measured(tmp_path, model_type, expert_r, dtype):
    adapter = replace(Q_AND_V, experts=True, expert_r=expert_r)
    attention = "eager" if model_type == "gpt_oss" else "sdpa"
    model = replace(save_mixture(model_type, tmp_path), dtype=dtype, attn_implementation=attention)
    saved, batch = really_saved(model, adapter, dtype == "bfloat16", "auto")
    assert measure(model, adapter, batch, True).saved_bytes == pytest.approx(saved, abs=PLACES_FOR_A_MASK)


def test_operations_of_experts_by_hand(tmp_path):
    """Each token passes k experts: frozen ones cost two for a multiply and add forward, A and B too."""
    frozen, expert_r, k, tokens = replace(Q_AND_V, dropout=0.0), 8, 2, ROWS * LENGTH
    model = replace(save_mixture("mixtral", tmp_path), dtype="float32")
    without, with_experts = (
        measure(model, adapter, BATCH) for adapter in (frozen, replace(frozen, experts=True, expert_r=expert_r))
    )
    sides = (32 + 48) + (24 + 32)  # of gate_up_proj and down_proj
    branches = 2 * 2 * expert_r * sides * k * tokens
    assert with_experts.forward - without.forward == branches
    assert with_experts.evaluation - without.evaluation == branches
    assert with_experts.backward - without.backward == 2 * branches


def save_mixture(model_type: str, folder) -> ModelConfig:
    settings = SIZES | MIXTURES[model_type] | {"vocab_size": 128}
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="bfloat16")
