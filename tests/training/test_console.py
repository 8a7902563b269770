"""What a run prints before it starts."""

import pytest

from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.language_model import Allowed, LanguageModel
from cera_train.settings.adapters import AdapterConfig
from cera_train.training.console import describe_adapter, describe_speed


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (VARLEN, "attention by sequence in one kernel, no padding"),
        (BY_SEQUENCE, "attention by sequence, no padding"),
        (
            None,
            "no padding, no attention by sequence (this model's attention is not plain causal "
            "sdpa)",
        ),
    ],
)
def test_the_layout_and_the_compilation_are_described(tiny_llama, attention, expected):
    language_model = LanguageModel(tiny_llama, tiny_llama)
    speed = describe_speed(language_model, "train.compile=false")
    assert speed == "padding; not compiled (train.compile=false)"
    language_model.allowed = Allowed(attention=attention)
    language_model.is_flat = True
    language_model.is_compiled = True
    assert describe_speed(language_model, "") == f"{expected}; compiled layers"


def test_an_adapter_is_described_with_its_projections():
    def places(**settings) -> str:
        return describe_adapter(AdapterConfig(r=8, **settings)).removeprefix(
            "cera r=8, silu, dropout 0, on "
        )

    assert places() == "all-linear"
    assert places(target_modules=["q_proj", "v_proj"]) == "q_proj v_proj"
    vera = AdapterConfig(kind="peft", method="VERA", r=None, alpha=None, target_modules=None)
    assert describe_adapter(vera) == "VERA r=256, dropout 0"  # PEFT's default
    assert places(experts=True, expert_r=2) == "all-linear and all experts at r=2"
    assert (
        places(target_modules=[], target_parameters=["experts.down_proj"])
        == "experts.down_proj at r=8"
    )
