"""Which experts carry an adapter, and what is refused with a reason."""

from __future__ import annotations

import pytest
from cera_models import WARNINGS
from moe_models import adapted_mixture, expert_config, make_mixture
from peft import get_peft_model
from torch import nn

from cera_train.cera import CeraConfig, CeraExperts

pytestmark = WARNINGS


def adapted_parameters(model: nn.Module) -> list[str]:
    return [
        f"{name.removeprefix('base_model.model.')}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, CeraExperts)
        for parameter in module.cera_A["default"]
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1]),
        ({"layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": 0}, [0]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"exclude_modules": ["layers.1.mlp.experts"]}, [0]),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, [1]),
        ({"target_parameters": ["model.layers.1.mlp.experts.down_proj"]}, [1]),
    ],
)
def test_layers_are_chosen_as_for_modules(settings, expected):
    found = adapted_parameters(adapted_mixture(**({"target_parameters": ["experts.down_proj"]} | settings)))
    assert found == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in expected]


def test_a_name_that_matches_nothing_is_refused():
    config = expert_config(target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_proj"])
    message = r"'mlp.experts.gate_proj' matches no parameter of this model. Its experts' are .*experts.gate_up_proj"
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_mixture(), config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp.gate.weight", "MixtralTopKRouter does not run through transformers' experts interface"),
        ("q_proj.weight", "Linear does not run through transformers' experts interface"),
    ],
)
def test_other_parameters_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_mixture(), expert_config(target_parameters=[name]))


def test_experts_as_a_module_are_refused():
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' holds experts: name its parameters"):
        get_peft_model(make_mixture(), CeraConfig(target_modules=["experts"]))
    with pytest.raises(ValueError, match="holds experts: name its parameters"):
        adapted_mixture().add_adapter("second", CeraConfig(target_modules=["experts"]))


def test_experts_spread_over_processes_are_refused():
    model = make_mixture()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="MixtralExperts is spread over processes"):
        get_peft_model(model, expert_config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_r": 0}, "expert_r must be a positive integer"),
        ({"expert_r": 2, "target_parameters": None}, "expert_r has a meaning only with target_parameters"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters must be a list of names"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        expert_config(**settings)
