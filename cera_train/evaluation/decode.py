"""Generates the answers that `model.generate` would, faster. Prompts run beside others of like length, a finished row
leaves the batch at once, and keys and values are written in place; transformers' cache copies them for every token.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StopStringCriteria
from transformers.cache_utils import DynamicLayer

from cera_train.common.errors import UserError

PROMPTS_AT_ONCE = 8  # few, so that prompts are padded little; enough to keep matrix products large


class Likeliest:
    """Greedy decoding: chooses the next token of every row from its logits."""

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        tokens_B = logits_BV.argmax(-1)  # picks a NaN where there is one
        if not logits_BV.gather(-1, tokens_B[:, None]).isfinite().all():
            raise UserError("the model's logits are not finite: this adapter, or its training, diverged.")
        return tokens_B

    def keep(self, rows: torch.Tensor) -> None:
        """Reduces the batch to these rows, in this order."""


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
            self.keys, self.values = (pad(held[rows], (0, 0, 0, self.BLOCK)) for held in (self.keys, self.values))
        self.keys[rows, :, start:end] = key_states
        self.values[rows, :, start:end] = value_states
        return self.keys[rows, :, self.window.column : end], self.values[rows, :, self.window.column : end]

    def get_seq_length(self) -> int:
        """The tokens before those of this call, which the attention mask is made for."""
        return self.window.end - self.window.column


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


class DecodingBatch:
    """The rows that are still being answered, longest prompt first: tokens, masks, positions, keys and values. Answers
    have room for so many tokens."""

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
        """Runs the tokens of columns start to end; `first` is the first column that is not padding in all rows."""
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
        """Lets the last rows move to the places of those that ended: only their keys and values are copied. Returns the
        former place of each row that remains."""
        remaining = has_ended.count(False)
        last = [place for place in range(remaining, len(has_ended)) if not has_ended[place]]
        places = [last.pop() if has_ended[place] else place for place in range(remaining)]
        kept = torch.tensor(places, device=self.ids_BT.device)
        self.ids_BT, self.mask_BT, self.positions_BT = self.ids_BT[kept], self.mask_BT[kept], self.positions_BT[kept]
        gaps = torch.tensor(has_ended[:remaining], device=kept.device).nonzero()[:, 0]
        for layer in self.cache.layers if len(gaps) else []:
            layer.keys[gaps], layer.values[gaps] = layer.keys[kept[gaps]], layer.values[kept[gaps]]
        return kept


def decode(
    model: Any, base: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor, choose: Likeliest, tokenizer: Any
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
    choose.keep(order)
    batch = DecodingBatch(model, base, ids_BT[order], mask_BT[order], settings.max_new_tokens)
    answers: dict[int, list[int]] = {}
    rows = order.tolist()
    for now in range(prompt, longest):
        batch.ids_BT[:, now] = choose(batch.logits(now))
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
            choose.keep(kept)
            rows = [rows[place] for place in kept.tolist()]
    return [answers[row] for row in range(len(answers))]
