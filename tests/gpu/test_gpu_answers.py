"""Answers decoded on a GPU are those of transformers' `generate`, with every kind of adapter."""

import pytest
from conftest import make_tiny_llama
from oracles import PROMPTS, adapted, assert_greedy_answers_are_the_librarys, let_answers_end

from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.requests import Request
from cera_train.model.language_model import LanguageModel

pytestmark = pytest.mark.gpu


@pytest.fixture
def requests(tokenizer) -> list[Request]:
    return [
        Request(f"problem-{number}", 0, tuple(tokenizer(text).input_ids))
        for number, text in enumerate(PROMPTS * 3)
    ]


@pytest.mark.parametrize("kind", [None, "cera", "lora", "dora"])
def test_greedy_answers_are_those_of_the_library_one_by_one(tokenizer, requests, device, kind):
    base = make_tiny_llama(vocab_size=len(tokenizer)).to(device)
    model = base if kind is None else adapted(base, kind)
    engine = LoadedModel(LanguageModel(model, base), tokenizer)
    engine.prepare(12, [])
    assert engine.can_decode
    let_answers_end(engine, requests)
    assert len(set(assert_greedy_answers_are_the_librarys(engine, requests))) >= 3
