"""One table for every file of conf/adapter: each method builds, learns, counts, saves, loads, and
has a spectrum or none."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from branches import MASKS, ROWS, branch_outputs, forward_of
from conftest import make_tiny_llama
from moe_models import make_mixture
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import tiny_model
from cera_train.adapters import build, folder, saved
from cera_train.adapters.builders import builder
from cera_train.adapters.families import family, title
from cera_train.adapters.spectrum import find_branches, measure_spectra, spectrum_metrics
from cera_train.common.errors import UserError
from cera_train.distributed.sharding import trainable_weights
from cera_train.model.batches import flat_batch, padded_batch
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout
from cera_train.settings.model import Dtype
from cera_train.settings.training import OptimizerConfig
from cera_train.training.console import describe_coverage
from cera_train.training.optimizer import build_optimizer

CONF = Path(__file__).parents[2] / "conf" / "adapter"
OVERRIDES = {
    "peft": ["adapter.method=LOHA", "adapter.r=4"],
    "full": ["adapter.r=null"],
    "dense": ["adapter.r=null"],
    "randlora": ["adapter.r=4", "adapter.alpha=80"],
}
WITHOUT_SPECTRUM = {"dense", "full", "hira", "lily", "miss", "peanut", "peft", "randlora"}
TAKES_FROM_BASE = {"pissa", "full"}
IDS = torch.arange(3, 75).view(3, 24)

every_file = pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
"""A new file runs through every test; without a spectrum, or the base beside it, it stands in a
table above."""


@pytest.fixture
def adapter_of(compose):
    """adapter_of("lora") -> the AdapterConfig of conf/adapter/lora.yaml, at a rank for the tiny
    model."""

    def adapter_of(name: str):
        return compose(f"adapter={name}", *OVERRIDES.get(name, ["adapter.r=4"])).adapter

    return adapter_of


def built(config, **changes):
    torch.manual_seed(1)
    return build.build(make_tiny_llama(**changes).requires_grad_(False), config)


def branches_of(config):
    branches = map(builder(config.kind).branch, built(config).modules())
    return [branch for branch in branches if branch is not None]


def causal_lm(model):
    """The transformers model inside, which the loop calls."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return causal_lm(model.eval())(input_ids=IDS).logits


def loss(model) -> torch.Tensor:
    return causal_lm(model)(input_ids=IDS, labels=IDS).loss


def trained(config):
    """The tiny model after two updates."""
    model = built(config).train()
    optimizer = build_optimizer(
        build.parameter_groups(model, config), OptimizerConfig(lr=1e-3), torch.device("cpu")
    )
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@every_file
def test_it_has_a_name_learns_counts_what_it_trains_and_turns_off(name, adapter_of):
    config = adapter_of(name)
    assert title(config)
    build.check(config)
    model = built(config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = (
        sum(parameter.numel() for parameter in trainable),
        sum(p.numel() for p in model.parameters()),
    )
    assert build.parameter_counts(model) == expected
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert sum(len(group["params"]) for group in build.parameter_groups(model, config)) == len(
        trainable
    )
    # Update 0 is the base model.
    base = logits(make_tiny_llama())
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    after = trained(config)
    assert loss(after).item() < loss(model).item()
    assert saved.keeps_base(after) == (name not in TAKES_FROM_BASE)
    if not family(config.kind).trains_base:
        with after.disable_adapter():
            is_base = torch.allclose(logits(after), base, rtol=1e-4, atol=1e-4)
        assert is_base == saved.keeps_base(after)


@every_file
def test_what_is_saved_loads_to_equal_logits_and_what_does_not_fit_is_refused(
    name, adapter_of, tmp_path
):
    config = adapter_of(name)
    model = trained(config)
    expected = logits(model)
    saved.save(model, trainable_weights(model), tmp_path)
    assert folder.is_saved_in(tmp_path)

    weights = saved.read(tmp_path)
    resumed = built(config)
    saved.load(resumed, weights)
    assert torch.equal(logits(resumed), expected)
    evaluated = saved.attach(make_tiny_llama().requires_grad_(False), tmp_path)
    assert torch.equal(logits(evaluated), expected)
    assert not torch.equal(expected, logits(make_tiny_llama()))

    first = next(iter(weights))
    for wrong in (
        {key: value for key, value in weights.items() if key != first},
        weights | {"strange": weights[first]},
    ):
        with pytest.raises(UserError, match="does not fit"):
            saved.load(model, wrong)
    folder.weights_file(tmp_path).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"is damaged or no adapter"):
        saved.attach(make_tiny_llama(), tmp_path)


