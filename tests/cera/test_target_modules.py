"""Which modules get an adapter, and which settings are refused."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from cera_models import WARNINGS, adapted, cera_layers
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
