"""Answers: what the library's own `generate` gives, one by one, whatever the batch, the order and
the padding."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from oracles import (
    GREEDY,
    PROMPTS,
    adapted,
    answers_of,
    assert_greedy_answers_are_the_librarys,
    let_answers_end,
)

from benchmarks.tiny_models import tiny_model
from cera_train.evaluation.generate import LoadedModel, TokenChoice, cut_batches
from cera_train.evaluation.requests import Request, generation_settings
from cera_train.model.language_model import LanguageModel
from cera_train.settings.evaluation import GenerationConfig

SAMPLED = GenerationConfig(samples=2, temperature=0.8, top_p=0.95)


@pytest.fixture
def engine_of(tokenizer):
    """engine_of(model, base) -> an engine that gives answers of up to 12 tokens."""

    def engine_of(model, base) -> LoadedModel:
        engine = LoadedModel(LanguageModel(model, base), tokenizer)
        engine.prepare(12, [])
        return engine

    return engine_of


@pytest.fixture
def engine(tokenizer, engine_of) -> LoadedModel:
    model = make_tiny_llama(vocab_size=len(tokenizer))
    return engine_of(model, model)


@pytest.fixture(scope="session")
def requests(tokenizer) -> list[Request]:
    return [
        Request(f"problem-{number}", sample, tuple(tokenizer(text).input_ids))
        for number, text in enumerate(PROMPTS)
        for sample in range(2)
    ]


def test_rows_that_leave_do_not_change_the_others(engine, requests):
    let_answers_end(engine, requests)
    assert len(set(assert_greedy_answers_are_the_librarys(engine, requests))) >= 3
    lengths = [
        {answer.tokens for answer, *_ in ended} for ended in engine.generate(requests, GREEDY)
    ]
    assert max(map(len, lengths)) == 1 < len(lengths)  # an answer comes as soon as it ends
    together = answers_of(engine, [requests], SAMPLED)
    assert together == answers_of(engine, [[request] for request in reversed(requests)], SAMPLED)
    assert together == answers_of(engine, cut_batches(requests, 12, 60), SAMPLED)
    assert len({answer.tokens for answer in together.values()}) >= 3


@pytest.mark.parametrize("kind", ["cera", "dora"])
def test_answers_of_an_adapter(engine, engine_of, requests, kind):
    untouched = answers_of(engine, [requests], GREEDY)
    answering = engine_of(adapted(engine.base, kind), engine.base)
    assert answering.can_decode
    let_answers_end(answering, requests)
    assert len(set(assert_greedy_answers_are_the_librarys(answering, requests))) >= 3
    assert answers_of(answering, [requests], GREEDY) != untouched


@pytest.mark.parametrize(
    ("name", "changes"), [("gpt2", {}), ("mistral", {"sliding_window": 4}), ("mamba", {})]
)
def test_answers_of_other_architectures(tokenizer, engine_of, requests, name, changes):
    """Those whose memory is not the keys and values of every token answer through
    `model.generate`."""
    model = tiny_model(name, vocab_size=len(tokenizer), **changes)
    engine = engine_of(model, model)
    assert engine.can_decode == (name == "gpt2")
    let_answers_end(engine, requests)
    assert len(set(assert_greedy_answers_are_the_librarys(engine, requests))) >= 2
    sampled = answers_of(engine, [requests], SAMPLED)
    assert sampled == answers_of(engine, [[request] for request in requests], SAMPLED)


def test_sampling_follows_temperature_and_top_p():
    """Frequencies of 20,000 draws against the distribution computed by hand."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])
    temperature = 0.7
    top_p = 0.9
    probabilities = torch.softmax(logits / temperature, 0)
    kept = probabilities * torch.tensor([1, 1, 0, 0, 0])  # 0.79 + 0.19 reaches 0.9
    assert probabilities[0] < top_p < probabilities[:2].sum()
    expected = kept / kept.sum()
    batch = [Request(str(number), 0, (0,)) for number in range(20_000)]
    choice = TokenChoice(batch, 1, GenerationConfig(temperature=temperature, top_p=top_p))
    chosen = choice.tokens(logits.expand(len(batch), -1))
    frequency = torch.bincount(chosen, minlength=5) / len(batch)
    assert torch.allclose(frequency, expected, atol=0.01)
    assert frequency[2:].sum() == 0


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(engine, requests):
    [[(whole, *_)]] = engine.generate(requests[:1], GREEDY)
    stop = " hello"
    assert stop in whole.text
    engine.prepare(12, [stop])
    [[(answer, *_)]] = engine.generate(requests[:1], GREEDY)
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert not answer.truncated
    assert answer.tokens < whole.tokens


def test_a_special_token_as_stop_text_is_an_end_token(tokenizer):
    """Neither engine finds it in an answer's text, which has no special tokens."""
    special = next(text for text in tokenizer.all_special_tokens if text != tokenizer.eos_token)
    settings = generation_settings(tokenizer, None, 8, [special, "Q:"])
    assert set(settings.eos_token_id) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(special),
    }
    assert settings.stop_strings == ["Q:"]


def test_settings_that_came_with_the_model_do_not_count(engine, requests):
    expected = answers_of(engine, [requests], GREEDY)
    engine.base.generation_config.repetition_penalty = 5.0
    engine.base.generation_config.do_sample = True
    engine.prepare(12, [])
    assert answers_of(engine, [requests], GREEDY) == expected


@pytest.mark.parametrize(
    ("processes", "batch_tokens", "count"), [(1, 60, 4), (1, 1000, 1), (2, 1000, 2)]
)
def test_a_batch_holds_its_tokens_and_leaves_every_process_a_share(
    engine, requests, processes, batch_tokens, count
):
    config = GenerationConfig(batch_tokens=batch_tokens)
    batches = engine.batches(requests, 12, config, processes)
    assert len(batches) == count
    assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, requests))
    for batch in batches:
        assert len(batch) * (len(batch[0].prompt_ids) + 12) <= batch_tokens


def test_a_tokenizer_without_an_end_is_refused():
    model = make_tiny_llama(eos_token_id=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        LoadedModel(LanguageModel(model, model), SimpleNamespace(eos_token_id=None)).prepare(12, [])
