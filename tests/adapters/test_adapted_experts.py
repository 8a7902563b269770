"""Settings of an adapter on experts, what they build, and the spectra of its branches."""

import pytest
from conftest import make_tiny_llama
from moe_models import MIXTURES, expert_loras, experts_of, make_mixture

from cera_train.adapters import build
from cera_train.cera import CeraLayer
from cera_train.cera.layer import CeraLinear
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig

DOWN = ["mlp.experts.down_proj"]


def refuses(message: str):
    """One line, whose start is the place."""
    return pytest.raises(UserError, match=rf"\A{message}[^\n]*\Z")


def built(model_type: str = "mixtral", **settings):
    config = AdapterConfig(**({"r": 4, "dropout": 0.0} | settings))
    return build.build(make_mixture(model_type).requires_grad_(False), config)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_all_linear_has_experts_in_or_out(model_type):
    without = built(model_type, target_modules="all-linear")
    model = built(model_type, target_modules="all-linear", experts=True, expert_r=2)
    assert not experts_of(without)
    assert len(experts_of(model)) == 2
    linears = [name for name, module in without.named_modules() if isinstance(module, CeraLayer)]
    assert linears == [name for name, module in model.named_modules() if type(module) is CeraLinear]
    layer = experts_of(model)[0]
    assert list(layer.cera_A["default"]) == ["gate_up_proj", "down_proj"]
    assert layer.r["default"] == {"gate_up_proj": 2, "down_proj": 2}
    weights = sum(
        weight.numel() for layer in experts_of(model) for weight in layer.parameters() if weight.requires_grad
    )
    trainable, total = build.parameter_counts(model)
    assert (trainable - weights, total - weights) == build.parameter_counts(without)
    assert model.peft_config["default"].target_parameters == ["experts.gate_up_proj", "experts.down_proj"]


def test_b_of_every_expert_learns_faster_where_it_should():
    config = AdapterConfig(r=4, dropout=0.0, experts=True, b_lr_ratio=4)
    model = build.build(make_mixture().requires_grad_(False), config)
    fast = {id(weight) for weight in build.parameter_groups(model, config)[1]["params"]}
    matrices = [matrix for layer in experts_of(model) for matrix in layer.cera_B["default"].values()]
    assert {id(matrix.weight) for matrix in matrices} <= fast


def test_pefts_lora_takes_experts_by_its_own_settings():
    settings = {"kind": "lora", "target_modules": ["q_proj"], "settings": {"target_parameters": DOWN}}
    lora = built(**settings)
    assert [list(wrappers) for wrappers in expert_loras(lora)] == [["down_proj"]] * 2
    with refuses("adapter.kind=lora adapter.settings.target_parameters=.*does not work with lora_dropout"):
        built(dropout=0.1, **settings)


def test_experts_that_a_model_lacks_are_refused():
    with refuses("adapter.experts=True: this model has no experts, it is dense. Set adapter.experts=false."):
        build.build(make_tiny_llama(), AdapterConfig(r=4, experts=True))
    with refuses("adapter.kind=cera: target_parameters: 'experts.up_proj' matches no parameter .*experts.gate_up_proj"):
        built(target_parameters=[*DOWN, "experts.up_proj"])
