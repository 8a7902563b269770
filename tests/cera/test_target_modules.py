"""Which modules get an adapter of which rank, what is trained beside it, and which settings are refused."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from cera_models import WARNINGS, adapted, cera, cera_layers, logits
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import CONFIG_MAPPING

from cera_train.cera import CeraConfig

pytestmark = WARNINGS

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


MAPPED = sorted(
    name for name in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING if name in CONFIG_MAPPING and name != "gemma4"
)


def skeleton(model_type: str, names: Iterable[str]) -> nn.Module:
    """A module with linears of these names and the config of a model type."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    model.config = CONFIG_MAPPING[model_type]()
    return model


@pytest.mark.parametrize("model_type", MAPPED)
def test_without_targets_the_papers_are_taken_else_those_of_lora(model_type):
    targets = set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])
    paper = {"q_proj", "v_proj"}
    model = get_peft_model(skeleton(model_type, [*targets, "other"]), CeraConfig(r=2))
    assert set(cera_layers(model)) == (paper if paper <= targets else targets)


def test_without_targets_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="target_modules=None: a model of type vit has no q_proj and v_proj"):
        get_peft_model(skeleton("vit", ["query"]), CeraConfig())
    with pytest.raises(ValueError, match="Name the projections"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), CeraConfig())


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
