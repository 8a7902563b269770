"""Which modules get an adapter of which rank, what is trained beside it, and which settings are
refused."""

import pytest
from cera_models import WARNINGS, adapted, cera_layers
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import CONFIG_MAPPING

from cera_train.cera import CeraConfig

pytestmark = WARNINGS

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
        ({"target_modules": r".*\.1\..*(k_proj|down_proj)"}, names(["k_proj", "down_proj"], (1,))),
        ({"target_modules": "all-linear", "exclude_modules": MLP}, names(ATTENTION)),
        ({"layers_to_transform": 1}, names(["q_proj", "v_proj"], (1,))),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
)
def test_the_right_modules_are_adapted_now_and_after_loading(
    tiny_llama, tmp_path, settings, expected
):
    model = adapted(tiny_llama, **settings)
    assert set(cera_layers(model)) == expected
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert set(cera_layers(PeftModel.from_pretrained(make_tiny_llama(), tmp_path))) == expected


def test_a_target_that_is_not_a_projection_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"'model\.embed_tokens' cannot be adapted\. .*not Embedding"
    ):
        adapted(target_modules=["embed_tokens"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mixtral", "falcon"])
def test_the_default_targets_are_the_papers_or_else_pefts_for_lora(model_type):
    targets = set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])
    paper = {"q_proj", "v_proj"}
    skeleton = nn.ModuleDict({name: nn.Linear(4, 4) for name in (*targets, "other")})
    skeleton.config = CONFIG_MAPPING[model_type]()
    model = get_peft_model(skeleton, CeraConfig(r=2))
    assert set(cera_layers(model)) == (paper if paper <= targets else targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"dropout": 1}, "dropout must be at least 0 and less than 1, got 1"),
        (
            {"activation": "swish"},
            "activation must be one of silu, relu, gelu, tanh, identity, got 'swish'",
        ),
        ({"activation": "gated"}, "activation='gated' was last in cera-train 0.2.0"),
        (
            {"layers_pattern": "layers"},
            "layers_pattern needs layers_to_transform",
        ),
        ({"mix": "learned", "activation": "identity"}, "activation must not be 'identity'"),
        ({"use_rslora": True}, "use_rslora divides alpha by sqrt"),
        ({"expert_r": 2}, "expert_r was last in cera-train 0.2.0"),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_with_a_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        CeraConfig(**settings)


def test_patterns_give_modules_their_rank_and_scale(tmp_path):
    settings = {
        "r": 4,
        "alpha": 8,
        # The longer pattern decides; PEFT saves patterns sorted by name.
        "rank_pattern": {r"self_attn\.v_proj": 2, r"1\..*_proj": 6},
        "alpha_pattern": {"v_proj": 1},
    }
    adapted(**settings).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in cera_layers(model)}
    assert {
        name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()
    } == {
        "model.layers.0.self_attn.q_proj": (4, 2.0),
        "model.layers.0.self_attn.v_proj": (2, 0.5),
        "model.layers.1.self_attn.q_proj": (6, 8 / 6),
        "model.layers.1.self_attn.v_proj": (2, 0.5),
    }
    assert {len(layer.cera_A["default"].weight) for layer in layers.values()} == {2, 4, 6}
