"""CeRA on the experts of a mixture: against a plain loop; several adapters, saving and loading,
refusals."""

import itertools
import json

import pytest
import torch
from cera_models import WARNINGS, cera_dtypes, gradients, logits
from moe_models import (
    MIXTURES,
    PARAMETERS,
    adapted_mixture,
    expert_config,
    experts_of,
    make_mixture,
    plain_experts,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from cera_train.cera import CeraConfig

pytestmark = WARNINGS


@pytest.mark.parametrize(
    ("model_type", "parameters", "settings"),
    [
        *((each, PARAMETERS, {"activation": "gelu", "mix": "learned"}) for each in MIXTURES),
        ("mixtral", PARAMETERS[:1], {"activation": "relu"}),
        ("gpt_oss", PARAMETERS[1:], {}),
    ],
)
def test_model_equals_a_plain_loop_in_double_precision(model_type, parameters, settings):
    """The first layer's gradients pass the hidden states and the routing weights of the second."""
    model = adapted_mixture(
        model_type, double=True, target_parameters=parameters, alpha=6, **settings
    )
    values = logits(model)
    slopes = gradients(model)
    with plain_experts():
        torch.testing.assert_close(values, logits(model.eval()), rtol=1e-10, atol=1e-10)
        expected = gradients(model)
    assert slopes.keys() == expected.keys()
    assert len(slopes) == (6 if "mix" in settings else 4) * len(parameters)
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_base_gives_the_same_adapted_model(model_type, implementation):
    model = adapted_mixture(model_type)
    expected = logits(model)
    # On a GPU generate() does this too.
    model.base_model.model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), expected)
    with plain_experts():
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    base = make_mixture(model_type)
    base.set_experts_implementation(implementation)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_fresh_adapter_is_the_base_model(model_type):
    base = make_mixture(model_type).bfloat16()
    expected = logits(base)
    model = get_peft_model(base, expert_config(init_weights=True)).eval()
    assert torch.equal(logits(model), expected)
    assert cera_dtypes(model) == {torch.float32}


def test_patterns_choose_the_rank_and_alpha_of_experts():
    settings = {"alpha": 4, "use_rslora": True, "target_modules": ["q_proj"]}
    patterns = {
        "rank_pattern": {
            "layers.1.mlp.experts.down_proj": 9,
            "experts.down_proj": 4,
            "gate_up_proj": 2,
        },
        "alpha_pattern": {"gate_up_proj": 8},
    }
    first, last = experts_of(adapted_mixture(r=8, **settings, **patterns))
    assert first.r["default"] == {"gate_up_proj": 2, "down_proj": 4}
    assert last.r["default"]["down_proj"] == 9
    assert first.scaling["default"] == {"gate_up_proj": 8 / 2**0.5, "down_proj": 2.0}


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch 2.12 compiles one graph for each number of tokens"
)
@pytest.mark.parametrize(
    ("model_type", "place"),
    [("mixtral", "hidden"), pytest.param("gpt_oss", "input", marks=pytest.mark.slow)],
)
def test_compiled_experts_are_one_graph_with_the_same_numbers(model_type, place):
    layer = experts_of(adapted_mixture(model_type, dropout=0.5, dropout_on=place))[0]
    num_experts = layer.base_layer.num_experts
    two_experts = torch.stack([torch.randperm(num_experts)[:2] for _ in range(9)])
    inputs = torch.randn(9, 64, requires_grad=True), two_experts, torch.rand(9, 2)
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    ours, expected = (
        torch.autograd.grad(forward(*inputs).sin().sum(), weights) for forward in (compiled, layer)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    layer.train()
    assert not torch.equal(compiled(*inputs), compiled(*inputs))


def test_adapters_switch_add_up_and_turn_off():
    values = [logits(make_mixture())]
    model = adapted_mixture(name="first")
    other = {"r": 6, "alpha": 12, "activation": "gelu", "target_parameters": ["down_proj"]}
    model.add_adapter("second", expert_config(**other))
    for names in (["first"], ["second"], ["first", "second"]):
        model.base_model.set_adapter(names)
        values.append(logits(model))
        with plain_experts():
            torch.testing.assert_close(values[-1], logits(model), rtol=1e-4, atol=1e-4)
    for one, another in itertools.combinations(values, 2):
        assert (one - another).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), values[0])
    trainable = {
        name.split(".")[-3]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trainable == {"first", "second"}


@pytest.mark.parametrize(
    ("model_type", "low_cpu_mem_usage"), [("qwen2_moe", False), ("gpt_oss", True)]
)
def test_plain_peft_loads_what_it_saved(model_type, low_cpu_mem_usage, tmp_path):
    model = adapted_mixture(model_type, rank_pattern={"down_proj": 3}, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == PARAMETERS
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 + 4)
    assert "base_model.model.model.layers.1.mlp.experts.cera_A.down_proj.weight" in tensors
    loaded = PeftModel.from_pretrained(
        make_mixture(model_type), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            {"target_parameters": ["experts.gate_proj"]},
            r"matches no parameter of this model. .*gate_up_proj",
        ),
        (
            {"target_modules": ["experts"]},
            r"'model.layers.0.mlp.experts' holds experts: name its parameters",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
            "Linear does not run through .* experts interf",
        ),
    ],
)
def test_targets_that_are_no_parameters_of_experts_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_mixture(), CeraConfig(**targets))


def test_quantised_experts_are_refused():
    model = make_mixture()
    experts = model.model.layers[0].mlp.experts
    weight = experts.down_proj.detach().to(torch.uint8)
    experts.down_proj = nn.Parameter(weight, requires_grad=False)
    message = "mlp.experts.*down_proj of MixtralExperts is quantised .torch.uint8"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, expert_config())
