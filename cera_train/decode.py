"""Answers token by token, as `model.generate` gives them, for less: a row that ends leaves the batch at once, and keys
and values are written in place, where transformers' cache copies all of them for every token.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StopStringCriteria
from transformers.cache_utils import DynamicLayer


class TokenChoice(Protocol):
    """How the next token of every row follows from its logits."""

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next tokens, [B]."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """From now on the batch is made of these of its rows, in this order."""
        ...


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, [rows, heads, room, width], of which the first `length` tokens are written.

    There is room for a block of tokens more than there are: most answers end far before max_new_tokens.
    """

    BLOCK = 128

    length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes what is new, [rows, heads, new, width]; returns all there is, as views."""
        rows, start = len(key_states), self.length
        self.length += key_states.shape[-2]
        if not self.is_initialized or self.length > self.keys.shape[-2]:
            self.keys = self._with_room(self.keys, key_states, start)
            self.values = self._with_room(self.values, value_states, start)
            self.is_initialized = True
        self.keys[:rows, :, start : self.length] = key_states
        self.values[:rows, :, start : self.length] = value_states
        return self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]

    def _with_room(self, old: torch.Tensor | None, states: torch.Tensor, start: int) -> torch.Tensor:
        rows, heads, _, width = states.shape
        grown = states.new_empty(rows, heads, self.length + self.BLOCK, width)
        if old is not None:
            grown[:, :, :start] = old[:rows, :, :start]
        return grown

    def get_seq_length(self) -> int:
        return self.length

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
    ids_BT = pad(ids_BT, (0, settings.max_new_tokens))
    mask_BT = pad(mask_BT, (0, settings.max_new_tokens), value=1)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    # transformers 5.24 renames the argument, and warns of the old name
    cache_name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"

    answers: dict[int, list[int]] = {}
    rows = list(range(len(ids_BT)))
    start = 0
    for now in range(prompt, longest):
        logits_BV = model(
            input_ids=ids_BT[:, start:now],
            attention_mask=mask_BT[:, :now],
            position_ids=positions_BT[:, start:now],
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        ).logits[:, -1]
        start = now
        ids_BT[:, now] = choose(logits_BV)
        has_ended_B = torch.isin(ids_BT[:, now], ends)
        if stops is not None:
            has_ended_B |= stops(ids_BT[:, : now + 1], None)
        has_ended = has_ended_B.tolist() if now + 1 < longest else [True] * len(rows)
        if any(has_ended):
            for place, row in enumerate(rows):
                if has_ended[place]:
                    answers[row] = ids_BT[place, prompt : now + 1].tolist()
            order = _close_gaps(has_ended)
            if not order:
                break
            rows = [rows[place] for place in order]
            kept = torch.tensor(order, device=ids_BT.device)
            ids_BT, mask_BT, positions_BT = ids_BT[kept], mask_BT[kept], positions_BT[kept]
            choose.keep(kept)
            gaps = torch.tensor([place for place in range(len(order)) if has_ended[place]], device=ids_BT.device).long()
            for layer in cache.layers if len(gaps) else []:
                layer.move(kept[gaps], gaps)
    return [answers[row] for row in range(len(answers))]


def _close_gaps(has_ended: list[bool]) -> list[int]:
    """The rows that go on, at their places where they can: the last ones move to the places of those that ended."""
    remaining = has_ended.count(False)
    last = [place for place in range(remaining, len(has_ended)) if not has_ended[place]]
    return [last.pop() if has_ended[place] else place for place in range(remaining)]
