"""What a run prints before it starts."""

from cera_train.model.attention import BY_SEQUENCE
from cera_train.model.language_model import Allowed, LanguageModel
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import DataConfig
from cera_train.training.console import (
    describe_adapter,
    describe_source,
    describe_speed,
    has_short_answers,
)


def test_attention_padding_compilation_and_fallbacks_are_described(tiny_llama):
    language_model = LanguageModel(tiny_llama, tiny_llama)
    speed = describe_speed(language_model, "train.compile=false")
    assert speed == "sdpa attention, padding; layers not compiled (train.compile=false)"
    refused = ("varlen attention: other logits",)
    language_model.allowed = Allowed(attention=BY_SEQUENCE, refused=refused)
    language_model.use_flat_batches()
    language_model.is_compiled = True
    assert describe_speed(language_model, "") == (
        "attention within each sequence, no padding; the first updates compile the layers; "
        "fallback: varlen attention: other logits"
    )


def test_a_run_names_its_rows(compose):
    """And the quickstart the way to others."""
    sources = [
        describe_source(compose(*words).data)
        for words in ([], ["+recipe=logistic_map"], ["data=gsm8k"])
    ]
    assert sources == ["logistic_map, computed", "logistic_map, computed", "openai/gsm8k"]
    quickstart = compose("+recipe=quickstart").data
    assert describe_source(quickstart).startswith("dates, computed; 'data.train_files=[FILE]'")


def test_questions_and_answers_are_graded_and_chats_are_not():
    def is_graded(**settings) -> bool:
        return has_short_answers(DataConfig(path="x", **settings))

    answers = {"layout": "text", "prompt": "{question}", "completion": "{answer}"}
    assert is_graded(**answers)
    assert not is_graded(**answers, rejected="{worse}")
    assert not is_graded(layout="text", prompt="", completion="{text}")
    assert not is_graded(layout="messages")
    assert not is_graded(layout="documents")


def test_an_adapter_is_described_with_its_projections():
    def places(**settings) -> str:
        return describe_adapter(AdapterConfig(r=8, **settings)).removeprefix(
            "cera r=8, silu, dropout 0, on "
        )

    assert places() == "all-linear"
    assert places(target_modules=["q_proj", "v_proj"]) == "q_proj v_proj"
    vera = AdapterConfig(kind="peft", method="VERA", r=None, alpha=None, target_modules=None)
    assert describe_adapter(vera) == "VERA r=256, dropout 0"  # PEFT's default
    assert places(experts=True) == "all-linear and all experts"
    some = {"target_parameters": ["experts.down_proj"]}
    assert places(target_modules=[], settings=some) == "experts.down_proj"
