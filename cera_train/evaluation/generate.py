"""Generates answers: greedy, or sampled with random numbers that depend on (seed, problem, sample) alone.

Except for rounding, an answer depends neither on its batch nor on the order of problems. Batches are always cut from
all requests, also where some are done, so a resumed evaluation repeats an uninterrupted one bit for bit.

`decode` gives the answers of `model.generate`, faster: prompts run beside others of like length, a finished row leaves
the batch at once, and keys and values are written in place; transformers' cache copies them for every token.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StopStringCriteria
from transformers.cache_utils import DynamicLayer

from cera_train.cera import for_inference
from cera_train.common.errors import UserError
from cera_train.data.prepare import ids_of, start_ids, stop_ids
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.settings.evaluation import GenerationConfig

PROMPTS_AT_ONCE = 8  # few, so that prompts are padded little; enough to keep matrix products large


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    problem: str
    sample: int
    prompt_ids: tuple[int, ...]


class Answer(NamedTuple):
    generation: Generation
    ids: list[int]
    """Its tokens, the end token included."""
    log_p: list[float] | None = None
    """Of each token, where a server sampled them."""


def requests_for(
    problems: Sequence[Problem], samples: int, tokenizer: Any, max_new_tokens: int, positions: int | None
) -> list[Request]:
    """The answers to generate: `samples` for each problem, in order. Raises UserError where the longest would need more
    positions than the model has."""
    start = start_ids(tokenizer)
    prompts = [(*start, *ids) for ids in ids_of([problem.prompt for problem in problems], tokenizer)]
    longest = max(map(len, prompts))
    if positions is not None and longest + max_new_tokens > positions:
        raise UserError(
            f"task.max_new_tokens={max_new_tokens} after the longest prompt, of {longest} tokens, is beyond the "
            f"{positions} positions of this model: lower task.max_new_tokens, or shorten task.prompt."
        )
    return [
        Request(problem.id, sample, prompt)
        for problem, prompt in zip(problems, prompts, strict=True)
        for sample in range(samples)
    ]


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
    ends = model.generation_config.eos_token_id
    model.generation_config = generation_settings(tokenizer, ends, max_new_tokens, stop)


def generation_settings(
    tokenizer: Any, model_ends: int | list[int] | None, max_new_tokens: int, stop: list[str]
) -> transformers.GenerationConfig:
    """When an answer ends. Raises UserError where no token ends one."""
    ends = stop_ids(tokenizer, model_ends)
    if not ends:
        raise UserError("the tokenizer has no end-of-text token: set one in its tokenizer_config.json.")
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        stop_strings=stop or None,
    )


def generate(
    model: Any, base: PreTrainedModel, tokenizer: Any, batch: Sequence[Request], config: GenerationConfig
) -> list[Generation]:
    """Generates the answers of a batch. `base` is the transformers model in `model`, after `prepare_generation`."""
    answers = generate_ids(model, base, tokenizer, batch, config)
    settings = base.generation_config
    return [generation_of(request, ids, tokenizer, settings) for request, ids in zip(batch, answers, strict=True)]


@torch.no_grad()
def generate_ids(
    model: Any, base: PreTrainedModel, tokenizer: Any, batch: Sequence[Request], config: GenerationConfig
) -> list[list[int]]:
    """The tokens of the answers of a batch, their end tokens included."""
    settings = base.generation_config
    prompts = [torch.tensor(request.prompt_ids, dtype=torch.long) for request in batch]
    ids_BT = pad_sequence(prompts, True, settings.pad_token_id, "left").to(base.device)
    mask_BT = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(base.device)
    choice = TokenChoice(batch, settings.max_new_tokens, config)
    with for_inference(model):
        if can_decode(model, base):
            return decode(model, base, ids_BT, mask_BT, choice, tokenizer)
        output = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            logits_processor=[choice],
            tokenizer=tokenizer if settings.stop_strings else None,
        )
        answers = output[:, ids_BT.shape[1] :].tolist()
    ends = [next((place for place, id in enumerate(ids) if id in settings.eos_token_id), None) for ids in answers]
    return [ids if end is None else ids[: end + 1] for ids, end in zip(answers, ends, strict=True)]  # it repeats them


def generation_of(
    request: Request, ids: list[int], tokenizer: Any, settings: transformers.GenerationConfig
) -> Generation:
    """The answer that these tokens are, their end token included."""
    end = next((place for place, token in enumerate(ids) if token in settings.eos_token_id), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    stops = [text.index(stop) for stop in settings.stop_strings or [] if stop in text]
    return Generation(
        request.problem,
        request.sample,
        text[: min(stops)] if stops else text,
        # `model.generate` pads a row that met a stop text with the end token, which then is no token of the answer.
        tokens=len(ids) if end is None else end + (not stops),
        truncated=end is None and not stops and len(ids) == settings.max_new_tokens,
    )


def seed_of(request: Request, config: GenerationConfig) -> int:
    """The seed of an answer's random numbers, 63 bits."""
    digest = hashlib.sha256(f"{config.seed}/{request.problem}/{request.sample}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


class TokenChoice:
    """Chooses the next token of every row: the likeliest; or, at a temperature, by inverting the distribution function,
    cut at top-p, at a uniform random number. A row's random numbers depend on (seed, problem, sample) alone."""

    def __init__(self, batch: Sequence[Request], max_new_tokens: int, config: GenerationConfig) -> None:
        self.config, self.step, uniform = config, 0, []
        for request in batch if config.temperature else []:
            generator = torch.Generator().manual_seed(seed_of(request, config))
            uniform.append(torch.rand(max_new_tokens, generator=generator, dtype=torch.float64))
        self.uniform_BT = torch.stack(uniform) if uniform else torch.empty(len(batch), 0)

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """As a logits processor: makes a greedy `model.generate` take the chosen tokens."""
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, self.tokens(logits_BV)[:, None], 0.0)

    def tokens(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """[B] tokens. Raises UserError where logits are not finite."""
        likeliest_B = logits_BV.argmax(-1)  # argmax returns the place of a NaN, if there is one
        if not logits_BV.gather(-1, likeliest_B[:, None]).isfinite().all():
            raise UserError("the model's logits are not finite: this adapter, or its training, diverged.")
        if not self.config.temperature:
            return likeliest_B
        probabilities = torch.softmax(logits_BV.double() / self.config.temperature, -1)
        ranked, order = probabilities.sort(descending=True)
        is_kept = ranked.cumsum(-1) - ranked < self.config.top_p  # includes the token that brings the sum to top_p
        # In the vocabulary's order: sorted by likelihood, rounding would swap tokens that are nearly as likely.
        cumulative = (probabilities * torch.zeros_like(probabilities).scatter(-1, order, is_kept.double())).cumsum(-1)
        uniform = self.uniform_BT[:, self.step, None].to(logits_BV.device)
        self.step += 1
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]

    def keep(self, rows_B: torch.Tensor) -> None:
        """Reduces the batch to these rows, in this order."""
        self.uniform_BT = self.uniform_BT[rows_B.cpu()]


