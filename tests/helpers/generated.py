"""Answers of ours beside those of `model.generate`."""

from __future__ import annotations

import torch

from cera_train.adapters.build import build
from cera_train.evaluation.generate import generate
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.evaluation import GenerationConfig

GREEDY = GenerationConfig()


def adapted(base, kind: str):
    """The base with an adapter that changes its answers: B starts at zero."""
    model = build(base, AdapterConfig(AdapterKind(kind), 4)).eval()
    for name, parameter in model.named_parameters():
        if "_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def answers_of(model, tokenizer, batches, config, base=None) -> dict:
    generations = [answer for batch in batches for answer in generate(model, base or model, tokenizer, batch, config)]
    return {(answer.problem, answer.sample): answer for answer in generations}


def assert_greedy_answers_are_the_librarys(model, base, tokenizer, requests) -> list[int]:
    """Those of `model.generate`, one by one and unpadded. Returns how long each is."""
    answers = answers_of(model, tokenizer, [requests], GREEDY, base)
    for request in requests:
        prompt = torch.tensor([request.prompt_ids], device=base.device)
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        ids = alone[0, len(request.prompt_ids) :].tolist()
        has_end = ids[-1] in base.generation_config.eos_token_id
        answer = answers[request.problem, request.sample]
        assert answer.text == tokenizer.decode(ids[:-1] if has_end else ids, skip_special_tokens=True)
        assert answer.tokens == len(ids)
        assert answer.truncated == (not has_end)
    return [answers[request.problem, request.sample].tokens for request in requests]


def let_answers_end(model, base, tokenizer, requests) -> None:
    """Makes end tokens of the third, the sixth and the ninth token of some answers, so that they leave one by one."""
    base.generation_config.eos_token_id = [
        model.generate(input_ids=torch.tensor([request.prompt_ids], device=base.device))[
            0, len(request.prompt_ids) + step
        ].item()
        for request, step in zip(requests[::2], (2, 5, 8), strict=False)
    ]
