"""Requests to a model, and the answers to them, of every engine."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers

from cera_train.common.settings import require
from cera_train.data.tokens import ids_of, start_ids, stop_ids
from cera_train.runs.evaluation_folder import Generation, Key, Problem
from cera_train.settings.evaluation import GenerationConfig


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    problem: str
    sample: int
    prompt_ids: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.problem, self.sample


class Answer(NamedTuple):
    generation: Generation
    ids: list[int]  # its tokens, the end token included
    sampled: list[float] | None = None  # log p of its tokens, where a server sampled them


def requests_for(
    problems: Sequence[Problem],
    samples: int,
    tokenizer: Any,
    max_new_tokens: int,
    positions: int | None,
) -> list[Request]:
    """The answers to generate: `samples` for each problem, in order."""
    start = start_ids(tokenizer)
    texts = ids_of([problem.prompt for problem in problems], tokenizer)
    prompts = [
        problem.prompt_ids or (*start, *ids) for problem, ids in zip(problems, texts, strict=True)
    ]
    check_positions("task.max_new_tokens", max_new_tokens, max(map(len, prompts)), positions)
    return [
        Request(problem.id, sample, prompt)
        for problem, prompt in zip(problems, prompts, strict=True)
        for sample in range(samples)
    ]


def check_positions(setting: str, max_new_tokens: int, longest: int, positions: int | None) -> None:
    """Raises UserError where an answer to the longest prompt may need more positions than the model
    has."""
    require(
        positions is None or longest + max_new_tokens <= positions,
        f"{setting}={max_new_tokens} after a prompt of {longest} tokens is beyond the {positions} "
        f"positions of this model or of its server (--max-model-len): lower {setting}, or shorten "
        "the prompt.",
    )


def generation_settings(
    tokenizer: Any, model_ends: int | list[int] | None, max_new_tokens: int, stop: list[str]
) -> transformers.GenerationConfig:
    """When an answer ends. Raises UserError where no token ends one."""
    added = tokenizer.added_tokens_decoder.items() if stop else []
    special = {token.content: number for number, token in added if token.special}
    ends = stop_ids(tokenizer, model_ends) | {special[text] for text in stop if text in special}
    require(
        bool(ends), "the tokenizer has no end-of-text token: set one in its tokenizer_config.json."
    )
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        stop_strings=[text for text in stop if text not in special]
        or None,  # decoded texts have no special tokens
    )


def answer_of(
    request: Request,
    ids: list[int],
    tokenizer: Any,
    settings: transformers.GenerationConfig,
) -> Answer:
    """The answer in these tokens, up to the first end token."""
    end = next((place for place, token in enumerate(ids) if token in settings.eos_token_id), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    stops = [text.index(stop) for stop in settings.stop_strings or [] if stop in text]
    if end is not None:
        # `model.generate` pads a row that met a stop text with the end token, which then is no
        # token of the answer.
        ids = ids[:end] if stops else ids[: end + 1]
    generation = Generation(
        request.problem,
        request.sample,
        text[: min(stops)] if stops else text,
        tokens=len(ids),
        truncated=end is None and not stops,
    )
    return Answer(generation, ids)


def request_seed(request: Request, config: GenerationConfig) -> int:
    """The seed of an answer's random numbers, 63 bits."""
    digest = hashlib.sha256(f"{config.seed}/{request.problem}/{request.sample}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
