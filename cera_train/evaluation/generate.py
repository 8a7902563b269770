"""Generates answers: greedy, or sampled with random numbers that depend on (seed, problem, sample) alone.

Except for rounding, an answer depends neither on its batch nor on the order of problems. Batches are always cut from
all requests, also where some are done, so a resumed evaluation repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from cera_train.cera import for_inference
from cera_train.common.errors import UserError
from cera_train.data.prepare import ids_of, start_ids
from cera_train.evaluation.decode import Likeliest, can_decode, decode
from cera_train.model.weights import positions_of
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.settings.evaluation import GenerationConfig


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    problem: str
    sample: int
    prompt_ids: tuple[int, ...]


def requests_for(problems: Sequence[Problem], samples: int, tokenizer: Any) -> list[Request]:
    """The answers to generate: so many for each problem, in order."""
    start = start_ids(tokenizer)
    prompts = ids_of([problem.prompt for problem in problems], tokenizer)
    return [
        Request(problem.id, sample, (*start, *ids))
        for problem, ids in zip(problems, prompts, strict=True)
        for sample in range(samples)
    ]


def check_room(requests: Sequence[Request], max_new_tokens: int, model: PreTrainedModel) -> None:
    """Raises UserError where the longest answer would need more positions than the model has."""
    longest, positions = max(len(request.prompt_ids) for request in requests), positions_of(model.config)
    if positions is not None and longest + max_new_tokens > positions:
        raise UserError(
            f"task.max_new_tokens={max_new_tokens} after the longest prompt, of {longest} tokens, is beyond the "
            f"{positions} positions of this model: lower task.max_new_tokens, or shorten task.prompt."
        )


def cut_batches(requests: Sequence[Request], max_new_tokens: int, batch_tokens: int) -> list[list[Request]]:
    """Cuts batches of similar prompt length, longest first, of at most `batch_tokens` with padding and answers."""
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: -len(request.prompt_ids)):
        longest = len(batches[-1][0].prompt_ids) if batches else 0
        if not batches or (len(batches[-1]) + 1) * (longest + max_new_tokens) > batch_tokens:
            batches.append([])
        batches[-1].append(request)
    return batches


def prepare_generation(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int, stop: list[str]) -> None:
    """Replaces the generation settings that came with the model, such as a penalty on repetition."""
    models_ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(models_ends if isinstance(models_ends, list) else [models_ends])} - {None}
    if not ends:
        raise UserError("the tokenizer has no end-of-text token: set one in its tokenizer_config.json.")
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        stop_strings=stop or None,
    )


@torch.no_grad()
def generate(
    model: Any, base: PreTrainedModel, tokenizer: Any, batch: Sequence[Request], config: GenerationConfig
) -> list[Generation]:
    """Generates the answers of a batch. `base` is the transformers model in `model`, after `prepare_generation`."""
    settings = base.generation_config
    prompts = [torch.tensor(request.prompt_ids, dtype=torch.long) for request in batch]
    ids_BT = pad_sequence(prompts, True, settings.pad_token_id, "left").to(base.device)
    mask_BT = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(base.device)
    choose = SeededSampling(batch, settings.max_new_tokens, config) if config.temperature else Likeliest()
    with for_inference(model):
        if can_decode(model, base):
            answers = decode(model, base, ids_BT, mask_BT, choose, tokenizer)
        else:
            output = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                logits_processor=[only_the_chosen(choose)],
                tokenizer=tokenizer if settings.stop_strings else None,
            )
            answers = output[:, ids_BT.shape[1] :].tolist()
    return [_generation(request, ids, tokenizer, settings) for request, ids in zip(batch, answers, strict=True)]


def only_the_chosen(choose: Likeliest) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that makes a greedy `generate` take the tokens of `choose`."""

    def process(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, choose(logits_BV)[:, None], 0.0)

    return process


def _generation(
    request: Request, ids: list[int], tokenizer: Any, settings: transformers.GenerationConfig
) -> Generation:
    end = next((place for place, token in enumerate(ids) if token in settings.eos_token_id), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    stops = [text.index(stop) for stop in settings.stop_strings or [] if stop in text]
    # `model.generate` pads a row that met a stop text with the end token, which then is no token of the answer.
    tokens = len(ids) if end is None else end + (not stops)
    return Generation(
        request.problem,
        request.sample,
        text[: min(stops)] if stops else text,
        tokens,
        truncated=end is None and not stops and len(ids) == settings.max_new_tokens,
    )


class SeededSampling(Likeliest):
    """Samples a token by inverting the distribution function, cut at top-p, at a uniform random number. A row's random
    numbers depend on (seed, problem, sample) alone."""

    def __init__(self, batch: Sequence[Request], max_new_tokens: int, config: GenerationConfig) -> None:
        self.temperature, self.top_p, self.step = config.temperature, config.top_p, 0
        uniform = []
        for request in batch:
            digest = hashlib.sha256(f"{config.seed}/{request.problem}/{request.sample}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            uniform.append(torch.rand(max_new_tokens, generator=generator, dtype=torch.float64))
        self.uniform_BT = torch.stack(uniform)

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        super().__call__(logits_BV)  # raises where logits are not finite
        probabilities = torch.softmax(logits_BV.double() / self.temperature, -1)
        likeliest, order = probabilities.sort(descending=True)
        is_kept = likeliest.cumsum(-1) - likeliest < self.top_p  # includes the token that brings the sum to top_p
        # In the vocabulary's order: sorted by likelihood, rounding would swap tokens that are nearly as likely.
        cumulative = (probabilities * torch.zeros_like(probabilities).scatter(-1, order, is_kept.double())).cumsum(-1)
        uniform = self.uniform_BT[:, self.step, None].to(logits_BV.device)
        self.step += 1
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        self.uniform_BT = self.uniform_BT[rows.cpu()]
