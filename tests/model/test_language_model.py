"""Loss and perplexity against brute force; neither depends on how rows are batched."""

import random
from dataclasses import replace

import peft
import pytest
import torch
from conftest import make_tiny_llama
from torch.nn.functional import log_softmax

from benchmarks.tiny_models import tiny_model
from cera_train.cera import CeraConfig
from cera_train.common.errors import UserError
from cera_train.model import language_model as language_model_module
from cera_train.model.batches import flat_batch, padded_batch
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, probe


def make_rows(count: int = 7, vocab_size: int = 512):
    numbers = random.Random(0)
    rows = [
        [numbers.randrange(vocab_size) for _ in range(numbers.randint(3, 20))] for _ in range(count)
    ]
    masks = [[False] + [numbers.random() < 0.6 for _ in ids[2:]] + [True] for ids in rows]
    return rows, masks


def make_language_model(model) -> LanguageModel:
    config = CeraConfig(r=4, dropout=0.0, init_weights=False, task_type="CAUSAL_LM")
    language_model = LanguageModel(peft.get_peft_model(model, config), model)
    probe(language_model)
    return language_model


def brute_force(model, rows, masks) -> float:
    """One token at a time."""
    total = 0.0
    with torch.no_grad():
        for ids, mask in zip(rows, masks, strict=True):
            for position in range(1, len(ids)):
                if mask[position]:
                    logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
                    total -= log_softmax(logits, -1)[ids[position]].item()
    return total


@pytest.mark.parametrize("batch", [flat_batch, padded_batch])
@pytest.mark.parametrize("size", [1, 3])
def test_loss_equals_brute_force_and_only_supervised_positions_reach_the_head(
    tiny_llama, batch, size
):
    rows, masks = make_rows()
    language_model = make_language_model(tiny_llama)
    seen = []
    hook = tiny_llama.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[0])
    )
    total = sum(
        language_model(batch(rows[i : i + size], masks[i : i + size])).sum().item()
        for i in range(0, len(rows), size)
    )
    hook.remove()
    assert sum(seen) == sum(map(sum, masks))
    assert total == pytest.approx(brute_force(language_model.model, rows, masks), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_trained_tokens_equals_brute_force(tied):
    model = make_tiny_llama(tie_word_embeddings=tied)
    config = CeraConfig(r=4, dropout=0.0, trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    language_model = LanguageModel(peft.get_peft_model(model, config), model)
    assert probe(language_model).flattens
    rows, masks = make_rows()
    expected = brute_force(language_model.model, rows, masks)
    assert language_model(flat_batch(rows, masks)).sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.1}),
        ("granite", {"logits_scaling": 8.0}),
        ("llama", {}),
    ],
)
def test_chunking_the_head_changes_nothing_even_if_logits_are_capped_or_scaled(
    name, changes, monkeypatch
):
    monkeypatch.setattr(language_model_module, "chunk_tokens", lambda device: 5)
    model = tiny_model(name, **changes)
    rows, masks = make_rows()
    language_model = make_language_model(model)
    batch = padded_batch(rows, masks)

    def loss_and_gradients() -> list[torch.Tensor]:
        language_model.zero_grad()
        loss = language_model(batch).sum()
        loss.backward()
        weights = language_model.parameters()
        return [loss, *(weight.grad for weight in weights if weight.requires_grad)]

    assert language_model.allowed.chunks_head
    chunked = loss_and_gradients()
    with torch.no_grad():
        without_gradients = language_model(batch).sum()
    language_model.allowed = replace(language_model.allowed, chunks_head=False)
    whole = loss_and_gradients()
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without_gradients, whole[0], rtol=1e-4, atol=1e-5)


def test_probe_finds_a_model_that_changes_its_logits_after_the_head(monkeypatch):
    """The way is unknown: the head alone would give another loss."""
    monkeypatch.setattr(language_model_module, "finish_logits", lambda logits, config: logits)
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    rows, masks = make_rows()
    language_model = make_language_model(model)
    assert not language_model.allowed.chunks_head
    total = language_model(padded_batch(rows, masks)).sum().item()
    assert total == pytest.approx(brute_force(language_model.model, rows, masks), rel=1e-5)


@pytest.mark.parametrize("name", ["mamba", "llama4_text", "modernbert-decoder"])
def test_the_loss_of_a_model_with_its_own_last_layer_equals_brute_force(name):
    """Mamba's hidden states are wider than its weights; Llama 4 gives no hidden states apart from
    logits; ModernBERT's head is called decoder, and is more than one layer."""
    rows, masks = make_rows()
    model = tiny_model(name)
    language_model = LanguageModel(model, model)
    assert not probe(language_model).chunks_head or name == "mamba"
    expected = brute_force(model, rows, masks)
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model.to(dtype)
        probe(language_model)
        loss = language_model(padded_batch(rows, masks)).sum().item()
        assert loss == pytest.approx(expected, rel=rounding)


def test_a_state_that_crosses_between_sequences_is_found_even_in_16_bits():
    """xLSTM's state moves the logits by 3 %, less than bfloat16 may round: only another first
    sequence reveals it."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("xlstm", chunk_size=64).to(dtype)
        language_model = LanguageModel(model, model)
        assert not probe(language_model).flattens


@pytest.mark.parametrize(
    ("name", "changes", "is_causal"),
    [("bert", {}, True), ("bert", {"is_decoder": False}, False), ("cpmant", {}, False)],
)
def test_a_model_whose_tokens_see_later_ones_is_refused(name, changes, is_causal):
    """Its loss would fall on tokens that it has read. `is_decoder` is what the tiny BERT has."""
    model = tiny_model(name, **changes)
    language_model = LanguageModel(model, model)
    if is_causal:
        assert probe(language_model).flattens
    else:
        with pytest.raises(UserError, match="see later ones.*is_decoder=true in the config.json"):
            choose_layout(language_model)
