"""Ranks and scales by pattern, and what is trained beside the branches: biases, tokens, whole modules."""

from __future__ import annotations

import pytest
import torch
from cera_models import WARNINGS, adapted, cera, cera_layers, logits
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from torch import nn

pytestmark = WARNINGS

# --- rank, scale and modules by pattern ------------------------------------------------------------------------------


def test_patterns_give_modules_their_rank_and_scale(tmp_path):
    settings = {
        "r": 4,
        "alpha": 8,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"v_proj": 1},
    }
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    for subject in (model, PeftModel.from_pretrained(make_tiny_llama(), tmp_path)):
        layers = {name: subject.get_submodule(f"base_model.model.{name}") for name in cera_layers(subject)}
        found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
        assert found == {
            "model.layers.0.self_attn.q_proj": (4, 2.0),
            "model.layers.0.self_attn.v_proj": (2, 0.5),
            "model.layers.1.self_attn.q_proj": (6, 8 / 6),
            "model.layers.1.self_attn.v_proj": (2, 0.5),
        }
        assert {len(layer.cera_A["default"].weight) for layer in layers.values()} == {2, 4, 6}


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"o_proj": 2}},
        {"alpha_pattern": {"layers.7.*": 2}},
        {"rank_pattern": {"q_proj": 2, "nothing": 3}, "target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 2}, "exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_a_pattern_that_matches_no_target_is_refused_before_anything_is_adapted(settings):
    model = make_tiny_llama()
    with pytest.raises(ValueError, match=r"^(rank|alpha)_pattern has '[^']+', which matches no target"):
        get_peft_model(model, cera(**settings))
    assert not cera_layers(model)


# --- beside the branches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "expected"), [("none", set()), ("cera_only", {"q_proj", "v_proj"}), ("all", None)])
def test_biases_of_the_base_are_trained_and_saved(bias, expected, tmp_path):
    base = make_tiny_llama(attention_bias=True)
    with_bias = {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = get_peft_model(base, cera(bias=bias))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert {name.replace(".base_layer", "").split(".")[-2] for name in trained} == (
        with_bias if expected is None else expected
    )
    for name in trained:
        nn.init.normal_(model.get_parameter(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(attention_bias=True), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_embeddings_of_some_tokens_are_trained_and_saved(tmp_path):
    model = adapted(trainable_token_indices=[5, 17])
    (name,) = [n for n, p in model.named_parameters() if p.requires_grad and "cera_" not in n]
    assert model.get_parameter(name).shape == (2, 32)
    nn.init.normal_(model.get_parameter(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded)[0], logits(adapted())[0])


def test_a_branch_on_a_tied_head_is_refused():
    base = make_tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="an embedding takes no CeRA branch"):
        get_peft_model(base, cera(target_modules=["lm_head"], ensure_weight_tying=True))
