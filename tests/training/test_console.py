"""What a run prints before it starts."""

from cera_train.model.attention import BY_SEQUENCE
from cera_train.model.language_model import Allowed, LanguageModel
from cera_train.settings.adapters import AdapterConfig
from cera_train.training.console import describe_adapter, describe_speed


def test_attention_padding_compilation_and_fallbacks_are_described(tiny_llama):
    language_model = LanguageModel(tiny_llama, tiny_llama)
    speed = describe_speed(language_model, "train.compile=false")
    assert speed == "sdpa attention, padding; not compiled (train.compile=false)"
    language_model.allowed = Allowed(attention=BY_SEQUENCE)
    language_model.use_flat_batches()
    language_model.is_compiled = True
    language_model.fallbacks = ["varlen attention: other logits"]
    assert describe_speed(language_model, "") == (
        "by_sequence attention, no padding; compiled layers; "
        "fallback: varlen attention: other logits"
    )


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
