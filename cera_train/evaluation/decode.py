"""Answers token by token, as `model.generate` gives them, for less: prompts run beside others of their length, a row
that ends leaves the batch at once, and keys and values are written in place, where transformers' cache copies all of
them for every token.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StopStringCriteria
from transformers.cache_utils import DynamicLayer

PROMPTS_AT_ONCE = 8
"""Few, so that prompts of like length are padded to theirs; enough for matrix products to be of good size."""


class TokenChoice(Protocol):
    """How the next token of every row follows from its logits."""

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next tokens, [B]."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """From now on the batch is made of these of its rows, in this order."""
        ...


@dataclass
class Window:
    """The part of the cache that a call of the model reads and adds to."""

    row: int = 0
    """Its first row."""
    column: int = 0
    """Its first column."""
    end: int = 0
    """Where its written columns end, and what the call adds begins."""


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, [rows, heads, room, width], right-aligned as the left-padded prompts are.

    There is room for a block of tokens more than there are: most answers end far before max_new_tokens.

    Args:
        rows: of the batch.
        prompt: tokens of its longest prompt.
        window: shared by all layers.
    """

    BLOCK = 128

    def __init__(self, rows: int, prompt: int, window: Window) -> None:
        super().__init__()
        self.rows, self.prompt, self.window = rows, prompt, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros: attention weighs what is masked with 0, and 0 times what memory held before may be NaN."""
        self.keys, self.values = (
            states.new_zeros(self.rows, states.shape[1], self.prompt + self.BLOCK, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes what is new, [rows, heads, new, width]; returns all there is in the window, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = slice(self.window.row, self.window.row + len(key_states))
        start, end = self.window.end, self.window.end + key_states.shape[-2]
        if end > self.keys.shape[-2]:  # one more block, without the rows that have left
            self.keys, self.values = (pad(held[rows], (0, 0, 0, self.BLOCK)) for held in (self.keys, self.values))
        self.keys[rows, :, start:end] = key_states
        self.values[rows, :, start:end] = value_states
        return self.keys[rows, :, self.window.column : end], self.values[rows, :, self.window.column : end]

    def get_seq_length(self) -> int:
        """What the masks are made for: the tokens before those of this call."""
        return self.window.end - self.window.column

    def move(self, sources: torch.Tensor, places: torch.Tensor) -> None:
        """Copies rows over others."""
        self.keys[places] = self.keys[sources]
        self.values[places] = self.values[sources]


def can_decode(model: Any, base: PreTrainedModel) -> bool:
    """Whether all the model knows of earlier tokens are their keys and values, and its inputs are the usual ones.

    Not so with sliding windows, recurrent states, and adapters that act on the prompt as a whole.
    """
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
    model: Any, base: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor, choose: TokenChoice, tokenizer: Any
) -> list[list[int]]:
    """The new tokens of every row, its end token included.

    Args:
        model: the model with its adapter, or `base` itself.
        base: the transformers model; its generation_config says when an answer ends.
        ids_BT: prompts, padded on the left.
        mask_BT: 0 where they are padded, else 1.
        choose: greedy or sampling.
        tokenizer: for stop strings.
    """
    settings = base.generation_config
    ends = torch.tensor(settings.eos_token_id, device=ids_BT.device)
    stops = StopStringCriteria(tokenizer, settings.stop_strings) if settings.stop_strings else None
    prompt, longest = ids_BT.shape[1], ids_BT.shape[1] + settings.max_new_tokens
    length_B, order = mask_BT.sum(-1).sort(descending=True, stable=True)
    ids_BT = pad(ids_BT[order], (0, settings.max_new_tokens))
    mask_BT = pad(mask_BT[order], (0, settings.max_new_tokens), value=1)
    choose.keep(order)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    window = Window()
    layers = len(DynamicCache(config=base.config).layers)
    cache = Cache(layers=[GrowingLayer(len(ids_BT), prompt, window) for _ in range(layers)])
    # transformers 5.24 renames the argument, and warns of the old name
    cache_name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"

    def last_logits(rows: slice, first: int, start: int, end: int) -> torch.Tensor:
        """Runs the tokens of columns start to end; `first` is the first column that is not padding in all rows."""
        window.row, window.column, window.end = rows.start, first, start
        output = model(
            input_ids=ids_BT[rows, start:end],
            attention_mask=mask_BT[rows, first:end],
            position_ids=positions_BT[rows, start:end],
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        )
        return output.logits[:, -1]

    # Prompts of like length together: padding costs as much as tokens do.
    groups = [slice(row, min(row + PROMPTS_AT_ONCE, len(ids_BT))) for row in range(0, len(ids_BT), PROMPTS_AT_ONCE)]
    firsts = [prompt - length for length in length_B[::PROMPTS_AT_ONCE].tolist()]
    logits_BV = torch.cat([last_logits(rows, first, first, prompt) for rows, first in zip(groups, firsts, strict=True)])

    answers: dict[int, list[int]] = {}
    rows = order.tolist()
    for now in range(prompt, longest):
        if now > prompt:
            logits_BV = last_logits(slice(0, len(rows)), 0, now - 1, now)
        ids_BT[:, now] = choose(logits_BV)
        has_ended_B = torch.isin(ids_BT[:, now], ends)
        if stops is not None:
            has_ended_B |= stops(ids_BT[:, : now + 1], None)
        has_ended = has_ended_B.tolist() if now + 1 < longest else [True] * len(rows)
        if any(has_ended):
            for place, row in enumerate(rows):
                if has_ended[place]:
                    answers[row] = ids_BT[place, prompt : now + 1].tolist()
            places = _close_gaps(has_ended)
            if not places:
                break
            rows = [rows[place] for place in places]
            kept = torch.tensor(places, device=ids_BT.device)
            ids_BT, mask_BT, positions_BT = ids_BT[kept], mask_BT[kept], positions_BT[kept]
            choose.keep(kept)
            gaps = torch.tensor(has_ended[: len(places)], device=ids_BT.device).nonzero()[:, 0]
            for layer in cache.layers if len(gaps) else []:
                layer.move(kept[gaps], gaps)
    return [answers[row] for row in range(len(answers))]


def _close_gaps(has_ended: list[bool]) -> list[int]:
    """The rows that go on, at their places where they can: the last ones move to the places of those that ended."""
    remaining = has_ended.count(False)
    last = [place for place in range(remaining, len(has_ended)) if not has_ended[place]]
    return [last.pop() if has_ended[place] else place for place in range(remaining)]
