"""Settings of an adapter: what they build, also on experts; those that contradict each other, PEFT
or the model are refused in one line that names the key."""

import pytest
from moe_models import MIXTURES, expert_loras, experts_of, make_mixture

from cera_train.adapters import build
from cera_train.cera import CeraLinear
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig


def refuses(message: str):
    """One line, whose start is the place."""
    return pytest.raises(UserError, match=rf"\A{message}[^\n]*\Z")


# --- experts --------------------------------------------------------------------------------------


def on_a_mixture(model_type: str = "mixtral", **settings):
    config = AdapterConfig(**({"r": 4, "dropout": 0.0} | settings))
    return build.build(make_mixture(model_type).requires_grad_(False), config)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_all_linear_has_experts_in_or_out(model_type):
    without = on_a_mixture(model_type, target_modules="all-linear")
    ranks = {"rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 2}}
    model = on_a_mixture(model_type, target_modules="all-linear", experts=True, settings=ranks)
    assert not experts_of(without)
    assert len(experts_of(model)) == 2
    linears = [name for name, module in without.named_modules() if type(module) is CeraLinear]
    assert linears == [name for name, module in model.named_modules() if type(module) is CeraLinear]
    layer = experts_of(model)[0]
    assert list(layer.cera_A["default"]) == ["gate_up_proj", "down_proj"]
    assert layer.r["default"] == {"gate_up_proj": 2, "down_proj": 2}
    assert model.peft_config["default"].target_parameters == [
        "experts.gate_up_proj",
        "experts.down_proj",
    ]


def test_pefts_lora_takes_experts_by_its_own_settings():
    settings = {
        "kind": "lora",
        "target_modules": ["q_proj"],
        "settings": {"target_parameters": ["mlp.experts.down_proj"]},
    }
    lora = on_a_mixture(**settings)
    assert [list(wrappers) for wrappers in expert_loras(lora)] == [["down_proj"]] * 2
    with refuses(
        "adapter.kind=lora adapter.settings.target_parameters=.*does not work with lora_dropout"
    ):
        on_a_mixture(dropout=0.1, **settings)
