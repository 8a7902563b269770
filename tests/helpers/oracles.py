"""What tests on a CPU and on a GPU hold a result against: attention under a mask, dequantised
weights, `generate`."""

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from cera_train.adapters.build import build
from cera_train.evaluation.generate import LoadedModel
from cera_train.model.weights import load_model
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.model import ModelConfig, Quantization


class Causal(nn.Module):
    """Stands in for the attention module of a decoder."""

    is_causal = True


def under_a_mask(query, key, value, lengths: list[int], window: int | None = None) -> torch.Tensor:
    """Query, key and value are (1, heads, tokens, width); the result is (1, tokens, heads,
    width)."""
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool, device=query.device)
    start = 0
    for length in lengths:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask[start : start + length, start : start + length] = (
            ones.triu(1 - window) if window else ones
        )
        start += length
    repeats = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def adapted(base, kind: str):
    """The base with an adapter that changes its answers: B starts at zero."""
    model = build(
        base, AdapterConfig(AdapterKind(kind), 4, alpha=None, target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, parameter in model.named_parameters():
        if "_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def gradients_after_an_evaluation(base, device: torch.device) -> torch.Tensor:
    torch.manual_seed(1)
    model = adapted(base, "cera")
    ids = torch.arange(20, device=device)[None]
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad])


def assert_nf4_gradients_are_right(folder: Path, device: torch.device) -> None:
    quantised = load_model(ModelConfig(path=str(folder), quantization=Quantization.nf4), device)
    dequantised = load_model(ModelConfig(path=str(folder)), device)
    for name, module in quantised.named_modules():
        if hasattr(module, "weight") and getattr(module.weight, "quant_state", None) is not None:
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dequantised.get_submodule(name).weight.data = weight.to(dequantised.dtype)
    got, expected = (
        gradients_after_an_evaluation(model, device) for model in (quantised, dequantised)
    )
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=0)
    assert cosine > 0.999
    assert got.norm() == pytest.approx(expected.norm().item(), rel=0.02)


GREEDY = GenerationConfig()
PROMPTS = [
    "Question: hello",
    "the next value",
    "x",
    "Question: what is the next value?\nAnswer:",
    "is it 0.84",
]
"""Of several lengths."""


def answers_of(engine: LoadedModel, batches, config) -> dict:
    answers = [
        answer for batch in batches for ended in engine.generate(batch, config) for answer in ended
    ]
    return {(answer.problem, answer.sample): answer for answer, *_ in answers}


def assert_greedy_answers_are_the_librarys(engine: LoadedModel, requests) -> list[int]:
    """Those of `model.generate`, one by one and unpadded. Returns how long each is."""
    answers = answers_of(engine, [requests], GREEDY)
    for request in requests:
        prompt = torch.tensor([request.prompt_ids], device=engine.base.device)
        alone = engine.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        ids = alone[0, len(request.prompt_ids) :].tolist()
        has_end = ids[-1] in engine.base.generation_config.eos_token_id
        answer = answers[request.problem, request.sample]
        assert answer.text == engine.tokenizer.decode(
            ids[:-1] if has_end else ids, skip_special_tokens=True
        )
        assert answer.tokens == len(ids)
        assert answer.truncated == (not has_end)
    return [answers[request.problem, request.sample].tokens for request in requests]


def let_answers_end(engine: LoadedModel, requests) -> None:
    """Turns the third, sixth and ninth token of some answers into end tokens, so that answers end
    one by one."""
    engine.base.generation_config.eos_token_id = [
        engine.model.generate(
            input_ids=torch.tensor([request.prompt_ids], device=engine.base.device)
        )[0, len(request.prompt_ids) + step].item()
        for request, step in zip(requests[::2], (2, 5, 8), strict=False)
    ]
