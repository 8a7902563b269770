"""Parameters are those of the real model with the real adapter, for any architecture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from cera_train.adapters.build import build, parameter_counts
from cera_train.cli.composition import options
from cera_train.common.files import config_dir
from cera_train.planning.count import build_base, count_parameters, read_config, trainable_by_target
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import ModelConfig

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0},
}
ARCHITECTURES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "olmo2": {},
    "cohere": {},
    "phi3": {},
    "stablelm": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64},
}

TARGETS = {
    "all_linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r"model\.layers\.[02]\.(self_attn\.k|mlp\.up)_proj"},
    "a_whole_name_in_another_layer": {"target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"], "layers": [3]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


def save_config(model_type: str, folder, **changes) -> ModelConfig:
    """A config.json of a tiny model, and nothing else."""
    shape = ({} if model_type == "gpt2" else SHAPE) | ARCHITECTURES.get(model_type, {}) | changes
    AutoConfig.for_model(model_type, **shape).save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="bfloat16")


def check_counts(model: ModelConfig, adapter: AdapterConfig) -> None:
    counted = count_parameters(model, adapter)
    real = AutoModelForCausalLM.from_config(read_config(model)).requires_grad_(False)
    assert sum(counted.frozen.values()) == parameter_counts(real)[1]
    adapted = build(real, adapter)
    total = counted.trainable + sum(counted.frozen.values())
    assert (counted.trainable, total) == parameter_counts(adapted)
    assert counted.trainable == sum(counted.adapter.values()) > 0
    assert counted.share == counted.trainable / total
    assert counted.adapter == trainable_by_target(adapted)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_counts_as_the_real_model_does(tmp_path, model_type):
    adapter = AdapterConfig(kind="cera", r=4, dropout=0.0, target_modules="all-linear")  # PEFT: no dropout on experts
    check_counts(save_config(model_type, tmp_path), adapter)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["cera", "dora"])
def test_every_choice_of_targets_counts_as_the_real_adapter_does(tmp_path, kind, targets):
    check_counts(save_config("llama", tmp_path), AdapterConfig(kind=kind, r=4, **TARGETS[targets]))


def test_the_published_budgets(compose):
    for recipe, budget in (("math_r64", 27_262_976), ("math_lora_r512", 218_103_808)):
        config = compose(f"+recipe={recipe}")
        assert count_parameters(config.model, config.adapter).trainable == budget


def test_rows_by_kind_of_module_are_sums_over_their_names(compose, tmp_path):
    model = compose("model=llama3_1_8b").model
    counted = count_parameters(model, AdapterConfig(r=8, target_modules=["q_proj", "v_proj"]))
    sizes = {name: weight.numel() for name, weight in build_base(model).named_parameters()}
    assert counted.frozen["MLP"] == sum(count for name, count in sizes.items() if ".mlp." in name)
    assert counted.frozen["attention k_proj"] == sum(count for name, count in sizes.items() if ".k_proj." in name)
    assert counted.frozen["norms"] == sum(count for name, count in sizes.items() if "norm" in name)
    assert (counted.frozen["embeddings"], counted.frozen["head"]) == (128_256 * 4096, 128_256 * 4096)
    assert list(counted.adapter) == ["q_proj", "v_proj"]
    gpt2 = count_parameters(save_config("gpt2", tmp_path / "gpt2"), AdapterConfig(r=4, target_modules=["c_attn"]))
    assert gpt2.frozen["attention c_attn"] == 6 * (32 + 1) * 96
    assert gpt2.frozen["MLP"] == 6 * (32 * 128 * 2 + 128 + 32)


def test_adapted_experts_have_a_row(tmp_path):
    model, adapter = save_config("mixtral", tmp_path), AdapterConfig(r=4, target_modules="all-linear")
    assert "experts" not in count_parameters(model, adapter).adapter
    adapter = replace(adapter, experts=True, expert_r=2)
    check_counts(model, adapter)
    assert count_parameters(model, adapter).adapter["experts"] == 6 * 4 * 2 * ((32 + 2 * 48) + (48 + 32))


def test_weights_are_stored_as_they_are_quantised(tmp_path):
    folder = tmp_path / "model"
    save_config("llama", folder, attention_bias=False, mlp_bias=False)
    linears = 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    rows = 6 * (2 * 32 + 2 * 16 + 2 * 48 + 32)

    def stored(**changes) -> float:
        return count_parameters(
            ModelConfig(path=str(folder), **({"dtype": "bfloat16"} | changes)), AdapterConfig(r=4)
        ).weight_bytes

    rest = 2 * 128 * 32 + 13 * 32  # embeddings, head, norms
    assert stored() == 2 * (linears + rest)
    assert stored(dtype="float32") == 4 * (linears + rest)
    assert stored(quantization="nf4") == pytest.approx(linears * 4.127 / 8 + 2 * rest, rel=1e-4)
    assert stored(quantization="int8") == linears + 4 * rows + 2 * rest


# --- config.json -----------------------------------------------------------------------------------------------------


def test_every_file_of_conf_model_has_the_shape_of_its_config_json(compose):
    names = options("model")
    assert len(names) >= 5
    for name in names:
        facts = compose(f"model={name}").model.facts
        shape = json.loads((config_dir("conf") / "model" / facts.config).read_text())
        assert (facts.of, shape["model_type"]) == (compose(f"model={name}").model.path, "llama")
        assert facts.license
    used = {compose(f"model={name}").model.facts.config for name in names}
    assert used == {path.name for path in config_dir("conf").glob("model/*.json")}


def test_a_local_folder_is_read_and_not_the_facts_of_another_model(plan, tiny_folder):
    own = plan(f"model.path={tiny_folder}", "+recipe=math_r64", "data.max_length=256", "adapter.r=4")
    frozen = own.parameters.frozen
    assert sum(frozen.values()) == parameter_counts(make_tiny_llama(vocab_size=frozen["embeddings"] // 32))[1]
    with pytest.raises(ValueError, match="model.path=org/other: its config.json is not on this disk. Get it with `hf"):
        plan("+recipe=math_r64", "model.path=org/other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json cannot be used: .*JSON"),
        (json.dumps({"model_type": "no_such_type"}), "config.json cannot be used: .*no_such_type"),
        (json.dumps({"model_type": "t5"}), "is an encoder-decoder .t5., and cera-train trains decoder-only"),
        (json.dumps({"model_type": "vit"}), "cera-plan cannot run a model of type vit without its weights .ValueError"),
        (json.dumps({"model_type": "mamba"}), "'q_proj', 'v_proj' matches no module of this model"),
        (json.dumps({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}), "config.json cannot be used"),
    ],
)
def test_a_model_that_cannot_be_planned_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "code.py").write_text("raise SystemExit('code of the model ran')")
    with pytest.raises(ValueError, match=message) as refused:
        count_parameters(ModelConfig(path=str(tmp_path), trust_remote_code=True), AdapterConfig())
    assert type(refused.value).__name__ == "UserError"
    assert "\n" not in str(refused.value)