# --- decoding --------------------------------------------------------------------------------------------------------


def can_decode(model: Any, base: PreTrainedModel) -> bool:
    """Whether keys and values are all that the model keeps of earlier tokens, and its inputs are the usual ones. False
    for sliding windows, recurrent states, and adapters that act on the whole prompt."""
    adapter = None if model is base else model.active_peft_config
    is_of_prompt = adapter is not None and (
        adapter.is_prompt_learning or (isinstance(adapter, LoraConfig) and adapter.alora_invocation_tokens is not None)
    )
    return (
        not is_of_prompt
        and type(base).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and {"attention_mask", "position_ids", "logits_to_keep"} <= inspect.signature(base.forward).parameters.keys()
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=base.config).layers)
    )


def decode(
    model: Any, base: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor, choice: TokenChoice, tokenizer: Any
) -> list[list[int]]:
    """Generates the new tokens of every row, its end token included.

    Args:
        model: the model with its adapter, or `base` itself.
        base: the transformers model; its generation_config defines when an answer ends.
        ids_BT: prompts, padded on the left.
        mask_BT: 0 where they are padded, else 1.
    """
    settings = base.generation_config
    ends = torch.tensor(settings.eos_token_id, device=ids_BT.device)
    stops = StopStringCriteria(tokenizer, settings.stop_strings) if settings.stop_strings else None
    prompt, longest = ids_BT.shape[1], ids_BT.shape[1] + settings.max_new_tokens
    order = mask_BT.sum(-1).sort(descending=True, stable=True).indices
    choice.keep(order)
    batch = DecodingBatch(model, base, ids_BT[order], mask_BT[order], settings.max_new_tokens)
    answers: dict[int, list[int]] = {}
    rows = order.tolist()
    for now in range(prompt, longest):
        batch.ids_BT[:, now] = choice.tokens(batch.logits(now))
        has_ended_B = torch.isin(batch.ids_BT[:, now], ends)
        if stops is not None:
            has_ended_B |= stops(batch.ids_BT[:, : now + 1], None)
        has_ended = has_ended_B.tolist() if now + 1 < longest else [True] * len(rows)
        for place, row in enumerate(rows):
            if has_ended[place]:
                answers[row] = batch.ids_BT[place, prompt : now + 1].tolist()
        if all(has_ended):
            break
        if any(has_ended):
            kept = batch.drop(has_ended)
            choice.keep(kept)
            rows = [rows[place] for place in kept.tolist()]
    return [answers[row] for row in range(len(answers))]