@every_file
def test_its_spectrum_equals_an_svd_or_it_has_none(name, adapter_of):
    model = built(adapter_of(name)).train()
    with torch.no_grad():  # B starts at zero
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "cera_B" in key:
                parameter.normal_()
    probe = [(padded_batch(ROWS[:2], MASKS[:2]), True), (flat_batch(ROWS[2:], MASKS[2:]), True)]
    spectra = measure_spectra(model, forward_of(model), probe)
    assert (not find_branches(model)) == (name in WITHOUT_SPECTRUM)
    if not spectra:
        assert spectrum_metrics(spectra) == {}
        return
    assert len(spectra) == 14
    for module, spectrum in spectra.items():
        outputs = branch_outputs(model, module)
        expected = torch.linalg.svdvals(outputs - outputs.mean(0))[:4]
        torch.testing.assert_close(
            spectrum.singular_values, expected, rtol=2e-3, atol=1e-4 * expected[0].item()
        )


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (make_tiny_llama, EXACT),
        (partial(make_tiny_llama, tie_word_embeddings=True), EXACT),
        (partial(make_mixture, "qwen3_moe"), {}),
        (partial(tiny_model, "glm4_moe"), {}),
    ],
    ids=["untied", "tied", "experts", "buffers"],
)
def test_a_full_model_is_one_that_transformers_loads(adapter_of, tmp_path, make, tolerance):
    model = build.build(make().requires_grad_(False), adapter_of("full"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
        for buffer in saved.buffers(model).values():
            buffer.add_(torch.arange(len(buffer)))
    saved.save(model, trainable_weights(model), tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), **tolerance)
    assert torch.equal(logits(saved.attach(make(), tmp_path)), logits(model))
    assert saved.read(tmp_path).keys() == saved.saved_tensors(model).keys()


@pytest.mark.parametrize("name", ["cera", "lora", "rslora", "dora"])
def test_alpha_scales_the_branch_and_none_is_a_scale_of_1_at_other_ranks_too(adapter_of, name):
    by_alpha = {
        None: {(4, 1), (2, 1)},
        8: {(4, 4), (2, 5.656854)} if name == "rslora" else {(4, 2), (2, 4)},
    }
    for alpha, scales in by_alpha.items():
        settings = {"rank_pattern": {"v_proj": 2}}
        config = replace(adapter_of(name), alpha=alpha, settings=settings)
        assert {(branch.r, round(branch.scaling, 6)) for branch in branches_of(config)} == scales


@pytest.mark.parametrize("name", ["cera", "lora"])
def test_an_alpha_of_ones_own_counts_beside_a_rank_of_another_name(adapter_of, name):
    settings = {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"0.self_attn.v_proj": 16}}
    config = replace(adapter_of(name), alpha=None, settings=settings, target_modules=["v_proj"])
    assert [branch.scaling for branch in branches_of(config)] == [2, 1]


def test_the_automatic_rate_is_twice_loras_where_the_branch_starts_at_half_its_scale(adapter_of):
    factors = {
        "cera": 2,
        "cera_identity": 2,
        "lora": 1,
        "lora_kaiming": 1,
        "lora_dropout_hidden": 1,
    }
    configs = {name: adapter_of(name) for name in factors}
    assert {name: family(each.kind).rate_factor(each) for name, each in configs.items()} == factors


@pytest.mark.parametrize("name", ["lora", "cera", "dense"])
def test_what_trains_beside_an_adapter_is_float32_over_a_16_bit_base(adapter_of, tmp_path, name):
    """PEFT leaves the base's biases, here also of layer norms, and copies of its modules in 16
    bits."""
    config = adapter_of(name)
    if name != "dense":
        config = replace(config, settings={"bias": "all", "modules_to_save": ["lm_head"]})

    def build_narrow(**arguments):
        base = tiny_model("starcoder2", tie_word_embeddings=False).bfloat16()
        return build.build(base, config, **arguments)

    with pytest.raises(UserError, match=r"needs autocast: set model\.dtype=float32"):
        build_narrow(has_autocast=False)
    model = build_narrow().train()
    language_model = LanguageModel(model, causal_lm(model), Dtype.bfloat16)
    choose_layout(language_model)
    make_batch = flat_batch if language_model.is_flat else padded_batch
    language_model(make_batch(ROWS, MASKS)).sum().backward()
    before = {key: weight.clone() for key, weight in trainable_weights(model).items()}
    optimizer = build_optimizer(
        build.parameter_groups(model, config), OptimizerConfig(lr=1e-5), torch.device("cpu")
    )
    optimizer.step()  # less than a step of 16 bits
    after = trainable_weights(model)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    learning = [
        key
        for key, weight in model.named_parameters()
        if weight.grad is not None and weight.grad.any()
    ]
    assert not [key for key in learning if torch.equal(after[key], before[key])]
    if name != "dense":
        assert all(
            any(part in key for key in learning)
            for part in ("norm.bias", "q_proj.base_layer.bias", "lm_head")
        )

    saved.save(model, after, tmp_path)
    resumed = build_narrow()
    saved.load(resumed, saved.read(tmp_path))
    torch.testing.assert_close(trainable_weights(resumed), after, **EXACT)


def test_all_linear_of_a_lora_leaves_the_experts_of_a_mixture_out(adapter_of):
    base = tiny_model("deepseek_v3")
    assert describe_coverage(base) == ""
    model = build.build(base, adapter_of("lora"))
    attention = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
    left_out = "gate_proj up_proj down_proj: 0 of 6; experts: 0 of 1"
    assert describe_coverage(model) == f"{attention}: 10 of 10; {left_out}"

    named = replace(adapter_of("lora"), target_modules=["o_proj", "down_proj"])
    with pytest.raises(UserError, match=r"takes a name among these for experts \(down_proj\) of"):
        build.build(tiny_model("deepseek_v3"), named)
