"""An update on fake tensors holds and computes what a real one does."""

import pytest
from moe_models import MIXTURES
from transformers import AutoConfig

from cera_train.common.files import config_dir, options
from cera_train.planning.dry_run import (
    DryRun,
    MicroBatch,
    build_base,
    stored_sizes,
    trainable_parameters,
)
from cera_train.settings.model import Quantization

LAYERS = 2
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

ROWS = 4
LENGTH = 32
BATCH = MicroBatch(ROWS, LENGTH, 0.5)
TOKENS = ROWS * LENGTH
SUPERVISED = ROWS * LENGTH // 2


@pytest.fixture
def dry_run(compose, tmp_path):
    """dry_run("llama", "adapter.r=4", device="cpu", ...) -> DryRun of a tiny model; settings change
    its config.json."""

    def dry_run(model_type: str, *overrides: str, device: str = "cpu", **settings) -> DryRun:
        AutoConfig.for_model(model_type, **SHAPE | settings).save_pretrained(tmp_path)
        run = [
            f"model.path={tmp_path}",
            "model.dtype=float32",
            "adapter.r=4",
            "adapter.target_modules=[q_proj,v_proj]",
        ]
        return DryRun(
            compose("+recipe=logistic_map", *run, *overrides, f"plan.gpu={device}", command="plan")
        )

    return dry_run


def test_operations_by_hand(dry_run):
    """Two for a multiply and add: frozen linears cost four a token (forward, and backward for their
    inputs), A and B six, but for the first layer's, whose input needs no gradient."""
    run = dry_run("llama")
    qkv = 32 * 32 + 2 * 32 * 16
    rest = 32 * 32 + 3 * 32 * 48
    adapter = 4 * (32 + 32) + 4 * (32 + 16)
    attention = 4 * 32 * LENGTH * LENGTH // 2 * ROWS
    head = 2 * 128 * 32 * SUPERVISED
    layers = LAYERS * (2 * (qkv + rest + adapter) * TOKENS + attention)
    rotary = run.evaluation(BATCH).flops - layers - head
    # Some releases of transformers compute it as a product.
    assert rotary in (0, 2 * 8 * LENGTH * 2, 2 * 8 * TOKENS)
    forward = layers + 2 * head + rotary
    first_inputs = 2 * (qkv + adapter // 2 - 4 * 8) * TOKENS  # dL/dx of the first layer
    whole = LAYERS * (2 * (qkv + rest) * TOKENS + 4 * adapter * TOKENS + attention * 5 // 2)
    backward = run.update(BATCH).flops - forward
    assert backward == pytest.approx(whole - first_inputs, rel=0.03)


def test_quantised_weights_take_what_is_stored(dry_run):
    held = {}
    peaks = {}
    for kind in Quantization:
        run = dry_run("llama", "model.dtype=bfloat16", f"model.quantization={kind}", hidden_size=64)
        held[kind] = run.memory["weights"]
        peaks[kind] = run.update(BATCH).peak - sum(run.memory.values())
    assert held["nf4"] < held["none"]
    linears = LAYERS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 48)
    rest = 2 * (2 * 128 * 64 + (2 * LAYERS + 1) * 64)  # embeddings, head, norms
    base = build_base(run.config.model)
    stored = {kind: sum(stored_sizes(base, kind).values()) for kind in Quantization}
    assert stored["none"] == 2 * linears + rest
    assert stored["nf4"] == pytest.approx(linears * 4.127 / 8 + rest, rel=1e-4)
    assert peaks["nf4"] == peaks["none"]


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimizer_has_its_states(dry_run, kind):
    run = dry_run(
        "llama",
        f"optimizer={kind}",
        "adapter.r=64",
        "adapter.target_modules=[q_proj]",
        device="h100" if kind.startswith("paged") else "cpu",
        hidden_size=128,
    )
    count = sum(weight.numel() for weight in run.trained)
    assert run.memory["optimizer"] == pytest.approx(
        2 * count * (4 if kind == "adamw" else 1 + 4 / 256), rel=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_operations_of_experts_by_hand(dry_run, model_type, dtype):
    """Each token passes k experts, whose branches cost what other branches do."""
    counts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    widths = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8}
    settings = counts | widths
    costs = []
    for experts in (["adapter.experts=false"], ["adapter.experts=true"]):
        words = [f"model.dtype={dtype}", "adapter.dropout=0", *experts]
        run = dry_run(model_type, *words, **settings)
        costs.append((run.evaluation(BATCH).flops, run.update(BATCH).flops))
    without, with_experts = costs
    width = 16 if "qwen" in model_type else SHAPE["intermediate_size"]
    branches = (
        2 * 2 * 4 * ((32 + 2 * width) + (width + 32)) * settings["num_experts_per_tok"] * TOKENS
    )
    assert with_experts[0] - without[0] == branches
    assert with_experts[1] - without[1] == 3 * branches


def test_the_published_budgets(compose):
    for recipe, budget in (("math_r64", 27_262_976), ("math_lora_r512", 218_103_808)):
        assert trainable_parameters(compose(f"+recipe={recipe}")) == budget


PUBLISHED = {
    "llama3_1_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472,
}
"""Parameters of a model on the Hub, tied ones once."""


def test_every_file_of_conf_model_has_the_shape_of_its_config_json(compose):
    models = {name: compose(f"model={name}").model for name in options("model")}
    for name, model in models.items():
        assert model.facts.of == model.path
        if name in PUBLISHED:
            base = build_base(model)
            assert sum(weight.numel() for weight in base.parameters()) == PUBLISHED[name]
    assert models.keys() >= PUBLISHED.keys()
    assert {model.facts.config for model in models.values()} == {
        path.name for path in config_dir("conf").glob("model/*.json")
    }