class DecodingBatch:
    """The rows that are still being answered, longest prompt first: tokens, masks, positions, keys and values.
    `room` is the length of the longest answer."""

    def __init__(
        self, model: Any, base: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor, room: int
    ) -> None:
        self.model, self.prompt, self.window = model, ids_BT.shape[1], Window()
        self.lengths = mask_BT.sum(-1).tolist()
        self.ids_BT = pad(ids_BT, (0, room))
        self.mask_BT = pad(mask_BT, (0, room), value=1)
        self.positions_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)
        layers = len(DynamicCache(config=base.config).layers)
        self.cache = Cache(layers=[GrowingLayer(len(ids_BT), self.prompt, self.window) for _ in range(layers)])
        # transformers 5.24 renames the argument, and warns of the old name
        self.cache_name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"

    def logits(self, column: int) -> torch.Tensor:
        """Logits of the token at a column, from the token before it or, right after the prompts, from these."""
        if column > self.prompt:
            return self._last_logits(slice(0, len(self.ids_BT)), 0, column - 1, column)
        logits = []
        for row in range(0, len(self.ids_BT), PROMPTS_AT_ONCE):  # of like length: padding costs as much as tokens do
            first = self.prompt - self.lengths[row]
            logits.append(self._last_logits(slice(row, row + PROMPTS_AT_ONCE), first, first, self.prompt))
        return torch.cat(logits)

    def _last_logits(self, rows: slice, first: int, start: int, end: int) -> torch.Tensor:
        """Runs the tokens of columns start to end; `first` is the first column with a token in any of the rows."""
        self.window.row, self.window.column, self.window.end = rows.start, first, start
        output = self.model(
            input_ids=self.ids_BT[rows, start:end],
            attention_mask=self.mask_BT[rows, first:end],
            position_ids=self.positions_BT[rows, start:end],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        return output.logits[:, -1]

    def drop(self, has_ended: list[bool]) -> torch.Tensor:
        """Removes the rows that ended. The last rows take their places, so that few keys and values are copied. Returns
        the former place of each row that remains."""
        remaining = has_ended.count(False)
        last = [place for place in range(remaining, len(has_ended)) if not has_ended[place]]
        places = [last.pop() if has_ended[place] else place for place in range(remaining)]
        kept = torch.tensor(places, device=self.ids_BT.device)
        self.ids_BT, self.mask_BT, self.positions_BT = self.ids_BT[kept], self.mask_BT[kept], self.positions_BT[kept]
        gaps = torch.tensor(has_ended[:remaining], device=kept.device).nonzero()[:, 0]
        for layer in self.cache.layers if len(gaps) else []:
            layer.keys[gaps], layer.values[gaps] = layer.keys[kept[gaps]], layer.values[kept[gaps]]
        return kept


@dataclass
class Window:
    """The part of the cache that a call of the model reads and extends."""

    row: int = 0  # its first row
    column: int = 0  # its first column
    end: int = 0  # the column after its written ones, where the call's first token goes


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, [rows, heads, room, width], right-aligned like the left-padded prompts. Room grows
    block by block, since most answers end far before max_new_tokens. All layers share one window."""

    BLOCK = 128

    def __init__(self, rows: int, prompt: int, window: Window) -> None:
        super().__init__()
        self.rows, self.prompt, self.window = rows, prompt, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates zeros: masked places weigh 0 in attention, and 0 times leftover memory may be NaN."""
        self.keys, self.values = (
            states.new_zeros(self.rows, states.shape[1], self.prompt + self.BLOCK, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new keys and values, [rows, heads, new, width]; returns views of all in the window."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = slice(self.window.row, self.window.row + len(key_states))
        start, end = self.window.end, self.window.end + key_states.shape[-2]
        if end > self.keys.shape[-2]:  # one more block, without the rows that have left
            self.keys, self.values = (pad(states[rows], (0, 0, 0, self.BLOCK)) for states in (self.keys, self.values))
        self.keys[rows, :, start:end] = key_states
        self.values[rows, :, start:end] = value_states
        return self.keys[rows, :, self.window.column : end], self.values[rows, :, self.window.column : end]

    def get_seq_length(self) -> int:
        """The tokens before those of this call, which the attention mask is made for."""
        return self.window.end - self.window.column
